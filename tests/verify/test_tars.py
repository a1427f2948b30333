"""Verify finds each fault that only the tars show, or embedding their images again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core.schema import EMBEDDING, IMAGE_ID
from shard_embedder.pipeline.output.names import PartName, version_tag
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.verify.proof import verify
from tests.conftest import encode, photo, sample_members, write_tar
from tests.outputs import embed
from tests.verify.planting import (
    ALL,
    cut,
    found,
    garbage_header,
    name_of,
    part_path,
    rewrite,
    set_column,
    set_vectors,
    shard_members,
    swap,
)


def test_a_wrong_id_is_found(planted: Path, shards: Path) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: set_column(table, IMAGE_ID, ["000-0000", "renamed", "000-0002"]))
    assert verify(str(planted)).proven
    (finding,) = verify(str(planted), [str(shards)]).findings
    assert (finding.rule, finding.file) == ("tar-id", name_of(path))
    assert finding.value == "1 rows: sample 1 is 'renamed', the tar has '000-0001'"


def test_a_wrong_id_of_an_error_is_found(planted: Path, shards: Path) -> None:
    path = part_path(planted, 1, folder="errors")
    rewrite(path, lambda table: set_column(table, IMAGE_ID, ["000-0004", "000-0006"]))
    assert found(verify(str(planted), [str(shards)])) == {("tar-id", name_of(path))}


def test_ids_swapped_between_two_rows_are_found_where_ids_are_a_field(shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "out", id="json:id")
    path = part_path(tmp_path / "out", 0)
    rewrite(path, lambda table: set_column(table, IMAGE_ID, table.column(IMAGE_ID).to_pylist()[::-1]))
    (finding,) = verify(str(tmp_path / "out"), [str(shards)]).findings
    assert finding.rule == "tar-id"
    assert "sample 0 is 'photo-2', the tar has 'photo-0'" in finding.value


def test_ids_of_a_member_with_a_number_are_read_as_the_job_reads_them(tmp_path: Path) -> None:
    members = [
        [(f"{key}.jpg", encode(photo(key))), (f"{key}.cls", text)]
        for key, text in enumerate((b"007\n", b"1_0", b"\xef\xbb\xbf8"))
    ]
    write_tar(tmp_path / "in" / "s.tar", [member for sample in members for member in sample])
    embed(tmp_path / "in", tmp_path / "out", id="cls")
    assert verify(str(tmp_path / "out"), [str(tmp_path / "in")]).findings == []
    (path,) = (tmp_path / "out" / "embeddings").iterdir()
    assert pq.read_table(path).column(IMAGE_ID).to_pylist() == ["7", "1_0", "8"]


def test_samples_that_were_lost_before_they_were_counted_are_found(planted: Path, shards: Path) -> None:
    last = part_path(planted, 2)
    rewrite(last, lambda table: table.slice(0, 0), num_samples="0", num_embedded="0")
    assert verify(str(planted)).proven
    (finding,) = verify(str(planted), [str(shards)]).findings
    assert (finding.rule, finding.value) == ("tar-count", "6 samples are stored, its tar has 7")


@pytest.mark.parametrize(
    "settings", [{}, {"backbone": "shufflenet_v2_x0_5"}, {"precision": "bf16", "dtype": "float16"}], ids=str
)
def test_rows_swapped_before_they_were_written_are_found_by_embedding_again(
    settings: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    embed(shards, tmp_path / "out", **settings)
    path = part_path(tmp_path / "out", 0)
    rewrite(path, set_vectors(swap))
    assert verify(str(tmp_path / "out"), [str(shards)]).proven
    verdict = verify(str(tmp_path / "out"), [str(shards)], ALL)
    assert found(verdict) == {("recompute", name_of(path))}
    assert verdict.findings[0].value == (
        "2 of 3 rows: image_id '000-0000': its image's embedding is that of '000-0002'; "
        "image_id '000-0002': its image's embedding is that of '000-0000'"
    )


def test_embeddings_of_other_weights_are_found_by_embedding_again(shards: Path, tmp_path: Path) -> None:
    embed(shards, tmp_path / "out")
    embed(shards, tmp_path / "other", weights="random:1")
    values = vectors(pq.read_table(part_path(tmp_path / "other", 0)))

    def plant(stored: np.ndarray[Any, Any]) -> None:
        stored[:] = values

    rewrite(part_path(tmp_path / "out", 0), set_vectors(plant))
    verdict = verify(str(tmp_path / "out"), [str(shards)], ALL)
    (finding,) = verdict.findings
    assert finding.rule == "recompute"
    assert finding.value.startswith("3 of 3 rows: image_id '000-0000': cosine 0.")


def test_a_changed_shard_and_a_new_one_are_found_and_a_removed_one_told(own_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_tar(own_shards / "photos-00002.tar", shard_members(2))
    embed(own_shards, output)
    (own_shards / "photos-00002.tar").unlink()
    os.utime(own_shards / "photos-00000.tar", (1, 1))
    write_tar(own_shards / "new.tar", shard_members(3))
    verdict = verify(str(output), [str(own_shards)])
    files = {(rule, file.partition(".")[0]) for rule, file in found(verdict)}
    assert files == {("old-version", "embeddings/photos-00000"), ("shard-missing", "embeddings/new")}
    assert any(note.startswith("1 shard stored and not in this input") for note in verdict.notes)


def test_a_stale_version_beside_the_present_one_is_found(own_shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    embed(own_shards, output)
    os.utime(own_shards / "photos-00001.tar", (1, 1))
    embed(own_shards, output)
    verdict = verify(str(output), [str(own_shards)])
    (finding,) = verdict.findings
    assert finding.rule == "old-version"
    assert finding.file.startswith("embeddings/photos-00001.")
    assert {rule for rule, _ in found(verify(str(output)))} == {"two-versions"}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut inside a member": cut,
    "garbage instead of a header": garbage_header,
    "no end of archive": lambda data: data[: data.index(b"000-0003.jpg")],
    "garbage after the end": lambda data: data + b"garbage" * 100,
    "no tar at all": lambda data: b"<html>" + bytes(1000),
    "0 bytes": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_shard_is_reported_broken_and_nothing_else_is(damage: str, shards: Path, tmp_path: Path) -> None:
    data = DAMAGE[damage]((shards / "photos-00000.tar").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photos-00000.tar").write_bytes(data)
    embed(tmp_path / "in", tmp_path / "out")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], ALL)
    (finding,) = verdict.findings
    assert finding.rule == "shard-broken"
    assert finding.file.endswith("-broken.parquet")
    assert "shard fault: " in finding.value
    assert verdict.broken_shards == 1


def made_of_the_first_three(shards: Path, tmp_path: Path, now: bytes) -> Path:
    """An output that holds three samples of a shard, and says that the shard as it is now is all of it."""
    path = write_tar(tmp_path / "in" / "photos-00000.tar", shard_members(0)[:9])
    embed(tmp_path / "in", tmp_path / "out", part_rows=10)
    path.write_bytes(now)
    relabel(tmp_path / "out", path)
    return tmp_path / "in"


def test_samples_lost_at_a_damaged_header_of_a_shard_that_is_called_good_are_found(
    shards: Path, tmp_path: Path
) -> None:
    folder = made_of_the_first_three(shards, tmp_path, garbage_header((shards / "photos-00000.tar").read_bytes()))
    (finding,) = verify(str(tmp_path / "out"), [str(folder)]).findings
    assert (finding.rule, finding.value) == ("tar-count", "3 samples are stored, its tar has 7")


def test_a_cut_shard_that_is_called_good_is_found(shards: Path, tmp_path: Path) -> None:
    folder = made_of_the_first_three(shards, tmp_path, cut((shards / "photos-00000.tar").read_bytes()))
    (finding,) = verify(str(tmp_path / "out"), [str(folder)]).findings
    assert (finding.rule, finding.file) == ("tar-unreadable", str(folder / "photos-00000.tar"))


def test_a_shard_cut_inside_the_json_that_holds_an_id_is_reported_broken_and_no_more(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "in" / "s.tar", [m for i in range(3) for m in sample_members(f"k{i}", i)])
    whole.write_bytes(whole.read_bytes()[: whole.read_bytes().rindex(b"photo-2") - 2])
    embed(tmp_path / "in", tmp_path / "out", id="json:id")
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")], recompute=None)
    assert {finding.rule for finding in verdict.findings} == {"shard-broken"}


def test_a_readable_sample_that_a_broken_shard_lost_is_found(shards: Path, tmp_path: Path) -> None:
    data = garbage_header((shards / "photos-00000.tar").read_bytes())
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photos-00000.tar").write_bytes(data)
    embed(tmp_path / "in", tmp_path / "out")
    last = part_path(tmp_path / "out", 2)
    assert last.name.endswith("-broken.parquet")
    for path in (last, part_path(tmp_path / "out", 2, folder="errors")):
        empty = {"num_samples": "0", "num_embedded": "0"}
        rewrite(path, lambda table: table.slice(0, 0) if EMBEDDING in table.column_names else table, **empty)
    verdict = verify(str(tmp_path / "out"), [str(tmp_path / "in")])
    assert {rule for rule, _ in found(verdict)} == {"shard-broken", "tar-count"}
    assert "its tar has 1 sample beyond those stored: '000-0006'" in [finding.value for finding in verdict.findings]


def relabel(output: Path, shard: Path) -> None:
    """Give the one stored part the name and metadata of the shard as it is now."""
    (path,) = (output / "embeddings").iterdir()
    size, version = shard.stat().st_size, str(shard.stat().st_mtime_ns)
    name = PartName.parse(path.name)
    assert name is not None
    rewrite(path, lambda table: table, shard_bytes=str(size), shard_version=version)
    path.rename(path.with_name(str(name._replace(tag=version_tag(size, version)))))
