"""Samples and parts: keys, fields, and parts that are the same in every run."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from shard_embedder.pipeline.core.config import Config, Field
from shard_embedder.pipeline.core.schema import IMAGE, REASON, SHARD_SCHEMA, UNKNOWN_INDEX, part_rows
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.shards import samples as samples_module
from shard_embedder.pipeline.shards.fields import kept_value
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.grouping import MAX_SAMPLE_MEMBERS
from shard_embedder.pipeline.shards.keys import IMAGE_EXTENSIONS, image_rank, split_key
from shard_embedder.pipeline.shards.samples import SampleReader
from tests.conftest import encode, photo, sample_members, write_tar

PHOTO = encode(photo(1, (24, 20)))
JSON_DEPTHS = (100_000, 5_000, *range(100, 1100, 50))


def make_config(**settings: Any) -> Config:
    for name in ("keep", "id"):
        if name in settings:
            specs = settings[name]
            settings[name] = Field.parse(specs) if name == "id" else tuple(Field.parse(spec) for spec in specs)
    return Config(input=("x",), output="y", **settings)


def pending(path: Path, *stored: int) -> Pending:
    info = stat(*locate(str(path)))
    return Pending("shard", str(path), info.num_bytes, info.version, stored)


def parts(path: Path, *stored: int, **settings: Any) -> list[tuple[dict[str, Any], pa.StructArray]]:
    reader = SampleReader(make_config(**settings))
    return [part for table in reader.parts(pending(path, *stored)) for part in part_rows(table)]


def rows(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [row for _, samples in parts(path, **settings) for row in samples.to_pylist()]


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith("_s")}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Ten samples."""
    return write_tar(tmp_path / "ten.tar", [member for i in range(10) for member in sample_members(f"{i:04d}", i)])


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


# Members that do not stand side by side


def photos_and_texts(count: int) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    texts = [(f"d/{i}.json", json.dumps({"id": f"p{i}"}).encode()) for i in range(count)]
    return [(f"d/{i}.jpg", PHOTO) for i in range(count)], texts


@given(st.permutations(range(12)))
@settings(max_examples=60, deadline=None)
def test_in_whatever_order_the_members_stand_every_image_is_embedded_once(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    photos, texts = photos_and_texts(6)
    members = [[*photos, *texts][position] for position in order]
    path = write_tar(tmp_path_factory.mktemp("shards") / "s.tar", members)
    found = parts(path, part_rows=4, keep=["json:id"])
    got = [row for _, samples in found for row in samples.to_pylist()]
    embedded = [row for row in got if row[REASON] is None]
    assert sorted(row["image_id"] for row in embedded) == [f"d/{i}" for i in range(6)]
    names = [name for name, _ in members]
    beside = [f"d/{i}" for i in range(6) if abs(names.index(f"d/{i}.jpg") - names.index(f"d/{i}.json")) == 1]
    # Beside its image a member is of its sample; apart it is a row of its own that says so.
    assert {row["image_id"]: row["keep:id"] for row in embedded} == {
        f"d/{i}": f"p{i}" if f"d/{i}" in beside else None for i in range(6)
    }
    errors = [row for row in got if row[REASON] is not None]
    assert sorted(row["image_id"] for row in errors) == sorted({f"d/{i}" for i in range(6)} - {*beside})
    assert {row[REASON].partition(":")[0] for row in errors} <= {"no image", "members apart"}
    assert all("tar --sort=name" in row[REASON] for row in errors)
    assert sum(values["apart_samples"] for values, _ in found) == 6 - len(beside)


def test_an_image_whose_id_stands_apart_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    photos, texts = photos_and_texts(2)
    for members, kind in (([*photos, *texts], "members apart"), ([*texts, *photos], "no image")):
        found = rows(write_tar(tmp_path / "s.tar", members), id="json:id")
        reasons = {row["member"]: row[REASON] for row in found}
        for name, _ in photos:
            assert reasons[name] == (
                "no id: json:id is missing, not text or an integer; it has no json beside it: "
                "members of a sample must stand side by side, as `tar --sort=name` puts them"
            )
        assert {reasons[name].partition(":")[0] for name, _ in texts} == {kind}


def test_metadata_without_an_image_takes_neither_a_key_nor_an_id(tmp_path: Path) -> None:
    own = b'{"id": "one"}'
    path = write_tar(tmp_path / "s.tar", [("a.json", own), ("b.jpg", PHOTO), ("b.json", own), ("b.txt", b"")])
    assert [(row["image_id"], row[REASON] is None) for row in rows(path, id="json:id")] == [
        ("one", False),
        ("one", True),
    ]


# Parts


@pytest.mark.parametrize("part_rows_", [1, 2, 3, 5, 9, 10, 11, 1000])
def test_part_boundaries_depend_on_part_rows_alone(shard: Path, part_rows_: int) -> None:
    found = parts(shard, part_rows=part_rows_)
    sizes = [part_rows_] * (10 // part_rows_) + ([10 % part_rows_] if 10 % part_rows_ else [])
    assert [len(samples) for _, samples in found] == sizes
    assert [values["num_samples"] for values, _ in found] == sizes
    assert [values["first_index"] for values, _ in found] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert [values["part"] for values, _ in found] == list(range(len(sizes)))
    assert [values["end"] for values, _ in found] == [""] * (len(sizes) - 1) + ["last"]
    assert [row["image_id"] for _, samples in found for row in samples.to_pylist()] == [f"{i:04d}" for i in range(10)]


@pytest.mark.parametrize("stored", [(0,), (1, 2), (0, 1, 2), (3,), (0, 1, 2, 3)])
def test_stored_parts_are_left_out_and_the_others_are_unchanged(shard: Path, stored: tuple[int, ...]) -> None:
    every = parts(shard, part_rows=3, keep=["cls", "json:caption"])
    some = parts(shard, *stored, part_rows=3, keep=["cls", "json:caption"])
    expected = [part for part in every if part[0]["part"] not in stored]
    assert [without_times(values) for values, _ in some] == [without_times(values) for values, _ in expected]
    assert all(ours.equals(theirs) for (_, ours), (_, theirs) in zip(some, expected, strict=True))


def test_parts_are_the_same_in_every_run_but_for_their_times(shard: Path) -> None:
    first, second = (parts(shard, part_rows=4, keep=["cls"], id="json:id") for _ in range(2))
    assert [without_times(values) for values, _ in first] == [without_times(values) for values, _ in second]
    assert all(a.equals(b) for (_, a), (_, b) in zip(first, second, strict=True))
    assert all(values["read_s"] > 0 for values, _ in first)
    assert sum(values["read_bytes"] for values, _ in first) == shard.stat().st_size


def test_many_shards_in_one_task_give_the_parts_of_each(shard: Path, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "other.tar", sample_members("x", 1))
    shards = [pending(shard)._asdict(), pending(other, 0)._asdict() | {"name": "other"}]
    tables = SampleReader(make_config(part_rows=6))(pa.Table.from_pylist(shards, schema=SHARD_SCHEMA))
    found = [(values["name"], values["num_samples"]) for table in tables for values, _ in part_rows(table)]
    assert found == [("shard", 6), ("shard", 4)]


def test_a_part_ends_early_where_its_images_would_take_too_much_memory(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = [len(row[IMAGE]) + len(row["image_id"]) + len(row["member"]) for row in rows(shard)]
    monkeypatch.setattr(samples_module, "MAX_PART_BYTES", max(row_bytes) + 1)
    found = parts(shard, part_rows=9)
    assert [values["num_samples"] for values, _ in found] == [2] * 5
    assert [row["image_id"] for _, samples in found for row in samples.to_pylist()] == [f"{i:04d}" for i in range(10)]


@pytest.mark.parametrize("keep", [[], ["cls"], ["cls", "json:a.b=float64", "txt"]])
def test_an_empty_shard_is_one_part_of_no_samples_with_all_columns(tmp_path: Path, keep: list[str]) -> None:
    ((values, samples),) = parts(write_tar(tmp_path / "s.tar", []), keep=keep)
    assert (values["end"], values["num_samples"], len(samples)) == ("last", 0, 0)
    ((_, full),) = parts(write_tar(tmp_path / "t.tar", sample_members("a", 1)), keep=keep)
    assert samples.type == full.type


def test_a_shard_that_changed_since_it_was_planned_is_void(shard: Path) -> None:
    planned = pending(shard)
    write_tar(shard, sample_members("other", 1))
    found = [part for table in SampleReader(make_config()).parts(planned) for part in part_rows(table)]
    ((values, samples),) = found
    assert (values["end"], len(samples), values["fault_transient"]) == ("broken", 0, True)
    assert values["fault"].startswith("changed while it was read: ")


def test_a_fault_before_the_end_of_what_is_stored_is_a_part_of_its_own_after_it(shard: Path) -> None:
    planned = pending(shard, 0, 1)._replace(version="replaced since")
    reader = SampleReader(make_config(part_rows=4))
    ((values, samples),) = [part for table in reader.parts(planned) for part in part_rows(table)]
    assert (values["part"], values["end"], len(samples)) == (2, "broken", 0)
    assert values["first_index"] == UNKNOWN_INDEX
    assert values["fault"].startswith("changed while it was read: ")


# Fields


def field(data: bytes | None, spec: str, tmp_path: Path, member: str = "json") -> tuple[Any, int]:
    """What `--keep SPEC` makes of a member's bytes, and how many values were lost."""
    members = [("a.jpg", PHOTO), *([] if data is None else [(f"a.{member}", data)])]
    ((values, samples),) = parts(write_tar(tmp_path / "s.tar", members), keep=[spec])
    (row,) = samples.to_pylist()
    assert row[REASON] is None
    (column,) = [name for name in row if name.startswith("keep:")]
    return row[column], values["kept_nulls"]


DOCUMENT = json.dumps({
    "text": "hé", "int": 7, "float": 0.5, "yes": True, "null": None, "list": [1, "é"], "a": {"b": {"c": "deep"}},
    "": "unnamed", "number": "12",
}).encode()  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("json:text", ("hé", 0)),
        ("json:text=int64", (None, 1)),
        ("json:int=int64", (7, 0)),
        ("json:int=float64", (7.0, 0)),
        ("json:int", (None, 1)),
        ("json:int=bool", (None, 1)),
        ("json:float=float64", (0.5, 0)),
        ("json:float=int64", (None, 1)),
        ("json:yes=bool", (True, 0)),
        ("json:yes=int64", (None, 1)),
        ("json:yes=float64", (None, 1)),
        ("json:null", (None, 0)),
        ("json:absent", (None, 0)),
        ("json:text.absent", (None, 0)),
        ("json:a.b.c", ("deep", 0)),
        ("json:a.b", (None, 1)),
        ("json:a.b=json", ('{"c": "deep"}', 0)),
        ("json:list=json", ('[1, "é"]', 0)),
        ("json:number=int64", (None, 1)),
    ],
)
def test_a_json_field_has_its_declared_type_or_is_null_and_counted(
    spec: str, expected: tuple[Any, int], tmp_path: Path
) -> None:
    assert field(DOCUMENT, spec, tmp_path) == expected


@pytest.mark.parametrize(
    ("member", "spec", "data", "expected"),
    [
        ("cls", "cls", b"3", (3, 0)),
        ("cls", "cls", b" -12\n", (-12, 0)),
        ("cls", "cls", b"cat", (None, 1)),
        ("cls", "cls", b"1_0", (None, 1)),
        ("cls", "cls", "\uff11\uff12".encode(), (None, 1)),
        ("cls", "cls", b"", (None, 1)),
        ("cls", "cls", b"99999999999999999999", (None, 1)),
        ("cls", "cls", b"9" * 100_000, (None, 1)),
        ("cls", "cls=string", b"cat\n", ("cat", 0)),
        ("cls", "cls=float64", b"1e3", (1000.0, 0)),
        ("cls", "cls=bool", b"true", (True, 0)),
        ("CLS", "cls", b"3", (3, 0)),
        ("txt", "txt", "a café\r\n".encode(), ("a café", 0)),
        ("txt", "txt", "a café".encode("latin-1"), (None, 1)),
        ("txt", "txt", b"", ("", 0)),
        ("txt", "txt", "\ufeffa \ufeffcaf\u00e9".encode(), ("a \ufeffcaf\u00e9", 0)),
        ("cls", "cls", b"\xef\xbb\xbf3", (3, 0)),
        ("txt", "txt", b"a\0b", ("a\0b", 0)),
        ("txt", "txt", None, (None, 0)),
        ("meta.json", "meta.json:x=int64", b'{"x": 1}', (1, 0)),
    ],
)
def test_members_of_text_and_numbers_are_kept_by_their_type(
    member: str, spec: str, data: bytes | None, expected: tuple[Any, int], tmp_path: Path
) -> None:
    assert field(data, spec, tmp_path, member) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe\xfd",
        b'{"x": 1}trailing',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": "' + b"y" * (16 * 2**20) + b'"}',
        pickle.dumps({"x": 1}),
        *(b'{"x": ' + b"[" * depth for depth in JSON_DEPTHS[:2]),
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=range(11),
)
def test_json_that_cannot_be_read_costs_the_field_and_not_the_image(data: bytes, tmp_path: Path) -> None:
    assert field(data, "json:x=json", tmp_path) == (None, 1)


@pytest.mark.parametrize("depth", JSON_DEPTHS)
def test_json_of_any_depth_is_kept_or_null(depth: int, tmp_path: Path) -> None:
    text = "[" * depth + "]" * depth
    value, lost = field(b'{"x": ' + text.encode() + b"}", "json:x=json", tmp_path)
    assert (value, lost) in ((text, 0), (None, 1))


@pytest.mark.parametrize(
    ("data", "spec", "expected"),
    [
        (b'{"x": NaN}', "json:x=json", (None, 1)),
        (b'{"x": [1, Infinity]}', "json:x=json", (None, 1)),
        (b'{"x": -Infinity}', "json:x=float64", (float("-inf"), 0)),
        (b'{"x": 1e999}', "json:x=float64", (float("inf"), 0)),
        (b'{"x": 9223372036854775807}', "json:x=int64", (2**63 - 1, 0)),
        (b'{"x": 9223372036854775808}', "json:x=int64", (None, 1)),
        (b'{"x": ' + b"9" * 400 + b"}", "json:x=float64", (None, 1)),
        (b'{"x": ' + b"9" * 400 + b"}", "json:x=json", ("9" * 400, 0)),
        (rb'{"x": "\ud800"}', "json:x", (None, 1)),
        (rb'{"x": "\ud83d\ude00"}', "json:x", ("\U0001f600", 0)),
        (rb'{"x": ["\ud800"]}', "json:x=json", (None, 1)),
        (b'{"x": "\xed\xa0\x80"}', "json:x", (None, 1)),
        (b'\xef\xbb\xbf{"x": 1}', "json:x=int64", (1, 0)),
        ('{"x": "é"}'.encode("utf-16"), "json:x", ("é", 0)),
        (b'{"x": 1, "x": 2}', "json:x=int64", (2, 0)),
        (b'["x"]', "json:x", (None, 0)),
        (b'"x"', "json", ('"x"', 0)),
        (b"null", "json", (None, 0)),
    ],
)
def test_odd_values_of_json_are_kept_or_null_and_counted(
    data: bytes, spec: str, expected: tuple[Any, int], tmp_path: Path
) -> None:
    assert field(data, spec, tmp_path) == expected


def test_a_field_whose_member_is_above_the_limit_is_null_and_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"x" * 10), ("a.json", b'{"x": "' + b"y" * 100 + b'"}')])
    ((values, samples),) = parts(path, keep=["json:x"], max_image_bytes=50)
    assert (samples.field("keep:x").to_pylist(), values["kept_nulls"]) == ([None], 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(json_values, st.sampled_from(["string", "int64", "float64", "bool", "json"]))
def test_any_value_becomes_one_that_arrow_takes_or_null(value: Any, kind: str) -> None:
    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "json": pa.string(),
    }
    kept, lost = kept_value(value, kind)
    assert pa.array([kept], types[kind]).to_pylist() == pytest.approx([kept], nan_ok=True)
    assert lost == (kept is None and value is not None)
    if kind == "json" and kept is not None:
        assert json.loads(kept) == value


def test_a_part_ends_early_where_its_texts_would_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [
        (f"{i}.{kind}", data) for i in range(6) for kind, data in (("jpg", PHOTO), ("txt", "ü".encode() * 5000))
    ]
    path = write_tar(tmp_path / "s.tar", members)
    monkeypatch.setattr(samples_module, "MAX_PART_BYTES", 20_000)
    assert [values["num_samples"] for values, _ in parts(path)] == [6]
    assert [values["num_samples"] for values, _ in parts(path, keep=["txt"])] == [2, 2, 2]


# Ids of the user


def test_a_key_that_stands_in_for_a_missing_id_is_nobodys_id(tmp_path: Path) -> None:
    documents = [b"{}", b'{"id": 1}', b'{"id": "4"}', b"broken", b'{"id": 4}']
    members = [
        member
        for key, document in enumerate(documents, 1)
        for member in ((f"{key}.jpg", PHOTO), (f"{key}.json", document))
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    found = [(row["image_id"], row[REASON] and row[REASON].partition(":")[0]) for row in rows(shard, id="json:id")]
    assert found == [("1", "no id"), ("1", None), ("4", None), ("4", "broken json"), ("4", "repeated id")]


def ids(data: bytes | None, tmp_path: Path) -> tuple[str, str | None]:
    members = [("a.jpg", PHOTO), *([] if data is None else [("a.json", data)])]
    (row,) = rows(write_tar(tmp_path / "s.tar", members), id="json:id")
    assert (row[IMAGE] is None) == (row[REASON] is not None)
    return row["image_id"], row[REASON] and row[REASON].partition(":")[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"id": "photo-1"}', ("photo-1", None)),
        (b'{"id": 17}', ("17", None)),
        (b'{"id": 123456789012345678901234567890}', ("123456789012345678901234567890", None)),
        (b'{"id": "../x; $(id)"}', ("../x; $(id)", None)),
        (b'{"id": ""}', ("a", "no id")),
        (b'{"id": null}', ("a", "no id")),
        (b'{"id": true}', ("a", "no id")),
        (b'{"id": 1.5}', ("a", "no id")),
        (b'{"id": [1]}', ("a", "no id")),
        (rb'{"id": "\ud800"}', ("a", "no id")),
        (b"{}", ("a", "no id")),
        (b"[", ("a", "broken json")),
        (b"[" * 100_000, ("a", "broken json")),
        (None, ("a", "no id")),
    ],
)
def test_an_id_is_the_users_or_the_sample_is_an_error(
    data: bytes | None, expected: tuple[str, str | None], tmp_path: Path
) -> None:
    assert ids(data, tmp_path) == expected


def test_an_id_that_is_too_large_to_read_is_an_error(tmp_path: Path) -> None:
    assert ids(b'{"id": "' + b"y" * (16 * 2**20) + b'"}', tmp_path) == ("a", "metadata too large")


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_pickles_of_every_extension_are_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary))
    extensions = ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "tb", "json", "cls", "txt", "mp", "cbor"]
    members = [(f"a.{extension}", data) for extension in extensions]
    keep = [f"{extension}=json" for extension in extensions if extension != "json"]
    path = write_tar(tmp_path / "s.tar", [("a.jpg", PHOTO), *members, ("b.pkl.jpg", data)])
    found = rows(path, keep=[*keep, "json"], id="json:id")
    assert [row["image_id"] for row in found] == ["a", "b"]
    assert not canary.exists()
    pickle.load(io.BytesIO(data)).close()
    assert canary.exists()
