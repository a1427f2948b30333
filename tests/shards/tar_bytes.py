"""Tars made by hand, block by block, and a source of bytes that counts what is read."""

from __future__ import annotations

import io
import random
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.schema import part_rows
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.headers import BLOCK
from shard_embedder.pipeline.shards.samples import SampleReader
from shard_embedder.pipeline.shards.tars import Member, iter_members
from tests.conftest import encode, photo

A, B, C, D = (encode(photo(seed, (24, 20))) for seed in range(4))
END = bytes(2 * BLOCK)
GARBAGE = random.Random(0).randbytes(4 * BLOCK)
ALL = 2**62


def header(name: bytes, size: int = 0, kind: bytes = b"0", raw_size: bytes | None = None) -> bytes:
    """A header block made by hand, with a right checksum."""
    block = bytearray(tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT))
    block[: len(name)] = name
    block[124:136] = raw_size if raw_size is not None else b"%011o\0" % size
    block[156:157] = kind
    return with_checksum(block)


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def entry(name: str | bytes, data: bytes = A, kind: bytes = b"0") -> bytes:
    """A member: header, data, padding."""
    raw = name if isinstance(name, bytes) else name.encode()
    return header(raw, len(data), kind) + padded(data)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    data = b""
    for key, value in records.items():
        rest = f" {key}={value}\n".encode()
        length = len(rest) + 1
        while length != len(str(length)) + len(rest):
            length = len(str(length)) + len(rest)
        data += str(length).encode() + rest
    return header(b"PaxHeader", len(data), kind) + padded(data)


def gnu_times(data: bytes, accessed: bytes) -> bytes:
    """An entry with GNU's magic and a time of access in its header."""
    block = bytearray(data[:512])
    block[257:265] = b"ustar  \0"
    block[345:357] = accessed + b"\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[512:]


def packed(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar as Python writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def flipped(block: bytes, at: int) -> bytes:
    return block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :]


def in_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.jpg", A)
    return buffer.getvalue()


NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
LONG = "d" * 120 + "/" + "n" * 120
ABC = entry("a.jpg") + entry("b.jpg", B) + entry("c.jpg", C)
WHOLE = ABC + END
LEN_A, LEN_B = len(entry("a.jpg")), len(entry("b.jpg", B))


def read(path: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All samples of a shard, and the values of its parts."""
    info = stat(*locate(str(path)))
    pending = Pending("shard", str(path), info.num_bytes, info.version)
    parts = [
        part
        for table in SampleReader(Config(input=("x",), output="y", **settings)).parts(pending)
        for part in part_rows(table)
    ]
    return [row for _, samples in parts for row in samples.to_pylist()], [values for values, _ in parts]


class Bytes:
    """A stream of bytes in memory. It counts what is read of it, and how far its reader goes back."""

    def __init__(self, data: bytes) -> None:
        self._data, self._position, self.num_bytes = data, 0, len(data)
        self.read_bytes = self.furthest_back = 0

    @property
    def position(self) -> int:
        return self._position

    @position.setter
    def position(self, position: int) -> None:
        self.furthest_back = max(self.furthest_back, self._position - position)
        self._position = position

    def read(self, num_bytes: int) -> bytes:
        start, self.position = self.position, min(self.position + num_bytes, self.num_bytes)
        self.read_bytes += self.position - start
        return self._data[start : self.position]

    def skip(self, num_bytes: int) -> bool:
        whole = self.position + num_bytes <= self.num_bytes
        self.position = min(self.position + num_bytes, self.num_bytes)
        return whole


def members(data: bytes) -> tuple[list[Member], str | None]:
    """The members of a tar, and its fault."""
    found, fault = [], None
    iterator = iter_members(Bytes(data), lambda name: True, ALL)
    while True:
        try:
            member = next(iterator, None)
        except ShardError as error:
            fault = str(error)
            break
        if member is None:
            break
        found.append(member)
    return found, fault


FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


PIECES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
NAMES = st.lists(PIECES, min_size=1, max_size=3).map("/".join)
MEMBERS = st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8)
PIECES_OF_TARS = (
    entry("a.jpg"), entry("b.json", b"{}"), entry("l", b"long.jpg\0", b"L"), pax({"path": "p.jpg"}),
    pax({"size": "99999"}), pax({"size": "x"}), header(b"s", 5, b"S"), header(b"z", 2**33, b"x"),
    header(b"n", raw_size=b"\xff" * 12), bytes(BLOCK), END, GARBAGE, b"ustar\0", b"x" * 511,
)  # fmt: skip
