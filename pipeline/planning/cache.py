"""Entries of JSON and bytes in a folder of this machine, each whole or not there.

A cache is never needed: whatever is wrong with the folder or an entry, a reader finds nothing and a writer keeps
nothing. Of what is read nothing is executed or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

# Holds the largest backbone of torchvision, of 2.6 GB, beside others, or some forty of resnet50's size; on the disk
# of a laptop or in a home folder it is little.
MAX_BYTES = 4 * 2**30
_MAGIC = b"shard-embedder cache 1 "
_SUFFIX = ".entry"
_TEMPORARY = ".tmp"
_MAX_HEADER_BYTES = 2**20
# Of a writer that died.
_ABANDONED_S = 24 * 3600


@dataclass(frozen=True)
class Cache:
    """A folder of this user's own. With `max_bytes` the entries that were used least lately make room.

    `surroundings` are variables of the environment that what is kept may depend on.
    """

    folder: Path
    max_bytes: int = MAX_BYTES
    surroundings: Mapping[str, str] = field(default_factory=dict)

    def find(self, key: str) -> Entry | None:
        """The entry of `key`, or None where there is none that is whole."""
        path = self.folder / f"{key}{_SUFFIX}"
        if not self._is_own():
            return None
        try:
            with path.open("rb") as file:
                header = _read_header(file)
                if header is None:
                    return None
                entry = _parsed(path, header)
                if entry is None or os.fstat(file.fileno()).st_size != len(header) + sum(entry.sizes.values()):
                    return None
        except OSError:
            return None
        with suppress(OSError):  # the folder may be one to read alone
            # It is the time of its last use that tells which entry makes room.
            os.utime(path)
        return entry

    def keep(self, key: str, facts: Mapping[str, Any], parts: Mapping[str, bytes | memoryview]) -> None:
        """Store an entry in place of what `key` has: all of it or nothing. `facts` are what JSON can carry."""
        parts = dict(sorted(parts.items()))
        described = {
            "facts": facts,
            "sizes": {name: memoryview(part).nbytes for name, part in parts.items()},
            "sha256": {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()},
        }
        text = json.dumps(described, sort_keys=True).encode() + b"\n"
        header = _MAGIC + hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        num_bytes = len(header) + sum(memoryview(part).nbytes for part in parts.values())
        if len(header) > _MAX_HEADER_BYTES or num_bytes > self.max_bytes:
            return
        with suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._is_own():
                self._make_room(num_bytes)
                self._write(self.folder / f"{key}{_SUFFIX}", [header, *parts.values()])

    def _is_own(self) -> bool:
        """Whether the folder is this user's, and nobody else can write there."""
        try:
            status = os.stat(self.folder)
        except OSError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022

    def _write(self, path: Path, pieces: list[bytes | memoryview]) -> None:
        # Of a name of its own, so that two writers do not meet; it is readable by this user alone.
        handle, temporary = tempfile.mkstemp(_TEMPORARY, dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                for piece in pieces:
                    file.write(piece)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise

    def _make_room(self, num_bytes: int) -> None:
        """Remove what abandoned writers left, and the oldest entries until `num_bytes` fit."""
        entries = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another run may have removed it
                status = path.stat()
                if path.suffix == _TEMPORARY and time.time() - status.st_mtime > _ABANDONED_S:
                    path.unlink()
                elif path.suffix == _SUFFIX:
                    entries.append((status.st_mtime, path, status.st_size))
        total = num_bytes + sum(size for _, _, size in entries)
        for _, path, size in sorted(entries):
            if total <= self.max_bytes:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            total -= size


@dataclass(frozen=True)
class Entry:
    """An entry whose facts were read and are as they were stored; its parts are read when asked for."""

    facts: dict[str, Any]
    path: Path
    num_header_bytes: int
    sizes: dict[str, int]
    sha256: dict[str, str]

    def parts(self) -> dict[str, Bytes] | None:
        """The parts by their names; None where one is damaged, or another entry took this one's place."""
        found: dict[str, Bytes] = {}
        try:
            with self.path.open("rb") as file:
                file.seek(self.num_header_bytes)
                for name, size in self.sizes.items():
                    part = np.fromfile(file, np.uint8, size)
                    if hashlib.sha256(part.data).hexdigest() != self.sha256[name]:
                        return None
                    found[name] = part
        except OSError:
            return None
        return found


def _read_header(file: BinaryIO) -> bytes | None:
    """The two lines before the parts, where the first tells the sha256 of the second."""
    first = file.readline(len(_MAGIC) + 65)
    second = file.readline(_MAX_HEADER_BYTES)
    if first != _MAGIC + hashlib.sha256(second).hexdigest().encode() + b"\n":
        return None
    return first + second


def _parsed(path: Path, header: bytes) -> Entry | None:
    """What a header tells; None where it is that of another kind of entry."""
    try:
        described = json.loads(header.partition(b"\n")[2])
        facts, sizes, sha256 = described["facts"], described["sizes"], described["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_known = isinstance(facts, dict) and isinstance(sizes, dict) and isinstance(sha256, dict)
    if not is_known or sizes.keys() != sha256.keys() or any(type(size) is not int for size in sizes.values()):
        return None
    return Entry(facts, path, len(header), sizes, sha256)
