"""Which members are one sample, and which of its images is embedded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shard_embedder.pipeline.core.schema import IMAGE, REASON
from shard_embedder.pipeline.shards.grouping import MAX_SAMPLE_MEMBERS
from shard_embedder.pipeline.shards.keys import IMAGE_EXTENSIONS, image_rank, split_key
from tests.conftest import encode, photo, write_tar
from tests.shards.reading import PHOTO, parts, rows

# Keys


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.e/a.b.jpg", ("d.e/a", "b.jpg")),
        ("./a.jpg", ("./a", "jpg")),
        ("../../a.jpg", ("../../a", "jpg")),
        ("/abs/a.JPG", ("/abs/a", "JPG")),
        ("a", ("a", "")),
        ("a.", ("a", "")),
        ("d.e/a", ("d.e/a", "")),
        (".hidden", None),
        ("d/._a.jpg", None),
        ("", None),
        ("d/", None),
    ],
)
def test_a_key_is_the_path_up_to_the_first_dot_of_the_basename(name: str, expected: tuple[str, str] | None) -> None:
    assert split_key(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("d.e/a.b.jpg", ("d.e/a.b", "jpg")),
        ("1.2.840.113619.2.55.3.jpg", ("1.2.840.113619.2.55.3", "jpg")),
        ("a", ("a", "")),
        ("a.", ("a", "")),
        ("d.e/a", ("d.e/a", "")),
        (".hidden.jpg", None),
        ("d/._a.jpg", None),
        ("", None),
        ("d/", None),
    ],
)
def test_a_key_is_the_path_up_to_the_last_dot_where_asked(name: str, expected: tuple[str, str] | None) -> None:
    assert split_key(name, "last-dot") == expected


@given(st.text(st.sampled_from("ab./ é\x7f"), min_size=1, max_size=12))
def test_keys_are_webdatasets_wherever_it_gives_one(name: str) -> None:
    theirs, extension = base_plus_ext(name)
    # For `d/.x` it takes the key `d/`: that is a hidden file, and no sample.
    if theirs is not None and not theirs.endswith("/"):
        assert split_key(name) == (theirs, extension)


def test_the_image_is_the_first_by_extension_and_then_by_place() -> None:
    assert [image_rank(extension, None) for extension in IMAGE_EXTENSIONS] == list(range(len(IMAGE_EXTENSIONS)))
    assert image_rank("JPG", None) == 0
    assert image_rank("txt", None) is None
    assert image_rank("", None) is None
    assert (image_rank("mask.png", None) or 0) > (image_rank("dib", None) or 0)
    assert (image_rank("thumb.jpg", "thumb.jpg"), image_rank("jpg", "thumb.jpg")) == (0, None)


def test_a_mask_beside_an_image_is_not_taken_for_it(tmp_path: Path) -> None:
    image, mask = encode(photo(1), "PNG"), encode(photo(2), "PNG")
    path = write_tar(tmp_path / "s.tar", [("a.mask.png", mask), ("a.png", image), ("b.mask.png", mask)])
    assert [(row["member"], row[IMAGE]) for row in rows(path)] == [("a.png", image), ("b.mask.png", mask)]
    assert [row["member"] for row in rows(path, image_member="mask.png")] == ["a.mask.png", "b.mask.png"]


# Names whose image members fall together up to the first dot.
TOGETHER = {
    "DICOM": [f"1.2.840.113619.2.55.{i}.jpg" for i in range(20)],
    "screenshots": [f"Screenshot 2025-07-14 at 10.39.{i}.png" for i in range(10, 14)],
    "left and right": ["a.left.jpg", "a.right.jpg", "b.left.jpg", "b.right.jpg"],
    "numbered": ["a.0.jpg", "a.1.jpg", "a.2.jpg"],
    "dates": ["22.05.png", "22.06.png"],
}


@pytest.mark.parametrize("names", TOGETHER.values(), ids=TOGETHER)
def test_images_that_fall_together_are_counted_by_default_and_kept_by_the_last_dot(
    names: list[str], tmp_path: Path
) -> None:
    images = [encode(photo(seed, (24, 20)), "PNG") for seed, _ in enumerate(names)]
    path = write_tar(tmp_path / "s.tar", list(zip(names, images, strict=True)))
    found = parts(path, part_rows=3)
    kept = [row for _, samples in found for row in samples.to_pylist()]
    assert len(kept) == len({name.partition(".")[0] for name in names})
    assert all(row[REASON] is None for row in kept)
    assert sum(values["unused_images"] for values, _ in found) == len(names) - len(kept)
    example = next(values["unused_example"] for values, _ in found if values["unused_images"])
    other, _, image = example.partition(", beside ")
    assert {other, image} <= set(names)
    every = parts(path, part_rows=3, key="last-dot")
    assert [row["image_id"] for _, samples in every for row in samples.to_pylist()] == [name[:-4] for name in names]
    assert [row[IMAGE] for _, samples in every for row in samples.to_pylist()] == images
    assert {(values["unused_images"], values["unused_example"]) for values, _ in every} == {(0, None)}


def test_an_image_with_dots_in_its_name_is_embedded_by_either_rule(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("22.05.png", PHOTO)])
    assert [(row["image_id"], row[IMAGE]) for row in rows(path)] == [("22", PHOTO)]
    assert [(row["image_id"], row[IMAGE]) for row in rows(path, key="last-dot")] == [("22.05", PHOTO)]


@pytest.mark.parametrize(
    ("names", "settings", "expected"),
    [
        (["rex.jpg", "rex.png"], {}, (1, "rex.png, beside rex.jpg")),
        (["rex.png", "rex.jpg"], {}, (1, "rex.png, beside rex.jpg")),
        (["rex.jpg", "rex.png"], {"key": "last-dot"}, (1, "rex.png, beside rex.jpg")),
        # Who says which member is the image says that the others are not.
        (["rex.jpg", "rex.png"], {"image_member": "jpg"}, (0, None)),
        (["rex.jpg", "rex.mask.png"], {}, (1, "rex.mask.png, beside rex.jpg")),
        (["rex.jpg", "rex.json", "rex.txt"], {}, (0, None)),
        # Of a member that is there twice one is the row's.
        (["rex.jpg", "rex.jpg"], {}, (1, "rex.jpg, beside rex.jpg")),
        # Hidden files are no samples; macOS' own hold no image.
        (["d/.rex.jpg", "a.jpg"], {}, (1, "d/.rex.jpg, which is hidden")),
        (["d/.jpg", "a.jpg"], {}, (1, "d/.jpg, which is hidden")),
        (["d/._rex.jpg", ".DS_Store", "a.jpg"], {}, (0, None)),
        (["a\n\x1b[31m.jpg", "a\n\x1b[31m.png"], {}, (1, "a\\n\\x1b[31m.png, beside a\\n\\x1b[31m.jpg")),
    ],
)
def test_every_image_member_is_a_rows_or_is_counted(
    names: list[str], settings: dict[str, Any], expected: tuple[int, str | None], tmp_path: Path
) -> None:
    path = write_tar(tmp_path / "s.tar", [(name, PHOTO) for name in names])
    ((values, _),) = parts(path, **settings)
    assert (values["unused_images"], values["unused_example"]) == expected


def test_a_part_counts_its_own_image_members_whatever_is_stored(tmp_path: Path) -> None:
    names = ["a.jpg", "a.png", "b.jpg", ".b.jpg", "c.jpg", "c.0.jpg", "c.1.jpg", "d.jpg"]
    path = write_tar(tmp_path / "s.tar", [(name, PHOTO) for name in names])
    every = [values["unused_images"] for values, _ in parts(path, part_rows=1)]
    assert (len(every), sum(every)) == (4, 4)
    for stored in range(4):
        again = {values["part"]: values["unused_images"] for values, _ in parts(path, stored, part_rows=1)}
        assert again == {part: count for part, count in enumerate(every) if part != stored}


@given(st.lists(st.from_regex(r"[ab.]{0,3}\.(jpg|png|JPG|mask\.png|txt)", fullmatch=True), max_size=9))
@settings(max_examples=60, deadline=None)
def test_rows_and_counted_members_are_all_the_image_members_there_are(
    tmp_path_factory: pytest.TempPathFactory, names: list[str]
) -> None:
    path = write_tar(tmp_path_factory.mktemp("shards") / "s.tar", [(name, PHOTO) for name in names])
    num_images = sum(name.endswith(("jpg", "JPG", "png")) and not name.startswith("._") for name in names)
    for key in ("first-dot", "last-dot"):
        found = parts(path, key=key, part_rows=2)
        stood_for = [row["member"] for _, samples in found for row in samples.to_pylist()]
        stood_for = [member for member in stood_for if not member.endswith("txt")]
        assert len(stood_for) + sum(values["unused_images"] for values, _ in found) == num_images


def test_keys_that_are_paths_or_shell_text_are_ids_and_nothing_else(tmp_path: Path) -> None:
    keys = ["../../escape", "/etc/passwd", "$(touch pwned)", "`id`", "a;rm -rf *", "%s%n", "nul", "C:\\x"]
    before = sorted(os.listdir(tmp_path))
    path = write_tar(tmp_path / "s.tar", [(f"{key}.jpg", PHOTO) for key in keys])
    assert [row["image_id"] for row in rows(path)] == keys
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "s.tar"])


def test_reasons_are_short_and_printable_whatever_the_names(tmp_path: Path) -> None:
    names = ["a." + "x" * 60 + "\n\x1b[31m", "b.\udcff", *(f"c.{'y' * 50}{i}" for i in range(40))]
    path = tmp_path / "s.tar"
    path.write_bytes(write_tar(tmp_path / "t.tar", [(name, b"") for name in names]).read_bytes())
    reasons = [row[REASON] for row in rows(path)]
    assert len(reasons) == 3
    assert all(reason.isprintable() and len(reason) < 1000 for reason in reasons)


def test_a_sample_of_too_many_members_is_one_error_in_bounded_memory(tmp_path: Path) -> None:
    names = [f"a.{i}" for i in range(MAX_SAMPLE_MEMBERS + 5)]
    path = write_tar(tmp_path / "s.tar", [("a.jpg", PHOTO), *((name, b"") for name in names), ("b.jpg", PHOTO)])
    assert [row[REASON] for row in rows(path)] == ["too many members: more than 10000", None]
