"""What a tar says of a member: a header block by itself, and the extensions before it.

The standard library parses header blocks (`TarInfo.frombuf`). The pax records are parsed here, since `tarfile` of
Python before 3.11.10, 3.12.6 and 3.13 takes a time that grows as the square for some (CVE-2024-6232).
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from typing import Protocol

from shard_embedder.pipeline.core.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
# A long name, or a pax record that is needed, is small; a larger one is damage.
MAX_EXTENSION_BYTES = 2**20
# Of pax headers more is read, and passed over: macOS' tar keeps resource forks there, of up to 16 MiB, as base64 and
# as they are.
MAX_PAX_BYTES = 64 * 2**20
# As many blocks of an old GNU sparse header, of 21 extents each.
_MAX_SPARSE_BLOCKS = 2**15
# What stands at byte 257 of every header that is not of 1979, and where its checksum and type are.
USTAR, USTAR_AT = b"ustar", 257
_GNU = b"ustar  \0"
_CHECKSUM, TYPE = slice(148, 156), slice(156, 157)
_OCTAL = b"01234567 \0"
_DEVICES, _PREFIX = slice(329, 345), slice(345, 500)
# From mode to type, of a plain file or a header extension.
_PLAIN = re.compile(rb"(?:[0-7]{6}[0-7 ][\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}([0xgLK])")
_NO_DEVICE = (bytes(16), b"0000000\0" * 2)
_PIECE_BYTES = 2**16
_PROBLEMS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
VOLUME_LABEL = b"V"
# Of the next member alone, and of all.
OWN_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
PAX_TYPES = (*OWN_PAX_TYPES, tarfile.XGLTYPE)
LONG_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Stream(Protocol):
    """What a tar is read from. `position` may be set, to read on from there."""

    position: int
    num_bytes: int

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer only at the end of the file."""

    def skip(self, num_bytes: int) -> bool:
        """Go forward; false where the file ends before."""


class DamageError(ShardError):
    """A fault of the tar itself; a header may be found at byte `resume` or after it, or nowhere (None).

    With `hides_name` it is of a pax header, which may have held the name of the member after it. It must not be kept:
    its traceback holds what was read.
    """

    def __init__(self, message: str, resume: int | None, *, hides_name: bool = False) -> None:
        super().__init__(message)
        self.resume = resume
        self.hides_name = hides_name


@dataclass(slots=True)
class Header:
    """What a header block says, as far as it is needed."""

    name: str
    size: int
    type: bytes

    @property
    def is_folder(self) -> bool:
        """Whether it is of a folder."""
        return self.type == tarfile.DIRTYPE

    @property
    def has_data(self) -> bool:
        """Whether data follows: a plain file's, or that of a type that is not known."""
        return self.type in tarfile.REGULAR_TYPES or self.type not in tarfile.SUPPORTED_TYPES


def parse_header(block: bytes) -> Header:
    """A header block alone, by the standard library. What nearly all tars write is parsed here, six times as fast.

    Raises:
        tarfile.HeaderError, ValueError: it is none.
    """
    plain = _PLAIN.match(block, 100)
    if plain is not None and block[_DEVICES] in _NO_DEVICE:
        size, checksum, kind = plain.groups()
        if int(checksum, 8) == sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" "):
            name = block[:100].split(b"\0", 1)[0]
            if block[_PREFIX.start] and kind not in tarfile.GNU_TYPES and not block.startswith(_GNU, USTAR_AT):
                name = block[_PREFIX].split(b"\0", 1)[0] + b"/" + name
            return Header(name.decode("utf-8", "surrogateescape"), int(size, 8), kind)
    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    text = header.name
    if block.startswith(_GNU, USTAR_AT):
        # `TarInfo` takes what GNU tar has at a ustar header's prefix, times of access and change, for that.
        text = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return Header(text, header.size, header.type)


def is_header(block: bytes) -> bool:
    """Whether a block is a header, told fast where it is none."""
    # The checksum first, and by hand: a hostile file may hold many blocks that look like headers.
    field = block[_CHECKSUM]
    if field[:1] not in _OCTAL:
        return False
    try:
        checksum = int(field.strip(b" \0"), 8)
        return checksum == sum(block) - sum(field) + len(field) * ord(" ") and bool(parse_header(block))
    except (tarfile.HeaderError, ValueError):
        return False


def member_name(header: Header, pax: PaxRecords | None, long_name: str | None) -> str:
    """The name of a member, by its header and by the extensions before it."""
    of_pax = None if pax is None else pax.sparse_name or pax.path
    return of_pax or long_name or header.name


def problem_of(header: Header, pax: PaxRecords | None) -> str | None:
    """What a member is, where that is no plain file."""
    if pax is not None and pax.is_sparse:
        return "a sparse file"
    if header.type in _PROBLEMS:
        return _PROBLEMS[header.type]
    return None if header.type in tarfile.REGULAR_TYPES else f"a member of type {header.type!a}"


def size_of(text: str | None, header: Header, start: int) -> int:
    """The size of what follows a header: by a pax record's `text`, if any, else by itself. Raises `DamageError`."""
    try:
        size = header.size if text is None else int(text)
    except ValueError as error:
        raise DamageError(f"damaged: a size of {brief(text or '')} at byte {start}", start + BLOCK) from error
    if size < 0:
        raise DamageError(f"damaged: a size of {size} at byte {start}", start + BLOCK)
    return size


def brief(name: str) -> str:
    """A name in ASCII, and not more than its beginning."""
    return ascii(name if len(name) <= 100 else f"{name[:100]}...")


@dataclass(slots=True)
class PaxRecords:
    """What a pax header says of the next member, as far as it is needed."""

    path: str | None = None
    sparse_name: str | None = None
    size: str | None = None
    is_sparse: bool = False


def long_text(stream: Stream, header: Header, start: int) -> str:
    """The text of a GNU long name. Raises `DamageError`."""
    size = _extension_size(stream, header, start, MAX_EXTENSION_BYTES)
    text = stream.read(size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    _skip_padding(stream, header, size, start)
    return text


def _extension_size(stream: Stream, header: Header, start: int, most: int) -> int:
    size = size_of(None, header, start)
    problem = None
    if size > most:
        problem = f"damaged: a header extension of {size} bytes at byte {start}, at most {most} is read"
    elif size > stream.num_bytes - stream.position:
        problem = f"cut: ends inside the header extension at byte {start}"
    if problem is not None:
        raise DamageError(problem, start + BLOCK, hides_name=header.type in OWN_PAX_TYPES)
    return size


def _skip_padding(stream: Stream, header: Header, size: int, start: int) -> None:
    if not stream.skip(-size % BLOCK):
        raise DamageError(
            f"cut: ends inside the header extension at byte {start}",
            start + BLOCK,
            hides_name=header.type in OWN_PAX_TYPES,
        )


def pax_records(stream: Stream, header: Header, start: int) -> PaxRecords:
    """What a pax header says. Raises `DamageError`."""
    size = _extension_size(stream, header, start, MAX_PAX_BYTES)
    try:
        records = read_pax(stream, size)
    except ValueError as error:
        raise DamageError(
            f"damaged: the pax header at byte {start} is malformed", start + BLOCK, hides_name=True
        ) from error
    _skip_padding(stream, header, size, start)
    return records


def read_pax(stream: Stream, size: int, piece_bytes: int = _PIECE_BYTES) -> PaxRecords:
    """Records of the form `LENGTH KEY=VALUE\\n`, LENGTH counting itself, of `size` bytes in all.

    The values that are not needed are passed over, however long they are; of a long one, no more than `piece_bytes`
    are held.

    Raises:
        ValueError: they are not of that form, or one that is needed is too long.
    """
    found = PaxRecords()
    left = size
    data, at = b"", 0
    while True:
        if left and len(data) - at < piece_bytes // 2:
            piece = stream.read(min(left, piece_bytes))
            left -= len(piece)
            data, at = data[at:] + piece, 0
        if at == len(data):
            return found
        if data[at] == 0:
            # Some fill it up with zeros.
            data = data[at:]
            while data:
                if data.strip(b"\0"):
                    raise ValueError("zeros between pax records")
                data = stream.read(min(left, piece_bytes))
                left -= len(data)
            return found
        space = data.find(b" ", at, at + 10)
        digits = data[at:space] if space > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        equals = data.find(b"=", space + 1, end)
        if not space < equals < end - 1 or end - len(data) > left:
            raise ValueError("no pax record")
        key, missing = data[space + 1 : equals], end - len(data)
        if key in (b"path", b"size", b"GNU.sparse.name"):
            if missing > 0:
                if end - at > MAX_EXTENSION_BYTES:
                    raise ValueError("a long pax record")
                data += stream.read(missing)
                left -= missing
            value = data[equals + 1 : end - 1].decode("utf-8", "surrogateescape")
            if key == b"size":
                found.size = value
            elif key == b"path":
                found.path = value
            else:
                found.sparse_name = value
        found.is_sparse = found.is_sparse or key.startswith(b"GNU.sparse.")
        if end > len(data):
            stream.skip(end - len(data) - 1)
            left -= end - len(data)
            data, at, end = stream.read(1), 0, 1
        if data[end - 1 : end] != b"\n":
            raise ValueError("no end of a pax record")
        at = end


def skip_sparse_maps(stream: Stream, block: bytes, start: int) -> None:
    """Old GNU sparse headers go on in further blocks while a flag byte says so. Raises `DamageError`."""
    more = block[482]
    num_blocks = 0
    while more:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise DamageError(f"cut: ends inside the sparse header at byte {start}", start + BLOCK)
        num_blocks += 1
        if num_blocks > _MAX_SPARSE_BLOCKS:
            raise DamageError(f"damaged: a sparse header without an end at byte {start}", start + BLOCK)
        more = block[504]
