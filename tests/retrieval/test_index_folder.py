"""Where an index lies and what it survives: moves, kills, full disks, and two builds at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_embedder.pipeline.core.errors import OutputBusyError, OutputError
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import open_index, read_index_facts
from shard_embedder.pipeline.retrieval.kinds import KINDS
from tests.conftest import ROOT, SmallDisk
from tests.retrieval.stored import Vectors, clusters, numbers, store

pytest.importorskip("faiss", reason="the extra `index` is not installed")

# Where it lies, and what it survives.


def test_an_index_may_be_moved_and_needs_no_right_to_write(chosen: tuple[Path, Vectors], tmp_path: Path) -> None:
    output, values = chosen
    build(str(output), tmp_path / "index", Options(kind="ivf"))
    expected = numbers(tmp_path / "index", values[:50], 5)
    moved = (tmp_path / "index").rename(tmp_path / "moved")
    for path in moved.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert numbers(moved, values[:50], 5) == expected
    finally:
        for path in moved.rglob("*"):
            path.chmod(0o755)


def test_parts_are_added_to_lists_on_disk_that_were_moved(tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3000)
    store(output, "a", values[:1800])
    build(str(output), tmp_path / "index", Options(kind="ivf"))
    (tmp_path / "index").rename(tmp_path / "moved")
    store(output, "b", values[1800:])
    built = build(str(output), tmp_path / "moved")
    assert (built.num_added, built.rebuilt, built.facts.num_rows) == (1200, "", 3000)
    assert np.mean([row == [number] for number, row in enumerate(numbers(tmp_path / "moved", values, 1))]) > 0.98


def test_an_output_on_s3_is_indexed(s3_server: Any, s3_url: str, embedded: Path, tmp_path: Path) -> None:
    s3_server.filesystem().put(f"{embedded}/", f"{s3_url}/", recursive=True)
    facts = build(s3_url, tmp_path / "index").facts
    assert (facts.output, facts.num_rows, facts.recall) == (s3_url, 14, 1.0)
    assert build(s3_url, tmp_path / "index").num_added == 0


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_kill_leaves_the_old_index_usable_and_the_next_run_goes_on(tmp_path: Path) -> None:
    output, index, values = tmp_path / "out", tmp_path / "index", clusters(6000, 256)
    store(output, "a", values[:2000])
    first = build(str(output), index, Options(kind="hnsw")).facts
    store(output, "b", values[2000:], part_rows=200)
    process = start(output, index)
    deadline = time.monotonic() + 120
    while not (index / "data-00001").is_dir():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_index_facts(index) == first, "the kill came too late to show anything"
    ((near,),) = open_index(index).search(values[7:8], 1)
    assert (near.shard, near.sample_index) == ("a", 7)
    built = build(str(output), index)
    assert (built.num_added, built.rebuilt, built.facts.num_rows) == (4000, "", 6000)
    assert sorted(path.name for path in index.iterdir() if path.is_dir()) == [built.facts.data]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_and_leaves_the_index_as_it_was(
    kind: str, small_disk: SmallDisk, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    small_disk.resize(8192)
    output, index, values = tmp_path / "out", small_disk.folder / "index", clusters(4000, 64)
    store(output, "a", values[:2000])
    first = build(str(output), index, Options(kind=kind)).facts
    store(output, "b", values[2000:])
    before = everything(index)
    small_disk.fill(700_000)
    done = run_job("index.py", output, index)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert f"the index {index} cannot be written: " in done.stderr
    assert "No space left on device" in done.stderr
    assert everything(index) == before
    assert read_index_facts(index) == first
    assert sorted(path.name for path in index.iterdir()) == [".lock", "data-00000", "index.json"]


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder but its lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["data-00000", "data-2024", "data-x.csv", "data-00000/photo.jpg", ".tmp/x"])
def test_what_the_user_has_in_a_folder_is_never_removed(name: str, embedded: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / (name if "." in name else f"{name}/vectors.faiss")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"is not empty and no index: it has '.*'; name another folder"):
        build(str(embedded), tmp_path / "mine")
    assert everything(tmp_path / "mine") == {str(mine.relative_to(tmp_path / "mine")): b"mine"}


def test_an_index_leaves_what_lies_beside_it_alone_and_refuses_what_has_the_name_of_its_own(
    embedded: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build(str(embedded), index)
    before = everything(index)
    (index / "data-x.csv").write_bytes(b"mine")
    (index / "data-2024").mkdir()
    (index / "data-2024" / "vectors.faiss").write_bytes(b"mine")
    assert build(str(embedded), index).num_added == 0
    assert everything(index) == before | {"data-x.csv": b"mine", "data-2024/vectors.faiss": b"mine"}
    for name in ("data-00001", "data-00007/notes.txt"):
        (index / name).parent.mkdir(exist_ok=True)
        (index / name).write_bytes(b"mine")
        with pytest.raises(OutputError, match=f"{name[:10]} has the name of an index's own, and is none"):
            build(str(embedded), index)
        assert (index / name).read_bytes() == b"mine"
        (index / name).unlink()


def test_what_a_first_build_that_was_killed_left_is_cleared_away(embedded: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build(str(embedded), index)
    (index / "index.json").unlink()
    (index / "data-00000").rename(index / "data-00003")
    assert build(str(embedded), index).facts.num_rows == 14
    assert sorted(path.name for path in index.iterdir()) == [".lock", "data-00000", "index.json"]


def test_two_at_once_are_refused(embedded: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "index").mkdir()
    with open(tmp_path / "index" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputBusyError, match=r"another build is at work"):
            build(str(embedded), tmp_path / "index")


MEMORY = """\
import sys
from shard_embedder.pipeline.retrieval.build import Options, build
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024
peak = 0
def look(what, done, total):
    global peak
    peak = max(peak, resident())
import faiss, numpy, pyarrow.parquet
before = resident()
facts = build(sys.argv[1], sys.argv[2], Options(memory_bytes=8 * 2**20), look).facts
print(facts.kind, facts.num_rows, peak - before)
"""


@pytest.mark.slow
def test_lists_on_disk_are_built_in_memory_that_does_not_grow_with_them(tmp_path: Path) -> None:
    """With 8 MiB for what is indexed at once, 98 MiB of embeddings take no more than 20 MiB do."""
    values = clusters(10_000, 512)
    peaks = []
    for shards in (1, 5):
        for number in range(shards):
            store(tmp_path / "out", f"s{number}", values, part_rows=2048)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "out"), str(tmp_path / f"index-{shards}")],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # FAISS tells on standard output how large the lists become.
        kind, num_rows, mib = done.stdout.splitlines()[-1].split()
        assert (kind, num_rows) == ("ivf", str(10_000 * shards))
        peaks.append(int(mib))
    assert peaks[1] < peaks[0] + 60
