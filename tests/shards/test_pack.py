from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from shard_embedder.jobs.pack import main, parse_bytes
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import InputError, OutputError, SettingsError
from shard_embedder.pipeline.core.schema import SAMPLES
from shard_embedder.pipeline.shards.find import Pending, find_shards
from shard_embedder.pipeline.shards.keys import split_key
from shard_embedder.pipeline.shards.pack import PackConfig, find_images, make_key, pack
from shard_embedder.pipeline.shards.samples import SampleReader
from tests.conftest import ROOT, encode, hearing_sigint, photo

PHOTO = encode(photo(1))


def write_files(folder: Path, *paths: str, data: bytes = PHOTO) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def write_dogs_and_cats(folder: Path) -> Path:
    write_files(folder, "cats/tom.jpg", data=encode(photo(2)))
    write_files(folder, "dogs/rex.JPEG", data=encode(photo(3)))
    write_files(folder, "dogs/small/pip.png", data=encode(photo(4), "PNG"))
    return write_files(folder, "stray.webp", data=encode(photo(5), "WEBP"))


def pack_all(folder: Path, shards: Path, **settings: Any) -> list[Path]:
    config = PackConfig(folder=folder, shards=shards, **settings)
    packed = pack(config, find_images(folder, config.extensions))
    return [shards / name for name in packed.names]


def members(paths: list[Path]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for info in tar:
                assert info.name not in found
                found[info.name] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return found


def rows(paths: list[Path]) -> list[dict[str, Any]]:
    """What the pipeline itself reads of shards."""
    reader = SampleReader(Config(input=("x",), output="y"))
    parts = []
    for shard in find_shards(map(str, paths)).shards:
        for part in reader.parts(Pending(*shard)):
            assert part["fault"].to_pylist() == [None]
            parts.append(part)
    return [row for part in parts for row in part[SAMPLES].to_pylist()[0]]


def keys(folder: Path) -> list[str]:
    return [image.key for image in find_images(folder).images]


def test_each_image_becomes_a_sample_with_its_bytes_untouched_its_class_and_its_path(tmp_path: Path) -> None:
    folder = write_dogs_and_cats(tmp_path / "in")
    found = members(pack_all(folder, tmp_path / "out"))
    assert found.pop("cats/tom.jpg") == (folder / "cats/tom.jpg").read_bytes()
    assert found.pop("dogs/rex.jpeg") == (folder / "dogs/rex.JPEG").read_bytes()
    assert found.pop("dogs/small/pip.png") == (folder / "dogs/small/pip.png").read_bytes()
    assert found.pop("stray.webp") == (folder / "stray.webp").read_bytes()
    assert {name: json.loads(data) for name, data in found.items()} == {
        "cats/tom.cls": 0,
        "cats/tom.json": {"path": "cats/tom.jpg", "class": "cats"},
        "dogs/rex.cls": 1,
        "dogs/rex.json": {"path": "dogs/rex.JPEG", "class": "dogs"},
        "dogs/small/pip.cls": 2,
        "dogs/small/pip.json": {"path": "dogs/small/pip.png", "class": "dogs/small"},
        "stray.json": {"path": "stray.webp", "class": None},
    }


def test_the_pipeline_and_webdataset_read_the_same_samples_back(tmp_path: Path) -> None:
    shards = pack_all(write_dogs_and_cats(tmp_path / "in"), tmp_path / "out", max_samples=3)
    assert len(shards) == 2
    expected = ["cats/tom", "dogs/rex", "dogs/small/pip", "stray"]
    read = rows(shards)
    assert [row["image_id"] for row in read] == expected
    assert all(row["image"] for row in read)
    dataset = webdataset.WebDataset([str(path) for path in shards], shardshuffle=False)
    with warnings.catch_warnings():
        # webdataset leaves its files to Python's search for garbage.
        warnings.simplefilter("ignore", ResourceWarning)
        assert [sample["__key__"] for sample in dataset] == expected
        gc.collect()


def test_the_same_folder_packs_to_the_same_bytes_whatever_its_files_modification_times(tmp_path: Path) -> None:
    folder = write_dogs_and_cats(tmp_path / "in")
    first = [path.read_bytes() for path in pack_all(folder, tmp_path / "a", max_samples=2)]
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700)
    assert [path.read_bytes() for path in pack_all(folder, tmp_path / "b", max_samples=2)] == first


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a/plain.jpg", "a/plain"),
        ("two words/Größe 日本.jpg", "two words/Größe 日本"),
        ("v1.0/photo.v2.final.jpg", "v1.0/photo%2Ev2%2Efinal"),
        ("100%/a~b.jpg", "100%25/a%7Eb"),
        ("line\nbreak\\.jpg", "line%0Abreak%5C"),
    ],
)
def test_a_key_keeps_folders_and_escapes_what_would_break_it(tmp_path: Path, path: str, key: str) -> None:
    folder = write_files(tmp_path / "in", path)
    assert keys(folder) == [key]
    assert unquote(key) == os.path.splitext(path)[0]
    assert [row["image_id"] for row in rows(pack_all(folder, tmp_path / "out"))] == [key]


def test_names_that_are_not_utf_8_are_packed_too(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", os.fsdecode(b"caf\xe9/\xff.jpg"))
    assert rows(pack_all(folder, tmp_path / "out"))[0]["image_id"] == "caf%E9/%FF"


def test_images_that_differ_only_in_their_extension_stay_apart(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg", "a.JPG", "a.png", "a.jpg.png", "a~jpg.png", "a%2Ejpg.gif", "b.png")
    expected = ["a%252Ejpg", "a~JPG", "a~jpg", "a%2Ejpg", "a~png", "a%7Ejpg", "b"]
    assert keys(folder) == expected
    read = rows(pack_all(folder, tmp_path / "out"))
    assert [row["image_id"] for row in read] == expected
    assert [row["reason"] for row in read] == [None] * len(expected)


_NAMES = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]) | st.sampled_from(".%~\\ é\udce9\u200b"),
    min_size=1,
    max_size=6,
).filter(lambda name: not name.startswith("."))
_STEMS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)


@given(_STEMS, _STEMS)
def test_any_path_has_a_key_that_is_valid_its_own_and_readable(one: str, other: str) -> None:
    assert split_key(f"{make_key(one)}.jpg") == (make_key(one), "jpg")
    assert (make_key(one) == make_key(other)) == (one == other)
    assert make_key(one).isprintable()


def test_a_shard_holds_at_most_max_samples(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", *(f"{i}.jpg" for i in range(7)))
    shards = pack_all(folder, tmp_path / "out", max_samples=3, prefix="x")
    assert [path.name for path in shards] == ["x-00000.tar", "x-00001.tar", "x-00002.tar"]
    assert [len(rows([path])) for path in shards] == [3, 3, 1]


@pytest.mark.parametrize("max_samples", [4, 10_000])
def test_a_shard_is_at_most_max_bytes_unless_one_image_alone_is_more(tmp_path: Path, max_samples: int) -> None:
    folder = tmp_path / "in"
    for i in range(40):
        # A long name has a header of its own, of 1024 bytes and more.
        write_files(folder, f"{i:02d}{'-long' * (i % 3 * 15)}.jpg", data=bytes(i * 300))
    write_files(folder, "20-large.jpg", data=bytes(50_000))
    shards = pack_all(folder, tmp_path / "out", max_bytes=40_960, max_samples=max_samples)
    sizes = [(path.stat().st_size, len(rows([path]))) for path in shards]
    assert sum(count for _, count in sizes) == 41
    assert [count for size, count in sizes if size > 40_960] == [1]
    # A shard is filled: the next sample would not have fitted, unless there were enough.
    fills = [size for size, count in sizes[:-1] if count < max_samples]
    assert fills == [size for size in fills if size >= 20_480]


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg", "notes.txt", "more.TXT", "README", "._a.jpg", ".thumbs/a.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "up").symlink_to(folder)
    found = find_images(folder)
    assert [image.path for image in found.images] == ["a.jpg"]
    assert found.left_out == {
        ".txt": 2,
        "without an extension": 1,
        "hidden": 2,
        "broken links and special files": 2,
        "links to a folder that holds them": 1,
    }


def test_links_to_images_and_folders_are_followed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg")
    elsewhere = write_files(folder / "elsewhere", "b.jpg")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "c.jpg").symlink_to("elsewhere/b.jpg")
    assert keys(folder) == ["a", "c", "elsewhere/b", "linked/b"]


def test_links_out_of_the_folder_are_followed_only_when_asked(tmp_path: Path) -> None:
    elsewhere = write_files(tmp_path / "in-another", "b.jpg")
    folder = write_files(tmp_path / "in", "a.jpg")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "c.jpg").symlink_to("../in-another/b.jpg")
    found = find_images(folder)
    assert [image.path for image in found.images] == ["a.jpg"]
    assert found.left_out == {"links out of the folder": 2}
    assert [image.path for image in find_images(folder, follow_links=True).images] == [
        "a.jpg",
        "c.jpg",
        "linked/b.jpg",
    ]


def test_links_in_linked_folders_do_not_double_the_walk_without_end(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg")
    for number in range(40):
        (folder / f"d{number}").mkdir()
        for name in ("x", "y"):
            (folder / f"d{number}" / name).symlink_to(f"../d{number + 1}")
    write_files(folder / "d40", "b.jpg")
    with pytest.raises(InputError, match="links that lead in more than 1000 ways to"):
        find_images(folder)


def test_only_the_asked_extensions_are_packed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg", "b.PNG", "c.gif")
    found = find_images(folder, ("png",))
    assert [image.key for image in found.images] == ["b"]
    assert found.left_out == {".jpg": 1, ".gif": 1}


def test_an_empty_or_broken_image_is_packed_as_it_is(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "empty.jpg", data=b"")
    write_files(folder, "broken.png", data=b"not a PNG")
    assert [row["image"] for row in rows(pack_all(folder, tmp_path / "out"))] == [b"not a PNG", b""]


def test_a_folder_of_shards_with_a_percent_sign_works(tmp_path: Path) -> None:
    shards = pack_all(write_files(tmp_path / "in", "a.jpg"), tmp_path / "100%d out")
    assert [path.parent.name for path in shards] == ["100%d out"]
    assert len(rows(shards)) == 1


def test_shards_are_replaced_only_when_asked_and_only_those_of_the_prefix(tmp_path: Path) -> None:
    shards = tmp_path / "out"
    pack_all(write_files(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg"), shards, max_samples=1)
    again = write_files(tmp_path / "other", "d.jpg")
    before = {path: path.read_bytes() for path in shards.iterdir()}
    with pytest.raises(OutputError, match=r"SHARDS must hold no shards, got 3 in .*images-00000.tar"):
        pack_all(again, shards)
    with pytest.raises(OutputError, match=r"--overwrite replaces pets-\*.tar only, got 3 others"):
        pack_all(again, shards, prefix="pets", overwrite=True)
    assert {path: path.read_bytes() for path in shards.iterdir()} == before
    pack_all(again, shards, overwrite=True)
    assert [path.name for path in shards.iterdir()] == ["images-00000.tar"]
    assert [row["image_id"] for row in rows([shards / "images-00000.tar"])] == ["d"]


def test_an_image_that_vanishes_leaves_the_old_shards_and_no_others(tmp_path: Path) -> None:
    folder, shards = write_files(tmp_path / "in", "a.jpg", "b.jpg"), tmp_path / "out"
    pack_all(folder, shards, max_samples=1)
    before = {path: path.read_bytes() for path in shards.iterdir()}
    config = PackConfig(folder=folder, shards=shards, max_samples=1, overwrite=True)
    found = find_images(folder)
    (folder / "b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg"):
        pack(config, found)
    assert {path: path.read_bytes() for path in shards.iterdir()} == before


@pytest.fixture(scope="module")
def thousands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that takes seconds to pack."""
    folder = write_files(tmp_path_factory.mktemp("thousands"), "a.jpg")
    for i in range(10_000):
        (folder / f"{i}.jpg").hardlink_to(folder / "a.jpg")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_pack_that_is_stopped_leaves_nothing_that_looks_like_a_shard(
    thousands: Path, tmp_path: Path, number: int
) -> None:
    shards = tmp_path / "out"
    command = [sys.executable, ROOT / "jobs/pack.py", thousands, shards, "--max-samples", "50"]
    with hearing_sigint():
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(shards.glob(".packing-*/*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(30) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    with pytest.raises(InputError, match=r"no \.tar shard found"):
        find_shards([str(shards)])
    assert len(rows(pack_all(write_files(tmp_path / "few", "a.jpg", "b.jpg"), shards))) == 2
    assert [path.name for path in shards.iterdir()] == ["images-00000.tar"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "FOLDER must be a folder of images, got '.*': it is missing"),
        (lambda folder: folder.write_bytes(b""), "FOLDER must be a folder of images, got '.*': it is a file"),
        (lambda folder: folder.mkdir(), "FOLDER must hold images .*, got none in '.*' in it or below it"),
        (
            lambda folder: write_files(folder, "a.txt", "b.txt"),
            "got none in .*left out, as no images, 2 files: 2 .txt",
        ),
    ],
)
def test_a_folder_without_images_is_refused(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    make(tmp_path / "in")
    with pytest.raises(InputError, match=message):
        find_images(tmp_path / "in")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"prefix": "a/b"}, "prefix must be letters, digits, .*, got 'a/b'"),
        ({"prefix": ".a"}, "prefix must be .*, got '.a'"),
        ({"extensions": ("jpg", "psd")}, "extensions must be of jpg, jpeg, .*, got 'psd'"),
        ({"shards": Path("s3://bucket/x")}, "SHARDS must be a folder on this machine, got 's3://bucket/x'"),
    ],
)
def test_settings_that_break_a_rule_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        PackConfig(**{"folder": Path("a"), "shards": Path("b"), **settings})


@pytest.mark.parametrize(("arguments", "name"), [(["", "x"], "FOLDER"), (["photos", ""], "SHARDS")])
def test_an_empty_path_is_not_taken_for_the_current_folder(
    arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(write_files(tmp_path, "photos/a.jpg"))
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert f"argument {name}: must not be empty, got ''" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.tar")) == []


def test_sizes_are_read_with_and_without_units() -> None:
    assert [parse_bytes(text) for text in ("5", "2KiB", "3 mib", "1GiB")] == [5, 2048, 3 * 2**20, 2**30]
    for text in ("", "1GB", "-1", "1.5MiB"):
        with pytest.raises(SettingsError, match="max_bytes must be N, NKiB, NMiB or NGiB"):
            parse_bytes(text)


def test_the_command_tells_what_it_packed_and_what_it_left_out(tmp_path: Path, run_job: Callable[..., Any]) -> None:
    write_files(write_dogs_and_cats(tmp_path / "in"), "notes.txt")
    done = run_job("pack.py", "in", "out", "--max-samples", 3, "--extensions", ".JPG", "jpeg", "png")
    assert (done.returncode, done.stderr) == (0, "")
    assert "packed 3 images" in done.stdout
    assert "of 3 classes" in done.stdout
    assert "into   1 shard in out: images-00000.tar" in done.stdout
    assert "left out, as no images, 2 files: 1 .webp, 1 .txt" in done.stdout.replace(
        "1 .txt, 1 .webp", "1 .webp, 1 .txt"
    )


def test_the_command_ends_with_2_where_it_cannot_start_and_with_4_where_it_fails(
    tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    done = run_job("pack.py", "nowhere", "out")
    assert done.returncode == 2
    assert done.stderr == "pack.py: FOLDER must be a folder of images, got 'nowhere': it is missing\n"
    write_files(tmp_path / "in", "a.jpg")
    (tmp_path / "file").write_bytes(b"")
    failed = run_job("pack.py", "in", "file/below")
    assert failed.returncode == 4
    assert "file" in failed.stderr
    assert "Traceback" not in failed.stderr
