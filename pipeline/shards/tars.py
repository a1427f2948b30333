"""A tar stream as members, in constant memory, with the end of the archive proven.

`tarfile` (and `webdataset` on top of it) stops without a word at a damaged header, so that the rest of
a shard is lost in silence. Here the standard library parses single headers (`TarInfo.frombuf`), and
the walk from header to header is ours: whatever is not a header, and not the end, is a fault. Past a
fault the walk goes on at the next header that can be found, so that one flipped bit does not cost the
rest of a shard; the fault is raised when all that can be read has been.

Time and memory have a bound whatever a shard says. Of its faults only the first one's text is kept. To
go on after a fault the walk goes back at most `WINDOW_BYTES`, and in all of a shard over no more bytes
than it has read forward. The pax records are parsed here, since
`tarfile` of Python before 3.11.10, 3.12.6 and 3.13 takes a time that grows as the square for some
(CVE-2024-6232).
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from shard_embedder.pipeline.core.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
# A long name, or a pax record that is needed, is small; a larger one is damage.
MAX_EXTENSION_BYTES = 2**20
# Of pax headers more is read, and passed over: macOS' tar keeps resource forks there, of up to 16 MiB, as base64 and
# as they are.
MAX_PAX_BYTES = 64 * 2**20
# As many blocks of an old GNU sparse header, of 21 extents each.
_MAX_SPARSE_BLOCKS = 2**15
# How far the walk goes back at most, to look for the next header.
WINDOW_BYTES = 2**20
# tar ends an archive with two blocks of zeros, and fills it up with more to a multiple of its record:
# 20 blocks as a rule, others by `tar -b`.
_RECORD_BYTES = tuple(BLOCK * factor for factor in (1, 20, 64, 128, 256, 512, 1024, 2048))
_MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"<!": "an HTML text",
    b"<h": "an HTML text",
    b"<?": "an XML text",
    b'{"': "a JSON text",
}
# What stands at byte 257 of every header that is not of 1979, and where its checksum and type are.
_USTAR, _USTAR_AT = b"ustar", 257
_GNU = b"ustar  \0"
_CHECKSUM, _TYPE = slice(148, 156), slice(156, 157)
_OCTAL = b"01234567 \0"
_DEVICES, _PREFIX = slice(329, 345), slice(345, 500)
# From mode to type, of a plain file or a header extension.
_PLAIN = re.compile(rb"(?:[0-7]{6}[0-7 ][\0 ]){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})[\0 ]{2}([0xgLK])")
_NO_DEVICE = (bytes(16), b"0000000\0" * 2)
_SEARCH_BYTES = (2**12, 2**18)
_PIECE_BYTES = 2**16
# So little is gone back over at any fault, to find a header that begins earlier than it should.
_FREE_BYTES = 2 * BLOCK


class Stream(Protocol):
    """What a tar is read from. `position` may be set, to read on from there."""

    position: int
    num_bytes: int

    def read(self, num_bytes: int) -> bytes:
        """The next bytes; fewer only at the end of the file."""

    def skip(self, num_bytes: int) -> bool:
        """Go forward; false where the file ends before."""


@dataclass(slots=True)
class Member:
    """One member that is not a folder.

    `name` may hold surrogates where its bytes are not UTF-8. `data` is None where it was not wanted
    or not had; `problem` then says why it was not had.
    """

    name: str
    num_bytes: int
    data: bytes | None = None
    problem: str | None = None


class _DamageError(ShardError):
    """A fault of the tar itself; a header may be found at byte `resume` or after it, or nowhere (None).

    With `hides_name` it is of a pax header, which may have held the name of the member after it. It must not be kept:
    its traceback holds what was read.
    """

    def __init__(self, message: str, resume: int | None, *, hides_name: bool = False) -> None:
        super().__init__(message)
        self.resume = resume
        self.hides_name = hides_name


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
_OWN_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
PAX_TYPES = (*_OWN_PAX_TYPES, tarfile.XGLTYPE)
LONG_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def iter_members(stream: Stream, wanted: Callable[[str], bool], max_member_bytes: int) -> Iterator[Member]:
    """Yield the members of a tar in order, with the data of those whose name is `wanted`.

    A member that is cut short is yielded, with its problem. Concatenated tars are read through, as
    `tar --ignore-zeros` does. Past damage the walk goes on at the next header, as `tar` does.

    Raises:
        ShardError: after the last member: the stream is not a tar, is damaged, or ends before the
            archive does. At once: it cannot be read.
    """
    first: str | None = None
    is_alone, hides_name = True, False
    reached = again = 0
    while True:
        try:
            yield from _walk(
                stream, wanted, max_member_bytes, is_after_damage=first is not None, hides_name=hides_name
            )
            break
        except _DamageError as fault:
            is_alone, first = first is None, first or str(fault)
            resume, hides_name = fault.resume, fault.hides_name
        if resume is None:
            break
        reached = max(reached, stream.position)
        back = stream.position - max(resume, stream.position - WINDOW_BYTES)
        if back > _FREE_BYTES:
            # What has been read forward pays for what is read again.
            back = back if again + back <= reached else 0
            again += back
        if not _find_header(stream, max(resume, stream.position - back)):
            break
    if first is not None:
        raise ShardError(first if is_alone else f"{first}; more damage after it")


def _walk(
    stream: Stream,
    wanted: Callable[[str], bool],
    max_member_bytes: int,
    *,
    is_after_damage: bool,
    hides_name: bool,
) -> Iterator[Member]:
    """The members from here to the end. Raises `_DamageError` where they cannot be had.

    `hides_name` is of the damage before the first of them.
    """
    pax: PaxRecords | None = None
    long_name: str | None = None
    while True:
        expected, found = stream.position, _next_header(stream)
        if (pax is not None or long_name is not None) and (found is None or found[0] != expected):
            # It is not the next member's, which stands after the zeros.
            resume = stream.position if found is None else found[0]
            raise _DamageError(f"damaged: a header extension without its member, at byte {expected}", resume)
        if found is None:
            return
        start, block = found
        header = _parse(block, start)
        if header.type in PAX_TYPES:
            records = _pax_records(stream, header, start)
            if header.type != tarfile.XGLTYPE:
                pax = records
            continue
        if header.type in LONG_TYPES:
            text = _long_text(stream, header, start)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            skip_sparse_maps(stream, block, start)
        name = member_name(header, pax, long_name)
        size = _size(None if pax is None else pax.size, header, start)
        problem = problem_of(header, pax)
        if is_after_damage and pax is None and long_name is None and (hides_name or _may_be_cut(block)):
            problem = "its name may be cut: it follows damage"
        pax, long_name, is_after_damage = None, None, False
        if header.is_folder or header.type == VOLUME_LABEL:
            continue
        if not header.has_data:
            yield Member(name, 0, problem=problem)
            continue
        start, left = stream.position, stream.num_bytes - stream.position
        if size > left:
            yield Member(name, size, problem=f"cut after {left} of {size} bytes")
            # Or its size is a lie, and other members follow.
            raise _DamageError(
                f"cut: ends inside {_brief(name)} at byte {start}, after {left} of {size} bytes", start
            )
        if problem is None and size > max_member_bytes:
            problem = f"{size} bytes, more than the limit of {max_member_bytes}"
        if problem is None and wanted(name):
            yield Member(name, size, stream.read(size))
        else:
            stream.skip(size)
            yield Member(name, size, problem=problem)
        if not stream.skip(-size % BLOCK):
            raise _DamageError(f"cut: ends in the padding after {_brief(name)}", stream.position)


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


def _next_header(stream: Stream) -> tuple[int, bytes] | None:
    """The next block that is not zeros, and its start; None at the proven end of the archive.

    That is one block of zeros or more, of a number that is padding, and nothing after it in the file.
    """
    num_zeros = 0
    while True:
        start = stream.position
        block = stream.read(BLOCK)
        if block != _ZEROS:
            break
        num_zeros += BLOCK
        if num_zeros > _RECORD_BYTES[-1] + BLOCK:
            raise _DamageError(f"damaged: a hole of zeros before byte {start}", stream.position)
    if len(block) == BLOCK:
        # Between two archives, and not within one that has a hole.
        if num_zeros and (num_zeros == BLOCK or not _is_padding(num_zeros, start)):
            raise _DamageError(f"damaged: {num_zeros} bytes of zeros before byte {start}", start)
        return start, block
    if num_zeros and not block.strip(b"\0"):
        if num_zeros > tarfile.RECORDSIZE + BLOCK and not _is_padding(num_zeros, start):
            raise _DamageError(f"damaged: a hole of {num_zeros} zero bytes at the end", start)
        return None
    if num_zeros:
        raise _DamageError(f"damaged: {len(block)} bytes of garbage after the end of the archive", stream.position)
    if block:
        raise _DamageError(f"cut: ends inside the header at byte {start}{_looks_like(block, start)}", stream.position)
    if start == 0:
        raise _DamageError("empty file: 0 bytes", None)
    raise _DamageError("cut: ends without an end-of-archive block, so members may be missing", None)


def _is_padding(num_zeros: int, end: int) -> bool:
    """Whether so many zeros, up to byte `end`, are what some tar would write."""
    return any(end % record == 0 and num_zeros <= record + BLOCK for record in _RECORD_BYTES)


def _parse(block: bytes, start: int) -> Header:
    try:
        return parse_header(block)
    except (tarfile.HeaderError, ValueError) as error:
        other = _looks_like(block, start)
        # Where bytes were lost before it, the header begins earlier than it should.
        resume = None if other else max(start - BLOCK, 0) + 1
        raise _DamageError(
            f"damaged: no tar header at byte {start} ({error}){other}",
            resume,
            hides_name=block[_USTAR_AT:].startswith(_USTAR) and block[_TYPE] in _OWN_PAX_TYPES,
        ) from error


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
            if block[_PREFIX.start] and kind not in tarfile.GNU_TYPES and not block.startswith(_GNU, _USTAR_AT):
                name = block[_PREFIX].split(b"\0", 1)[0] + b"/" + name
            return Header(name.decode("utf-8", "surrogateescape"), int(size, 8), kind)
    header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    text = header.name
    if block.startswith(_GNU, _USTAR_AT):
        # `TarInfo` takes what GNU tar has at a ustar header's prefix, times of access and change, for that.
        text = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return Header(text, header.size, header.type)


def _find_header(stream: Stream, position: int) -> bool:
    """Go to the first header that begins at `position` or after it; false where there is none.

    At any byte, for what was lost or inserted need not be whole blocks.
    """
    stream.position = position
    window = b""
    # Most are near: what is read beyond one is read again.
    piece, largest = _SEARCH_BYTES
    while chunk := stream.read(piece):
        piece = min(2 * piece, largest)
        window += chunk
        window_start = stream.position - len(window)
        at = window.find(_USTAR, _USTAR_AT)
        while at >= 0:
            start = at - _USTAR_AT
            if _is_header(window[start : start + BLOCK]):
                stream.position = window_start + start
                return True
            at = window.find(_USTAR, at + 1)
        window = window[1 - BLOCK :]
    return False


def _is_header(block: bytes) -> bool:
    # The checksum first, and by hand: a hostile file may hold many blocks that look like headers.
    field = block[_CHECKSUM]
    if field[:1] not in _OCTAL:
        return False
    try:
        checksum = int(field.strip(b" \0"), 8)
        return checksum == sum(block) - sum(field) + len(field) * ord(" ") and bool(_parse(block, 0))
    except (ValueError, _DamageError):
        return False


def _may_be_cut(block: bytes) -> bool:
    """Whether the name in a header looks like what is left of one that a lost extension held.

    Then it fills its 100 bytes, or has question marks for what is not ASCII.
    """
    return block[99] != 0 or b"?" in block[:100]


def _looks_like(block: bytes, start: int) -> str:
    if start > 0:
        return ""
    kinds = [kind for magic, kind in _MAGIC.items() if block.lstrip()[: len(magic)] == magic]
    return f"; it looks like {kinds[0]}, and only plain .tar is read" if kinds else ""


def _brief(name: str) -> str:
    return ascii(name if len(name) <= 100 else f"{name[:100]}...")


def _size(text: str | None, header: Header, start: int) -> int:
    try:
        size = header.size if text is None else int(text)
    except ValueError as error:
        raise _DamageError(f"damaged: a size of {_brief(text or '')} at byte {start}", start + BLOCK) from error
    if size < 0:
        raise _DamageError(f"damaged: a size of {size} at byte {start}", start + BLOCK)
    return size


@dataclass(slots=True)
class PaxRecords:
    """What a pax header says of the next member, as far as it is needed."""

    path: str | None = None
    sparse_name: str | None = None
    size: str | None = None
    is_sparse: bool = False


def _long_text(stream: Stream, header: Header, start: int) -> str:
    """The text of a GNU long name."""
    size = _extension_size(stream, header, start, MAX_EXTENSION_BYTES)
    text = stream.read(size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    _skip_padding(stream, header, size, start)
    return text


def _extension_size(stream: Stream, header: Header, start: int, most: int) -> int:
    size = _size(None, header, start)
    problem = None
    if size > most:
        problem = f"damaged: a header extension of {size} bytes at byte {start}, at most {most} is read"
    elif size > stream.num_bytes - stream.position:
        problem = f"cut: ends inside the header extension at byte {start}"
    if problem is not None:
        raise _DamageError(problem, start + BLOCK, hides_name=header.type in _OWN_PAX_TYPES)
    return size


def _skip_padding(stream: Stream, header: Header, size: int, start: int) -> None:
    if not stream.skip(-size % BLOCK):
        raise _DamageError(
            f"cut: ends inside the header extension at byte {start}",
            start + BLOCK,
            hides_name=header.type in _OWN_PAX_TYPES,
        )


def _pax_records(stream: Stream, header: Header, start: int) -> PaxRecords:
    size = _extension_size(stream, header, start, MAX_PAX_BYTES)
    try:
        records = read_pax(stream, size)
    except ValueError as error:
        raise _DamageError(
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
    """Old GNU sparse headers go on in further blocks while a flag byte says so. Raises `ShardError` on damage."""
    more = block[482]
    num_blocks = 0
    while more:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise _DamageError(f"cut: ends inside the sparse header at byte {start}", start + BLOCK)
        num_blocks += 1
        if num_blocks > _MAX_SPARSE_BLOCKS:
            raise _DamageError(f"damaged: a sparse header without an end at byte {start}", start + BLOCK)
        more = block[504]
