"""A folder of images as shards below an output, which follow the folder from run to run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from shard_embedder.pipeline.core.errors import InputError, OutputError, StoredDataError
from shard_embedder.pipeline.shards.photos import PackingRules, Photos, find_photos, pack_photos
from tests.conftest import encode, photo
from tests.shards.test_pack import PHOTO, members, write_files

TWO = PackingRules(max_samples=2)


def pack_again(folder: Path, output: Path, rules: PackingRules = TWO) -> Photos:
    found = find_photos(folder, output, rules)
    pack_photos(found)
    return found


def packed(output: Path) -> dict[str, set[str]]:
    """The paths that the samples of each shard name."""
    return {
        path.stem: {json.loads(data)["path"] for name, data in members([path]).items() if name.endswith(".json")}
        for path in sorted((output / "packed").glob("*.tar"))
    }


def times(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "packed").glob("*.tar")}


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """Three images in two shards."""
    folder, output = write_files(tmp_path / "in", "a/x.jpg", "a/y.v1.2.jpg", "b.jpg"), tmp_path / "out"
    found = pack_again(folder, output)
    assert (found.num_new, found.num_changed, found.num_deleted) == (3, 0, 0)
    assert (
        str(found) == f"3 images of {folder} ({3 * len(PHOTO) / 1024:.1f} KiB) into 2 shards in {output / 'packed'}"
    )
    return folder, output


Places = tuple[Path, Path]


def test_images_are_packed_once(places: Places) -> None:
    folder, output = places
    before = times(output)
    assert packed(output) == {"images-00000": {"a/x.jpg", "a/y.v1.2.jpg"}, "images-00001": {"b.jpg"}}
    assert str(pack_again(folder, output)) == f"3 images of {folder}, all in {output / 'packed'}"
    assert times(output) == before


def test_new_images_get_new_shards_and_the_others_stay(places: Places) -> None:
    folder, output = places
    before = times(output)
    write_files(folder, "0.jpg", "c/z.png")
    found = pack_again(folder, output)
    assert str(found).startswith("2 of 5 images of ")
    assert str(found).endswith(": 2 new")
    assert packed(output)["images-00002"] == {"0.jpg", "c/z.png"}
    assert {name: times(output)[name] for name in before} == before


def test_a_changed_or_deleted_image_has_its_shard_alone_written_again(places: Places) -> None:
    folder, output = places
    before = times(output)
    (folder / "a/x.jpg").write_bytes(encode(photo(9)))
    (folder / "a/y.v1.2.jpg").unlink()
    found = pack_again(folder, output)
    assert (found.num_new, found.num_changed, found.num_deleted) == (0, 1, 1)
    assert packed(output)["images-00000"] == {"a/x.jpg"}
    assert members([output / "packed/images-00000.tar"])["a/x.jpg"] == encode(photo(9))
    assert times(output)["images-00001.tar"] == before["images-00001.tar"]


def test_a_shard_whose_images_are_all_deleted_becomes_empty_so_that_their_rows_go(places: Places) -> None:
    folder, output = places
    shutil.rmtree(folder / "a")
    assert pack_again(folder, output).num_deleted == 2
    assert packed(output) == {"images-00000": set(), "images-00001": {"b.jpg"}}
    assert not find_photos(folder, output).to_write


def test_an_image_with_another_time_and_the_same_bytes_changes_no_shard(places: Places) -> None:
    folder, output = places
    before = times(output)
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1, 1))
    assert pack_again(folder, output).num_changed == 3
    assert times(output) == before
    assert not find_photos(folder, output).to_write


def test_what_a_death_leaves_is_packed_again(places: Places, tmp_path: Path) -> None:
    folder, output = places
    whole = members([output / "packed/images-00001.tar"])
    (output / "packed/images-00001.tar").unlink()
    write_files(output / "packed/.packing-dead", "images-00007.tar.unfinished")
    assert list(find_photos(folder, output).to_write) == ["images-00001"]
    pack_again(folder, output)
    assert members([output / "packed/images-00001.tar"]) == whole
    assert not (output / "packed/.packing-dead").exists()


def test_a_packing_that_fails_goes_on_after_the_last_whole_shard(tmp_path: Path) -> None:
    folder, output = write_files(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg"), tmp_path / "out"
    found = find_photos(folder, output, TWO)
    (folder / "c.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"c\.jpg"):
        pack_photos(found)
    write_files(folder, "c.jpg")
    assert list(find_photos(folder, output).to_write) == ["images-00001"]


def test_a_large_image_gets_a_shard_of_its_own(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg", "c.jpg", "d.jpg")
    write_files(folder, "b.jpg", data=PHOTO + bytes(2 * len(PHOTO)))
    pack_again(folder, tmp_path / "out", PackingRules(max_bytes=2 * len(PHOTO)))
    assert list(packed(tmp_path / "out").values()) == [{"a.jpg"}, {"b.jpg"}, {"c.jpg", "d.jpg"}]


def test_a_name_that_is_no_utf8_is_packed_and_found_again(tmp_path: Path) -> None:
    folder, output = write_files(tmp_path / "in", os.fsdecode(b"\xff.jpg")), tmp_path / "out"
    pack_again(folder, output)
    assert packed(output) == {"images-00000": {"\\xff.jpg"}}
    assert not find_photos(folder, output).to_write


def test_an_output_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "in", "a.jpg")
    with pytest.raises(InputError, match=r"output must lie outside of the folder of images '.*in', got '.*in/out'"):
        find_photos(folder, folder / "out")


def test_another_folder_is_refused_and_a_moved_one_is_not(places: Places, tmp_path: Path) -> None:
    folder, output = places
    # As a camera names them.
    other = write_files(tmp_path / "other", "a/x.jpg", "b.jpg", data=PHOTO + b"1")
    with pytest.raises(
        OutputError, match=r"must be the folder that the output was made of, got '.*other': it has none"
    ):
        find_photos(other, output)
    assert not find_photos(folder.rename(tmp_path / "moved"), output).to_write


def test_what_was_not_packed_there_is_refused(places: Places) -> None:
    folder, output = places
    shutil.copy(output / "packed/images-00000.tar", output / "packed/mine.tar")
    with pytest.raises(OutputError, match=r"packed must hold only what was packed there, got mine\.tar"):
        find_photos(folder, output)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{"])
def test_a_damaged_list_is_an_error_that_says_what_to_delete(places: Places, text: str) -> None:
    folder, output = places
    (output / "packed/images-00000.json").write_text(text)
    with pytest.raises(StoredDataError, match=r"images-00000\.json is damaged: delete .*packed, and all"):
        find_photos(folder, output)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    folder, output = write_files(tmp_path / "in", "a.jpg"), tmp_path / "out"
    # A file of nothing but holes takes no room itself.
    os.truncate(folder / "a.jpg", shutil.disk_usage(tmp_path).free + 2**30)
    with pytest.raises(OutputError, match=r"must have room for the packed images, .*iB, got .*iB"):
        pack_again(folder, output)
    assert not packed(output)


def test_images_that_cannot_be_decoded_are_left_out_until_they_can_and_stay_once_packed(tmp_path: Path) -> None:
    folder, output = write_files(tmp_path / "in", "a.jpg", "b.heic"), tmp_path / "out"
    without = PackingRules(undecodable=("heic",))
    found = pack_again(folder, output, without)
    assert (found.num_new, found.num_undecodable, found.num_images) == (1, 1, 1)
    assert (pack_again(folder, output).num_new, packed(output)["images-00001"]) == (1, {"b.heic"})
    again = find_photos(folder, output, without)
    assert (again.to_write, again.num_undecodable, again.num_images) == ({}, 0, 2)
