"""Files written whole or not at all, and deleted, on disk and on S3."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shard_embedder.pipeline.core.storage import locate, read_bytes
from shard_embedder.pipeline.core.writing import TEMPORARY_FOLDER, clear_temporary, delete, write_bytes, write_whole
from tests.conftest import ROOT
from tests.core.test_storage import listed


def test_a_write_replaces_the_whole_file(place: str) -> None:
    for data in (b"long content", b"", b"short"):
        write_bytes(place, "a/f", data)
        assert read_bytes(f"{place}/a/f") == data


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(str(tmp_path), "f", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(str(tmp_path), "f", b"new")
    assert read_bytes(f"{tmp_path}/f") == b"old"
    assert listed(str(tmp_path)) == ["f"]


def test_a_file_is_replaced_when_it_is_whole_and_keeps_its_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")

    def fill_the_disk() -> None:
        with write_whole(tmp_path / "link") as new:
            new.write_text("half")
            raise OSError(28, "No space left on device", str(new))

    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/real'"):
        fill_the_disk()
    assert (tmp_path / "real").read_text() == "old"
    with write_whole(tmp_path / "link") as new:
        new.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True)
    with write_whole(pipe) as new:
        new.write_text("said")
    assert reader.communicate(timeout=10)[0] == "said"
    assert pipe.is_fifo()


def test_clearing_leaves_no_temporary_folder_and_is_no_fault_twice(place: str) -> None:
    write_bytes(place, "f", b"x")
    clear_temporary(place)
    clear_temporary(place)
    fs, path = locate(place)
    assert [entry["name"] for entry in fs.ls(path, detail=True)] == [f"{path}/f"]


_WRITER = """
import sys
from shard_embedder.pipeline.core.writing import write_bytes
print("ready", flush=True)
number = 0
while True:
    number += 1
    write_bytes(sys.argv[1], f"parts/{number % 7}", bytes([number % 256]) * 3_000_000)
"""


@pytest.mark.slow
def test_a_killed_writer_never_leaves_a_half_file(tmp_path: Path) -> None:
    rng = random.Random(0)
    leftovers = 0
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0.02, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for name in listed(str(tmp_path)):
            data = (tmp_path / name).read_bytes()
            if name.startswith(f"{TEMPORARY_FOLDER}/"):
                leftovers += 1
            else:
                assert name.startswith("parts/")
                assert len(data) == 3_000_000
                assert len(set(data[::1000])) == 1
        clear_temporary(str(tmp_path))
        assert not (tmp_path / TEMPORARY_FOLDER).exists()
    assert leftovers, "no kill met a write: this test tested nothing"


def test_deleting_takes_thousands_and_stops_at_nothing_missing(tmp_path: Path) -> None:
    for number in range(3):
        write_bytes(str(tmp_path), f"a/{number}", b"x")
    delete(str(tmp_path), [f"a/{number}" for number in range(2500)])
    assert listed(str(tmp_path)) == []
