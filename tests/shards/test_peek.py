"""A shard walked without embedding: its members and samples are the job's, and its size alone tells what it costs."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.core.schema import IMAGE
from shard_embedder.pipeline.core.storage import join, locate, stat
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.grouping import Sample
from shard_embedder.pipeline.shards.headers import BLOCK
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.peek import Entry, TarReader, images, is_one_image, mean_sample_bytes
from shard_embedder.pipeline.shards.tars import iter_members
from tests.conftest import ROOT, sample_members, write_tar
from tests.shards.tar_bytes import (
    ALL,
    END,
    FORMATS,
    LONG,
    MEMBERS,
    A,
    B,
    Bytes,
    C,
    entry,
    flipped,
    gnu_times,
    header,
    packed,
    padded,
    pax,
    read,
)
from tests.shards.tar_cases import CASES, Case
from tests.shards.test_tar_costs import BOMBS, check_bounds


def shard_of(place: str, data: bytes) -> Shard:
    write_bytes(place, "s.tar", data)
    url = join(place, "s.tar")
    info = stat(*locate(url))
    return Shard("s", url, info.num_bytes, info.version)


def samples_of(data: bytes) -> tuple[list[Sample[Entry]], TarReader]:
    reader = TarReader(Bytes(data))
    return list(reader.samples(Naming())), reader


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS[1:]))
def test_a_well_formed_tar_has_the_members_that_the_job_reads(listed: list[tuple[str, bytes]], format: int) -> None:
    data = packed(listed, format)
    found = [(member.name, member.data) for member in iter_members(Bytes(data), lambda name: True, ALL)]
    reader = TarReader(Bytes(data))
    assert [(one.name, reader.read(one)) for one in reader._entries()] == found
    assert reader.fault is None


@pytest.mark.parametrize("case", [case for case in CASES if case.fault is None], ids=lambda case: case.name)
def test_a_whole_shard_has_the_samples_that_the_job_reads(case: Case, tmp_path: Path) -> None:
    shard = shard_of(str(tmp_path), case.data)
    rows, parts = read(tmp_path / "s.tar")
    samples, reader = samples_of(case.data)
    assert len(samples) == len(rows)
    assert reader.fault is None
    assert sum(sample.num_unused for sample in samples) + reader.hidden_images == sum(
        part["unused_images"] for part in parts
    )
    wanted = {row["sample_index"]: row[IMAGE] for row in rows if row[IMAGE] is not None}
    if wanted:
        assert images(shard, Naming(), {*wanted}) == wanted


def test_a_reader_goes_on_past_damage_and_stops_at_a_cut() -> None:
    whole = entry("a.jpg") + entry("b.jpg", B) + entry("c.jpg", C)
    samples, reader = samples_of(flipped(whole, len(entry("a.jpg"))) + END)
    assert ([sample.key for sample in samples], reader.fault) == (["a", "c"], None)
    samples, reader = samples_of(whole[:-600])
    assert [sample.key for sample in samples] == ["a", "b", "c"]
    assert reader.fault is not None
    assert reader.fault.startswith("cut: ends inside c.jpg at byte ")
    image = samples[-1].image
    assert image is not None
    assert reader.read(image) is None
    _, reader = samples_of(whole + pax({"path": LONG})[:700])
    assert (reader.fault or "").startswith("damaged: a header extension of ")
    _, reader = samples_of(whole + b"x" * 100)
    assert (reader.fault or "").startswith("cut: ends inside the header at byte ")


def test_names_of_gnu_tars_incremental_archives_are_the_jobs(tmp_path: Path) -> None:
    data = gnu_times(entry("a.jpg"), b"13727410000") + gnu_times(entry("b.jpg", B), b"14524410000") + END
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() != ["a.jpg", "b.jpg"]
    assert images(shard_of(str(tmp_path), data), Naming(), {0, 1}) == {0: A, 1: B}


def test_bytes_a_sample_are_of_whole_samples(tmp_path: Path) -> None:
    big = b"x" * (3 * 2**20)
    path = tmp_path / "s.tar"
    data = write_tar(path, [(f"{i}.{kind}", big) for i in range(4) for kind in ("jpg", "json")]).read_bytes()
    each = 2 * (512 + len(big))
    assert mean_sample_bytes(shard_of(str(tmp_path), data), Naming()) == each
    assert mean_sample_bytes(shard_of(str(tmp_path), write_tar(path, [("a.jpg", big)]).read_bytes()), Naming()) == (
        512 + len(big)
    )
    assert mean_sample_bytes(shard_of(str(tmp_path), END), Naming()) is None


@pytest.mark.parametrize("store", ["disk", "s3"])
def test_images_are_read_from_the_front_alone_where_asked(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    place = str(tmp_path / "in") if store == "disk" else request.getfixturevalue("s3_url")
    members = [member for i in range(6) for member in sample_members(f"k{i}", i)]
    data = write_tar(tmp_path / "t.tar", members).read_bytes()
    shard = shard_of(place, data)
    expected = {i: members[3 * i][1] for i in range(6)}
    assert images(shard, Naming(), {*expected}) == expected
    third = data.index(b"k3.jpg")
    assert images(shard, Naming(), {*expected}, max_bytes=third) == {i: expected[i] for i in range(3)}
    # The header alone is no image.
    assert images(shard, Naming(), {*expected}, max_bytes=third + 600) == {i: expected[i] for i in range(3)}
    assert not is_one_image(shard, Naming(), {0, 1})
    assert is_one_image(shard, Naming(), {4})


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_shard_costs_a_look_by_its_size_and_constant_memory(bomb: str) -> None:
    for tail in (b"", b"\1" * 2**20):
        stream = Bytes(BOMBS[bomb] * (2**18 // len(BOMBS[bomb])) + tail)
        # One key is one sample, of which the first ten thousand members are held.
        check_bounds(stream, TarReader(stream).samples(Naming()), held_bytes=8 * 2**20)


def test_a_look_at_a_pax_header_of_digits_takes_no_time_that_grows_as_the_square(tmp_path: Path) -> None:
    # `tarfile` of Python before 3.11.10 and 3.12.6 takes minutes for it (CVE-2024-6232).
    digits = b"1" * (2**20 - 1)
    path = tmp_path / "s.tar"
    path.write_bytes(entry("a.jpg") + header(b"p", len(digits), b"x") + padded(digits) + entry("b.jpg") + END)
    code = (
        "import sys\n"
        "from shard_embedder.pipeline.shards.find import Shard\n"
        "from shard_embedder.pipeline.shards.keys import Naming\n"
        "from shard_embedder.pipeline.shards.peek import images, mean_sample_bytes\n"
        "shard = Shard('s', sys.argv[1], int(sys.argv[2]), '')\n"
        "print(mean_sample_bytes(shard, Naming()), len(images(shard, Naming(), {0, 1})))"
    )
    command = [sys.executable, "-c", code, str(path), str(path.stat().st_size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == [str(float(BLOCK + len(A))), "1"]
