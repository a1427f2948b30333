"""What a cache gives back is what was put there, whole; whatever else lies there is nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.planning.cache import Cache
from tests.conftest import ROOT

FACTS = {"name": "ä", "shape": [3, 4]}
PARTS = {"graph": b"<xml/>", "constants": np.arange(200_000, dtype=np.uint8)}


def entry_file(cache: Cache) -> Path:
    (path,) = cache.folder.glob("*.entry")
    return path


def test_an_entry_comes_back_as_it_was_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "a" / "cache")
    assert cache.find("one") is None
    cache.keep("one", FACTS, PARTS)
    assert cache.find("other") is None
    entry = cache.find("one")
    assert entry is not None
    parts = entry.parts()
    assert parts is not None
    assert entry.facts == FACTS
    assert parts["graph"].tobytes() == PARTS["graph"]
    assert np.array_equal(parts["constants"], PARTS["constants"])
    cache.keep("one", {"name": "b"}, {"graph": b""})
    again = cache.find("one")
    assert again is not None
    assert again.facts == {"name": "b"}
    assert entry.parts() is None, "the parts of another entry than the one that was found"


def test_the_folder_and_its_entries_are_for_this_user_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.keep("one", FACTS, PARTS)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    assert entry_file(cache).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("where", [0, 30, 100, 5_000, -1])
def test_an_entry_with_a_changed_byte_is_none(tmp_path: Path, where: int) -> None:
    cache = Cache(tmp_path)
    cache.keep("one", FACTS, PARTS)
    path = entry_file(cache)
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    entry = cache.find("one")
    assert entry is None or entry.parts() is None


@pytest.mark.parametrize(
    "content",
    [b"", b"\n\n", b"shard-embedder cache 1 \n{}\n", b"\x80\x04K\x01.", b"{" * 100_000, b"x" * 3_000_000],
)
def test_what_is_no_entry_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one.entry").write_bytes(content)
    assert Cache(tmp_path).find("one") is None


def test_a_cut_or_lengthened_entry_is_none(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.keep("one", FACTS, PARTS)
    path = entry_file(cache)
    data = path.read_bytes()
    for damaged in (data[:-1], data[:200], data[: len(data) // 2], data + b"0"):
        path.write_bytes(damaged)
        assert cache.find("one") is None
    path.write_bytes(data)
    assert cache.find("one") is not None


def test_a_whole_header_of_another_kind_is_none(tmp_path: Path) -> None:
    import hashlib

    for described in (
        [],
        {"facts": 1, "sizes": {}, "sha256": {}},
        {"facts": {}},
        {"facts": {}, "sizes": 3, "sha256": 4},
        {"facts": {}, "sizes": {"a": "1"}, "sha256": {"a": ""}},
    ):
        text = json.dumps(described).encode() + b"\n"
        first = b"shard-embedder cache 1 " + hashlib.sha256(text).hexdigest().encode() + b"\n"
        (tmp_path / "one.entry").write_bytes(first + text)
        assert Cache(tmp_path).find("one") is None


def test_a_folder_that_cannot_be_made_or_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        cache = Cache(folder)
        cache.keep("one", FACTS, PARTS)
        assert cache.find("one") is None


def test_a_folder_where_others_write_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.keep("one", FACTS, PARTS)
    assert cache.find("one") is not None
    cache.folder.chmod(0o777)
    assert cache.find("one") is None
    cache.keep("two", FACTS, PARTS)
    assert not (cache.folder / "two.entry").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    cache.keep("one", FACTS, PARTS)
    os.chown(cache.folder, 12345, -1)
    assert cache.find("one") is None
    cache.keep("two", FACTS, PARTS)
    assert not (cache.folder / "two.entry").exists()


def test_the_entry_that_was_used_least_lately_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=700_000)
    for age, key in enumerate(["c", "b", "a"]):
        cache.keep(key, FACTS, PARTS)
        os.utime(tmp_path / f"{key}.entry", (1e9 - age, 1e9 - age))
    assert cache.find("a") is not None  # used now
    cache.keep("d", FACTS, PARTS)
    assert {path.stem for path in tmp_path.glob("*.entry")} == {"a", "c", "d"}
    cache.keep("large", FACTS, {"constants": bytes(700_000)})
    assert {path.stem for path in tmp_path.glob("*.entry")} == {"a", "c", "d"}
    assert not list(tmp_path.glob("*.tmp"))


def test_what_a_dead_writer_left_goes_in_time(tmp_path: Path) -> None:
    for name in ("old.tmp", "new.tmp", "other.txt"):
        (tmp_path / name).write_bytes(b"half")
    for name in ("old.tmp", "other.txt"):
        os.utime(tmp_path / name, (time.time() - 2 * 86400,) * 2)
    Cache(tmp_path).keep("one", FACTS, PARTS)
    assert {path.name for path in tmp_path.iterdir()} == {"new.tmp", "one.entry", "other.txt"}


def test_two_writers_of_one_entry_leave_a_whole_one(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.cache import Cache\n"
        "folder, name, end = sys.argv[1:]\n"
        "cache = Cache(Path(folder))\n"
        "while time.time() < float(end): cache.keep('one', {'by': name}, {'part': name.encode() * 10**6})"
    )
    end = str(time.time() + 3)
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name, end], cwd=ROOT)
        for name in ("first", "second")
    ]
    cache, found = Cache(tmp_path), 0
    while any(writer.poll() is None for writer in writers):
        entry = cache.find("one")
        assert entry is not None or not found, "once there, it is always whole"
        found += entry is not None
        parts = entry.parts() if entry is not None else None
        if entry is not None and parts is not None:
            assert parts["part"].tobytes() == str(entry.facts["by"]).encode() * 10**6
    assert [writer.returncode for writer in writers] == [0, 0]
    assert found
    last = cache.find("one")
    assert last is not None
    assert last.parts() is not None
    assert [path.name for path in tmp_path.iterdir()] == ["one.entry"]
