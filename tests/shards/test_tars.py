"""Tars of every kind and damage: what can be read is kept, and what was not proven whole is never called so."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from shard_embedder.pipeline.core.config import Config, Field
from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.schema import IMAGE, REASON, part_rows
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.headers import BLOCK, MAX_PAX_BYTES
from shard_embedder.pipeline.shards.samples import SampleReader
from shard_embedder.pipeline.shards.tars import iter_members
from tests.conftest import encode, photo
from tests.peaks import peak_memory_mib
from tests.shards.tar_bytes import (
    ALL,
    END,
    GARBAGE,
    LEN_A,
    LONG,
    WHOLE,
    A,
    Bytes,
    C,
    D,
    entry,
    flipped,
    header,
    members,
    packed,
    padded,
    pax,
    read,
)
from tests.shards.tar_cases import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_shard_gives_what_its_rule_says(case: Case, tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(case.data)
    rows, parts = read(tmp_path / "shard.tar", part_rows=2)
    assert [row["image_id"] for row in rows if row[REASON] is None] == (case.read.split(" ") if case.read else [])
    assert all((row[IMAGE] is None) == (row[REASON] is not None) for row in rows)
    errors = [f"{row['image_id']}: {row[REASON].partition(':')[0]}" for row in rows if row[REASON] is not None]
    assert tuple(errors) == case.errors
    assert [row["sample_index"] for row in rows] == list(range(len(rows)))
    assert [part["end"] for part in parts] == [""] * (len(parts) - 1) + ["last" if case.fault is None else "broken"]
    assert (parts[-1]["fault"] or "").startswith(case.fault or "")
    assert (parts[-1]["fault"] is None) == (case.fault is None)
    assert not parts[-1]["fault_transient"]
    assert parts[-1]["ignored_members"] == case.ignored


def test_images_come_out_as_they_went_in(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(flipped(WHOLE, LEN_A) + GARBAGE + entry("d.jpg", D) + END)
    rows, _ = read(tmp_path / "shard.tar")
    assert [(row["image_id"], row[IMAGE]) for row in rows] == [("a", A), ("c", C), ("d", D)]


def test_a_member_above_the_limit_is_an_error_and_its_bytes_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(WHOLE[: -len(END)] + entry("d.jpg", bytes(9000)) + END)
    rows, parts = read(tmp_path / "shard.tar", max_image_bytes=8999)
    assert [row[REASON] for row in rows] == [
        None,
        None,
        None,
        "unreadable member: 9000 bytes, more than the limit of 8999",
    ]
    assert parts[-1]["end"] == "last"


def test_five_thousand_tiny_images_are_all_there_in_order(tmp_path: Path) -> None:
    tiny = encode(photo(1, (4, 4)), "PNG")
    (tmp_path / "shard.tar").write_bytes(packed([(f"{i:05d}.png", tiny) for i in range(5000)], tarfile.USTAR_FORMAT))
    rows, parts = read(tmp_path / "shard.tar")
    assert [row["image_id"] for row in rows] == [f"{i:05d}" for i in range(5000)]
    assert [part["num_samples"] for part in parts] == [1024, 1024, 1024, 1024, 904]
    assert all(row[IMAGE] == tiny for row in rows)


@pytest.mark.parametrize("fork", [40_000, 2_400_000, 40_000_000])
def test_a_pax_header_with_a_resource_fork_is_read_and_its_member_too(fork: int, tmp_path: Path) -> None:
    forks = {
        "SCHILY.xattr.com.apple.quarantine": "0081;=\n;x",
        "LIBARCHIVE.xattr.com.apple.ResourceFork": "QUJD" * (fork // 4),
        "path": LONG + ".jpg",
    }
    data = entry("a.jpg") + pax(forks) + entry("x") + entry("c.jpg", C) + END
    found, fault = members(data)
    assert fault is None
    assert [(member.name, member.data) for member in found] == [("a.jpg", A), (LONG + ".jpg", A), ("c.jpg", C)]


def test_a_pax_header_above_the_bound_is_damage_and_costs_that_member_alone() -> None:
    too_long = header(b"p", MAX_PAX_BYTES + 1, b"x") + padded(bytes(MAX_PAX_BYTES + 1))
    stream = Bytes(entry("a.jpg") + too_long + entry("b.jpg") + entry("c.jpg") + END)
    walk = iter_members(stream, lambda name: True, ALL)
    assert [next(walk).name for _ in range(3)] == ["a.jpg", "b.jpg", "c.jpg"]
    with pytest.raises(ShardError, match=f"damaged: a header extension of {MAX_PAX_BYTES + 1} bytes .* at most"):
        next(walk)


def test_a_sample_of_endless_names_is_one_error_in_bounded_memory(tmp_path: Path) -> None:
    data = b"".join(pax({"path": f"a.{i}{'x' * (2**20 - 99)}"}) + header(b"x") for i in range(20))
    (tmp_path / "shard.tar").write_bytes(data + entry("b.jpg") + END)
    rows, parts = read(tmp_path / "shard.tar")
    assert [row[REASON] and row[REASON].partition(":")[0] for row in rows] == ["too many members", None]
    assert parts[-1]["end"] == "last"


def write_huge(path: Path, num_members: int, member_bytes: int, pad_bytes: int = 0) -> None:
    """A shard of images of zeros, and of a hidden file before the last of them, that takes no room on disk."""
    members = [(b"%06d.jpg" % i, member_bytes) for i in range(num_members)]
    members[-1:-1] = [(b".pad", pad_bytes)]
    with path.open("wb") as file:
        for name, num_bytes in members:
            file.write(header(name, num_bytes))
            file.seek(num_bytes + -num_bytes % BLOCK, io.SEEK_CUR)
        file.write(END)


def peak_mib_of_reading(path: Path) -> tuple[int, int]:
    """Samples, and peak memory of a process that does nothing else."""
    done = subprocess.run([sys.executable, "-m", __name__, str(path)], capture_output=True, text=True, check=True)
    samples, peak = done.stdout.split()
    return int(samples), int(peak)


@pytest.mark.slow
def test_memory_is_flat_whatever_the_size_of_the_shard(tmp_path: Path) -> None:
    peaks = {}
    for num_members, pad_bytes in ((64, 0), (256, 3 * 2**30)):
        write_huge(tmp_path / "huge.tar", num_members, 4 * 2**20, pad_bytes)
        samples, peaks[num_members] = peak_mib_of_reading(tmp_path / "huge.tar")
        assert samples == num_members
    assert (tmp_path / "huge.tar").stat().st_size > 4 * 2**30
    sys.stdout.write(f"peak MiB by number of images of 4 MiB: {peaks}\n")
    assert peaks[256] < peaks[64] + 64
    assert peaks[256] < 1024


if __name__ == "__main__":
    huge = Path(sys.argv[1])
    identity = stat(*locate(str(huge)))
    reader = SampleReader(Config(input=("x",), output="y", part_rows=16, keep=(Field("json"),)))
    total = 0
    for table in reader.parts(Pending("huge", str(huge), identity.num_bytes, identity.version)):
        total += sum(values["num_samples"] for values, _ in part_rows(table))
    sys.stdout.write(f"{total} {peak_memory_mib()}")
