"""Tars of every kind and damage: what can be read is kept, and what was not proven whole is never called so."""

from __future__ import annotations

import gzip
import io
import random
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.core.config import Config, Field
from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.schema import IMAGE, REASON, part_rows
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.headers import BLOCK, MAX_PAX_BYTES, is_header
from shard_embedder.pipeline.shards.samples import SampleReader
from shard_embedder.pipeline.shards.tars import Member, iter_members
from tests.conftest import encode, peak_memory_mib, photo

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


@dataclass(frozen=True)
class Case:
    """A shard, and what must become of it.

    `read` are the keys whose image is handed on, in order; `errors` the others, as `key: class of
    reason`; `fault` how the shard's fault begins, None where its end is proven.
    """

    name: str
    data: bytes
    read: str = ""
    errors: tuple[str, ...] = ()
    fault: str | None = None
    ignored: int = 0


NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
LONG = "d" * 120 + "/" + "n" * 120
ABC = entry("a.jpg") + entry("b.jpg", B) + entry("c.jpg", C)
WHOLE = ABC + END
_A, _B = len(entry("a.jpg")), len(entry("b.jpg", B))

CASES = [
    Case("whole", WHOLE, "a b c"),
    Case("whole, as Python writes it", packed([("a.jpg", A), ("b.jpg", B)]), "a b"),
    # Cut.
    Case("cut inside an image", WHOLE[: _A + BLOCK + 99], "a", ("b: unreadable member",), "cut: ends inside 'b.jpg'"),
    Case("cut inside the padding", ABC[:-1], "a b c", (), "cut: ends in the padding after 'c.jpg'"),
    Case("cut inside a header", WHOLE[: _A + 200], "a", (), "cut: ends inside the header"),
    Case("cut inside the first header", WHOLE[:200], "", (), "cut: ends inside the header"),
    Case("cut between members", WHOLE[: _A + _B], "a b", (), "cut: ends without an end-of-archive block"),
    Case("without its end-of-archive blocks", ABC, "a b c", (), "cut: ends without an end-of-archive block"),
    Case("cut inside the first end-of-archive block", ABC + bytes(100), "a b c", (), "cut: ends inside the header"),
    Case("one end-of-archive block of two", ABC + bytes(BLOCK), "a b c"),
    Case("cut inside the padding of the archive", ABC + bytes(3 * BLOCK + 7), "a b c"),
    Case(
        "a long-name header without its member", ABC + pax({"path": LONG}) + END, "a b c", (), "damaged: a header ext"
    ),
    # Damaged headers.
    Case("wrong header checksum", flipped(WHOLE, _A + 150), "a c", (), f"damaged: no tar header at byte {_A}"),
    Case("one bit of a name flipped", flipped(WHOLE, _A), "a c", (), f"damaged: no tar header at byte {_A}"),
    Case("the first header damaged", flipped(WHOLE, 0), "b c", (), "damaged: no tar header at byte 0"),
    Case("garbage header", WHOLE[:_A] + GARBAGE[:BLOCK] + WHOLE[_A + BLOCK :], "a c", (), "damaged: no tar header"),
    Case("garbage between members", WHOLE[:_A] + GARBAGE + WHOLE[_A:], "a b c", (), "damaged: no tar header"),
    Case(
        "garbage that is no whole block",
        WHOLE[:_A] + GARBAGE[:77] + WHOLE[_A:],
        "a b c",
        (),
        "damaged: no tar header",
    ),
    Case("a byte lost", WHOLE[: _A + 600] + WHOLE[_A + 601 :], "a b c", (), "damaged: no tar header"),
    Case(
        "a block of zeros for a header",
        WHOLE[:_A] + bytes(BLOCK) + WHOLE[_A + BLOCK :],
        "a c",
        (),
        "damaged: 512 bytes",
    ),
    Case(
        "a page of zeros between members",
        entry("a.jpg") + bytes(4096) + entry("b.jpg") + END,
        "a b",
        (),
        "damaged: 4096",
    ),
    Case("a hole of 4 MiB", entry("a.jpg") + bytes(4 * 2**20) + entry("b.jpg") + END, "a b", (), "damaged: a hole"),
    Case("zeros to the end, 4 MiB", ABC + bytes(4 * 2**20), "a b c", (), "damaged: a hole"),
    Case("zeros to the end, 100 KiB", ABC + bytes(100 * 2**10), "a b c", (), "damaged: a hole"),
    Case(
        "two faults",
        flipped(flipped(WHOLE, 0), _A + _B),
        "b",
        (),
        "damaged: no tar header at byte 0 (bad checksum); more",
    ),
    # Sizes that lie.
    Case(
        "a size of 1 TiB",
        entry("a.jpg")
        + header(b"b.jpg", raw_size=b"\x80" + (2**40).to_bytes(11, "big"))
        + padded(B)
        + entry("c.jpg")
        + END,
        "a c",
        ("b: unreadable member",),
        "cut: ends inside 'b.jpg'",
    ),
    Case(
        "a negative size",
        entry("a.jpg") + header(b"b.jpg", raw_size=b"\xff" * 12) + padded(B) + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: a size of -1",
    ),
    Case(
        "a negative size by pax",
        entry("a.jpg") + pax({"size": "-7"}) + entry("b.jpg") + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: a size of -7",
    ),
    Case(
        "a size that is no number",
        entry("a.jpg") + header(b"b.jpg", raw_size=b"9" * 12) + padded(B) + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: no tar header",
    ),
    Case(
        # Its data is b's and half of c: whether that is an image is for the decoder to say.
        "a size too large by 700 bytes",
        entry("a.jpg") + header(b"b.jpg", len(B) + 700) + padded(B) + entry("c.jpg") + entry("d.jpg") + END,
        "a b d",
        (),
        "damaged: no tar header",
    ),
    Case(
        "a size too small",
        entry("a.jpg") + header(b"b.jpg", 100) + padded(B) + entry("c.jpg") + END,
        "a b c",
        (),
        "damaged: no tar header",
    ),
    # No tar at all.
    Case("gzip under .tar", gzip.compress(WHOLE), "", (), "damaged: no tar header at byte 0"),
    Case("zip under .tar", in_zip(), "", (), "damaged: no tar header at byte 0 (bad checksum); it looks like a zip"),
    Case("HTML under .tar", b"<!doctype html><p>404" + b" " * 600, "", (), "damaged: no tar header at byte 0 (bad"),
    Case(
        "short HTML under .tar",
        b"<html>404</html>",
        "",
        (),
        "cut: ends inside the header at byte 0; it looks like an H",
    ),
    Case("JPEG under .tar", A, "", (), "damaged: no tar header at byte 0 (bad checksum); it looks like a JPEG"),
    Case("random bytes under .tar", GARBAGE, "", (), "damaged: no tar header at byte 0"),
    Case("0 bytes", b"", "", (), "empty file: 0 bytes"),
    Case("a valid empty tar", END, ""),
    Case("a valid empty tar, as Python writes it", packed([]), ""),
    # More than one archive, and what follows it.
    Case("two tars concatenated", packed([("a.jpg", A)]) + packed([("b.jpg", B)]), "a b"),
    Case("two tars without padding concatenated", entry("a.jpg") + END + entry("b.jpg") + END, "a b"),
    Case("two tars, the second cut", packed([("a.jpg", A)]) + entry("b.jpg"), "a b", (), "cut: ends without"),
    Case("trailing garbage", WHOLE + b"garbage", "a b c", (), "damaged: 7 bytes of garbage"),
    Case("trailing blocks of garbage", WHOLE + GARBAGE, "a b c", (), "damaged: no tar header"),
    # Members that are no plain files.
    Case("a sparse file", entry("a.jpg", A, b"S") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case(
        "a sparse file by pax",
        pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}) + entry("x/y.jpg") + END,
        "",
        ("a: unreadable member",),
    ),
    Case("a symbolic link", entry("a.jpg", b"", b"2") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case("a hard link", entry("a.jpg", b"", b"1") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case("a fifo", entry("a.jpg", b"", b"6") + entry("b.jpg") + END, "b", ("a: unreadable member",)),
    Case(
        "a device",
        entry("a.jpg", b"", b"3") + entry("b.jpg", b"", b"4") + END,
        "",
        ("a: unreadable member", "b: unreadable member"),
    ),
    Case(
        "a member of an unknown type", entry("a.jpg", A, b"M") + entry("b.jpg") + END, "b", ("a: unreadable member",)
    ),
    Case(
        "a folder, a volume label", entry("f/", b"", b"5") + entry("label", b"", b"V") + entry("f/a.jpg") + END, "f/a"
    ),
    Case("a contiguous file, one of 1979", entry("a.jpg", A, b"7") + entry("b.jpg", B, b"\0") + END, "a b"),
    # Names.
    Case("a pax long name", packed([(LONG + ".jpg", A)], tarfile.PAX_FORMAT), LONG),
    Case("a GNU long name", packed([(LONG + ".jpg", A)], tarfile.GNU_FORMAT), LONG),
    Case(
        "a long name in two fields",
        packed([("d" * 120 + "/" + "n" * 90 + ".jpg", A)], tarfile.USTAR_FORMAT),
        "d" * 120 + "/" + "n" * 90,
    ),
    Case("pax records of the whole archive", pax({"comment": "x"}, b"g") + entry("a.jpg") + END, "a"),
    Case(
        "a long name lost",
        entry("a.jpg") + flipped(packed([(LONG + ".jpg", A)], tarfile.GNU_FORMAT), 3),
        "a",
        (f"{LONG[:100]}: no image",),
        "damaged: no tar header",
    ),
    Case(
        "a name beyond ASCII lost",
        entry("a.jpg") + flipped(packed([("é.jpg", A)], tarfile.PAX_FORMAT), 3),
        "a",
        ("?: unreadable member",),
        "damaged: no tar header",
    ),
    Case(
        "a broken pax record",
        entry("a.jpg") + entry("p", b"99 path=x\n", b"x") + entry("b.jpg") + entry("c.jpg") + END,
        "a c",
        ("b: unreadable member",),
        "damaged: the pax",
    ),
    Case(
        # As Go writes it: what is not ASCII is left out of the header.
        "a name beyond ASCII lost, of which the header has the rest",
        entry("a.jpg") + flipped(pax({"path": "é1.jpg"}), 3) + entry("1.jpg") + entry("c.jpg") + END,
        "a c",
        ("1: unreadable member",),
        "damaged: no tar header",
    ),
    Case(
        "a pax header whose member is zeros",
        entry("a.jpg") + pax({"path": "b.jpg"}) + bytes(1024) + entry("c.jpg") + END,
        "a c",
        (),
        "damaged: a header extension without its member",
    ),
    Case(
        "a GNU long name at the end of the first of two tars",
        entry("a.jpg") + entry("x", LONG.encode(), b"L") + END + entry("b.jpg") + END,
        "a b",
        (),
        "damaged: a header extension without its member",
    ),
    Case(
        "times of access and change where ustar has a name's first half, as `tar --format=gnu -G` writes them",
        gnu_times(entry("a.jpg"), b"13727410000") + gnu_times(entry("a.cls", b"1"), b"14524410000") + END,
        "a",
    ),
    Case(
        "a header extension of 1 GiB",
        entry("a.jpg") + header(b"x", 2**30, b"L") + entry("b.jpg") + END,
        "a b",
        (),
        "damaged: a header extension of",
    ),
    Case(
        "a header extension cut",
        entry("a.jpg") + entry("x", b"n" * 900, b"L")[:900],
        "a",
        (),
        "cut: ends inside the header ext",
    ),
    Case(
        "a name that is not UTF-8", entry(b"caf\xe9.jpg") + entry("b.jpg") + END, "b", (r"caf\xe9: key is not UTF-8",)
    ),
    Case("NFC and NFD twins", entry(f"{NFC}.jpg") + entry(f"{NFD}.jpg", B) + END, f"{NFC} {NFD}"),
    Case("control characters", entry("a\n\x1b[31m\x7f.jpg") + END, "a\n\x1b[31m\x7f"),
    Case("240 characters", packed([("é" * 120 + "/" + "x" * 119 + ".jpg", A)]), "é" * 120 + "/" + "x" * 119),
    Case("../ and absolute names", entry("../../etc/a.jpg") + entry("/etc/b.jpg") + END, "../../etc/a /etc/b"),
    Case("shell text", entry("$(id);`id`|&'\".jpg") + END, "$(id);`id`|&'\""),
    Case("an empty name", entry("", A) + entry("b.jpg") + END, "b", ignored=1),
    Case("no extension", entry("a") + entry("b.jpg") + END, "b", ("a: no image",)),
    Case(
        "dotfiles and macOS files", entry(".DS_Store") + entry("d/._a.jpg") + entry("d/a.jpg") + END, "d/a", ignored=2
    ),
    Case(
        "what tells of the shard and not of a sample",
        entry("__index__")
        + entry("__meta__.json", b"{}")
        + entry("README")
        + entry("d/LICENSE.txt")
        + entry("a.jpg")
        + entry("labels.csv")
        + entry("d/labels.TSV")
        + entry("d/sum.sha256")
        + END,
        "a",
        ignored=7,
    ),
    Case(
        "names that only look as if they told of the shard",
        entry("__index__.jpg")
        + entry("README.png")
        + entry("readme", b"x")
        + entry("README_2")
        + entry("labels.json")
        + entry("classes.txt")
        + entry("__x")
        + entry("labels.csv.jpg")
        + END,
        "__index__ README labels",
        ("README_2: no image", "labels: no image", "classes: no image", "__x: no image"),
        ignored=1,
    ),
    Case(
        "a table beside an image, and one beside what may be of a sample",
        entry("a.csv", b"x") + entry("a.jpg") + entry("b.csv", b"x") + entry("b.json", b"{}") + END,
        "a",
        ("b: no image",),
    ),
    Case("a table twice", entry("a.csv", b"x") + entry("a.csv", b"y") + END, "", ("a: duplicate member",)),
    Case("upper case", entry("A.JPG") + entry("B.Jpeg") + entry("a.jpg") + END, "A B a"),
    # Samples.
    Case(
        "a duplicate member", entry("a.jpg") + entry("a.jpg", B) + entry("b.jpg") + END, "b", ("a: duplicate member",)
    ),
    Case(
        "a key repeated apart", entry("a.jpg") + entry("b.jpg") + entry("a.jpg", C) + END, "a b", ("a: repeated key",)
    ),
    Case(
        "members not side by side",
        entry("a.jpg") + entry("b.jpg") + entry("a.json", b"{}") + entry("b.json", b"{}") + END,
        "a b",
        ("a: members apart", "b: members apart"),
    ),
    Case(
        "members not side by side, the images last",
        entry("a.json", b"{}") + entry("b.json", b"{}") + entry("a.jpg") + entry("b.jpg") + END,
        "a b",
        ("a: no image", "b: no image"),
    ),
    Case(
        "members not side by side, three of each key",
        entry("a.json", b"{}")
        + entry("b.txt")
        + entry("a.jpg")
        + entry("b.jpg")
        + entry("a.txt")
        + entry("b.json")
        + END,
        "a b",
        ("a: no image", "b: no image", "a: members apart", "b: members apart"),
    ),
    Case(
        "a key repeated apart, with its metadata between",
        entry("a.jpg") + entry("b.jpg") + entry("a.json", b"{}") + entry("c.jpg") + entry("a.jpg", C) + END,
        "a b c",
        ("a: members apart", "a: repeated key"),
    ),
    Case("metadata before the image", entry("a.json", b"{}") + entry("a.cls", b"1") + entry("a.jpg") + END, "a"),
    Case("a sample without an image", entry("a.json", b"{}") + entry("b.jpg") + END, "b", ("a: no image",)),
    Case(
        "a shard without images",
        entry("a.json", b"{}") + entry("b.txt", b"x") + END,
        "",
        ("a: no image", "b: no image"),
    ),
    Case("several images a key", entry("a.png", B) + entry("a.jpg", A) + entry("a.webp", C) + END, "a"),
    Case("an image of 0 bytes", entry("a.jpg", b"") + entry("b.jpg") + END, "a b"),
]


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
    (tmp_path / "shard.tar").write_bytes(flipped(WHOLE, _A) + GARBAGE + entry("d.jpg", D) + END)
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
SHORT_MEMBERS = st.lists(
    st.tuples(st.integers(0, 10**6).map(lambda i: f"{i}.jpg"), st.binary(min_size=1, max_size=1500)),
    min_size=1,
    max_size=6,
    unique_by=lambda member: member[0],
)


@settings(max_examples=150, deadline=None)
@given(MEMBERS, st.sampled_from(FORMATS[1:]))
def test_a_well_formed_tar_gives_what_tarfile_gives(listed: list[tuple[str, bytes]], format: int) -> None:
    data = packed(listed, format)
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]  # type: ignore[union-attr]
    found, fault = members(data)
    assert fault is None
    assert [(member.name, member.data) for member in found] == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.from_regex(r"[a-c/]{0,4}[a-c]\.(jpg|json|cls|seg\.png)", fullmatch=True), st.binary(max_size=60)
        ),
        max_size=12,
    )
)
def test_keys_and_bytes_are_webdatasets_on_well_formed_shards(
    tmp_path_factory: pytest.TempPathFactory, listed: list[tuple[str, bytes]]
) -> None:
    from webdataset.tariterators import base_plus_ext

    groups: list[tuple[str, dict[str, bytes]]] = []
    for name, data in listed:
        key, extension = base_plus_ext(name)
        if not groups or groups[-1][0] != key:
            groups.append((key, {}))
        assume(extension not in groups[-1][1])
        groups[-1][1][extension] = data
    assume(len({key for key, _ in groups}) == len(groups))
    path = tmp_path_factory.mktemp("shards") / "shard.tar"
    path.write_bytes(packed(listed))
    rows, parts = read(path)
    assert parts[-1]["end"] == "last"
    assert [row["image_id"] for row in rows] == [key for key, _ in groups]
    for row, (_, extensions) in zip(rows, groups, strict=True):
        assert row[IMAGE] == extensions.get("jpg", extensions.get("seg.png"))


def spans(data: bytes) -> list[tuple[str, int, int, int]]:
    """Name, first byte with all header extensions, end of data and end of padding of each member."""
    found = []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            end = info.offset_data + info.size
            found.append((info.name, info.offset, end, end + -info.size % BLOCK))
    return found


@settings(max_examples=200, deadline=None)
@given(SHORT_MEMBERS, st.sampled_from(FORMATS), st.data())
def test_a_cut_anywhere_is_found_and_costs_no_whole_member(
    listed: list[tuple[str, bytes]], format: int, data: st.DataObject
) -> None:
    whole = packed(listed, format)
    end = spans(whole)[-1][3]
    cut = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(end - 600, end + 1100)))
    found, fault = members(whole[:cut])
    kept = [(member.name, member.data) for member in found if member.data is not None]
    assert kept == [(name, dict(listed)[name]) for name, _, data_end, _ in spans(whole) if data_end <= cut]
    if fault is None:
        assert cut >= end + BLOCK
    # A member that was cut is named.
    cut_inside = [name for name, start, data_end, _ in spans(whole) if start + BLOCK <= cut < data_end]
    if format == tarfile.USTAR_FORMAT:
        assert [member.name for member in found if member.problem] == cut_inside


@settings(max_examples=200, deadline=None)
@given(SHORT_MEMBERS, st.sampled_from(FORMATS), st.data())
def test_one_wrong_byte_of_a_header_costs_that_member_alone_and_not_in_silence(
    listed: list[tuple[str, bytes]], format: int, data: st.DataObject
) -> None:
    whole = bytearray(packed(listed, format))
    position = data.draw(st.integers(0, len(listed) - 1))
    at = spans(bytes(whole))[position][1] + data.draw(st.integers(0, BLOCK - 1))
    # What looks like a damaged pax header may have held the next member's name.
    whole[at] = data.draw(st.integers(0, 255).filter(lambda value: value not in (whole[at], *b"xX")))
    found, fault = members(bytes(whole))
    got = [(member.name, member.data) for member in found]
    if fault is None:
        assert got == listed
    else:
        assert [member for member in got if member[0] != listed[position][0]] == listed[:position] + listed[
            position + 1 :
        ]


@settings(max_examples=200, deadline=None)
@given(SHORT_MEMBERS, st.data())
def test_garbage_over_any_range_costs_only_what_it_hits(listed: list[tuple[str, bytes]], data: st.DataObject) -> None:
    whole = packed(listed, tarfile.USTAR_FORMAT)
    start = data.draw(st.integers(0, len(whole) - 1))
    length = data.draw(st.one_of(st.integers(1, 40), st.integers(1, len(whole))))
    # With neither `x` nor `X`: a damaged pax header may have held the next member's name.
    garbage = random.Random(start * length).randbytes(length).translate(bytes.maketrans(b"xX", b"yY"))
    broken = whole[:start] + garbage + whole[start + length :]
    found, fault = members(broken)
    unhit = [
        (name, dict(listed)[name]) for name, first, end, _ in spans(whole) if end <= start or first >= start + length
    ]
    assert [member for member in ((member.name, member.data) for member in found) if member in unhit] == unhit
    hit = [first for _, first, _, _ in spans(whole) if first < start + length and start < first + BLOCK]
    # One in thousands has a right checksum by chance, and then it is a header.
    is_damaged = any(not is_header(broken[first : first + BLOCK]) for first in hit)
    if is_damaged and {member.name for member in found} != {name for name, _ in listed}:
        assert fault is not None


PIECES_OF_TARS = (
    entry("a.jpg"), entry("b.json", b"{}"), entry("l", b"long.jpg\0", b"L"), pax({"path": "p.jpg"}),
    pax({"size": "99999"}), pax({"size": "x"}), header(b"s", 5, b"S"), header(b"z", 2**33, b"x"),
    header(b"n", raw_size=b"\xff" * 12), bytes(BLOCK), END, GARBAGE, b"ustar\0", b"x" * 511,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=3000), st.lists(st.sampled_from(PIECES_OF_TARS), max_size=8).map(b"".join)))
def test_no_bytes_make_it_raise_anything_else_or_run_for_ever(data: bytes) -> None:
    found, fault = members(data)
    assert len(found) <= len(data) // BLOCK + 1
    assert fault is not None or data.endswith(bytes(BLOCK))


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


def write_huge(path: Path, num_members: int, member_bytes: int) -> None:
    """A shard of images of zeros that takes no room on disk."""
    with path.open("wb") as file:
        for i in range(num_members):
            file.write(header(b"%06d.jpg" % i, member_bytes))
            file.seek(member_bytes + -member_bytes % BLOCK, io.SEEK_CUR)
        file.write(END)


def peak_mib_of_reading(path: Path) -> tuple[int, int]:
    """Samples, and peak memory of a process that does nothing else."""
    done = subprocess.run([sys.executable, "-m", __name__, str(path)], capture_output=True, text=True, check=True)
    samples, peak = done.stdout.split()
    return int(samples), int(peak)


@pytest.mark.slow
def test_memory_is_flat_whatever_the_size_of_the_shard(tmp_path: Path) -> None:
    peaks = {}
    for num_members in (64, 1024):
        write_huge(tmp_path / "huge.tar", num_members, 4 * 2**20)
        samples, peaks[num_members] = peak_mib_of_reading(tmp_path / "huge.tar")
        assert samples == num_members
    assert (tmp_path / "huge.tar").stat().st_size > 4 * 2**30
    sys.stdout.write(f"peak MiB by number of images of 4 MiB: {peaks}\n")
    assert peaks[1024] < peaks[64] + 64
    assert peaks[1024] < 1024


if __name__ == "__main__":
    huge = Path(sys.argv[1])
    identity = stat(*locate(str(huge)))
    reader = SampleReader(Config(input=("x",), output="y", part_rows=16, keep=(Field("json"),)))
    total = 0
    for table in reader.parts(Pending("huge", str(huge), identity.num_bytes, identity.version)):
        total += sum(values["num_samples"] for values, _ in part_rows(table))
    sys.stdout.write(f"{total} {peak_memory_mib()}")
