"""A tar stream as members, in constant memory, with the end of the archive proven.

`tarfile` (and `webdataset` on top of it) stops without a word at a damaged header, so that the rest of
a shard is lost in silence. Here the standard library parses single headers (`TarInfo.frombuf`), and
the walk from header to header is ours: whatever is not a header, and not the end, is a fault. Past a
fault the walk goes on at the next header that can be found, so that one flipped bit does not cost the
rest of a shard; the fault is raised when all that can be read has been.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.core.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
# A header extension (long name, pax record) is small; a larger one is damage.
MAX_EXTENSION_BYTES = 2**20
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
_SEARCH_BYTES = 2**18


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

    With `hides_name` it is of a pax header, which may have held the name of the member after it.
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
_VOLUME_LABEL = b"V"
# Of the next member alone, and of all.
_OWN_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_PAX_TYPES = (*_OWN_PAX_TYPES, tarfile.XGLTYPE)
_LONG_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def iter_members(stream: Stream, wanted: Callable[[str], bool], max_member_bytes: int) -> Iterator[Member]:
    """Yield the members of a tar in order, with the data of those whose name is `wanted`.

    A member that is cut short is yielded, with its problem. Concatenated tars are read through, as
    `tar --ignore-zeros` does. Past damage the walk goes on at the next header, as `tar` does.

    Raises:
        ShardError: after the last member: the stream is not a tar, is damaged, or ends before the
            archive does. At once: it cannot be read.
    """
    faults: list[_DamageError] = []
    while True:
        try:
            yield from _walk(stream, wanted, max_member_bytes, after=faults[-1] if faults else None)
            break
        except _DamageError as fault:
            faults = [*faults[:1], fault]
            if fault.resume is None or not _find_header(stream, fault.resume):
                break
    if faults:
        raise ShardError(f"{faults[0]}{'; more damage after it' if len(faults) > 1 else ''}") from faults[0]


def _walk(
    stream: Stream, wanted: Callable[[str], bool], max_member_bytes: int, after: _DamageError | None
) -> Iterator[Member]:
    """The members from here, `after` some damage, to the end. Raises `_DamageError` where they cannot be had."""
    pax: dict[str, str] = {}
    long_name: str | None = None
    while True:
        expected, found = stream.position, _next_header(stream)
        if (pax or long_name is not None) and (found is None or found[0] != expected):
            # It is not the next member's, which stands after the zeros.
            resume = stream.position if found is None else found[0]
            raise _DamageError(f"damaged: a header extension without its member, at byte {expected}", resume)
        if found is None:
            return
        start, block = found
        header = _parse(block, start)
        if header.type in _PAX_TYPES:
            records = _pax_records(_extension(stream, header, start), start)
            if header.type != tarfile.XGLTYPE:
                pax = records
            continue
        if header.type in _LONG_TYPES:
            text = _extension(stream, header, start).split(b"\0", 1)[0]
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text.decode("utf-8", "surrogateescape")
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            _skip_sparse_maps(stream, block, start)
        name = pax.get("GNU.sparse.name") or pax.get("path") or long_name or header.name
        size = _size(pax.get("size"), header, start)
        problem = _problem(header, pax)
        if after and not pax and long_name is None and (after.hides_name or _may_be_cut(block)):
            problem = "its name may be cut: it follows damage"
        pax, long_name, after = {}, None, None
        if header.isdir() or header.type == _VOLUME_LABEL:
            continue
        if not (header.isreg() or header.type not in tarfile.SUPPORTED_TYPES):
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


def _problem(header: tarfile.TarInfo, pax: dict[str, str]) -> str | None:
    """What a member is, where that is no plain file."""
    if pax and any(key.startswith("GNU.sparse.") for key in pax):
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


def _parse(block: bytes, start: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        other = _looks_like(block, start)
        # Where bytes were lost before it, the header begins earlier than it should.
        resume = None if other else max(start - BLOCK, 0) + 1
        raise _DamageError(
            f"damaged: no tar header at byte {start} ({error}){other}",
            resume,
            hides_name=block[_USTAR_AT:].startswith(_USTAR) and block[_TYPE] in _OWN_PAX_TYPES,
        ) from error
    if block[_USTAR_AT:].startswith(_GNU):
        # `TarInfo` takes what GNU tar has at a ustar header's prefix, times of access and change, for that.
        header.name = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    return header


def _find_header(stream: Stream, position: int) -> bool:
    """Go to the first header that begins at `position` or after it; false where there is none.

    At any byte, for what was lost or inserted need not be whole blocks.
    """
    stream.position = position
    window = b""
    while chunk := stream.read(_SEARCH_BYTES):
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


def _size(text: str | None, header: tarfile.TarInfo, start: int) -> int:
    try:
        size = header.size if text is None else int(text)
    except ValueError as error:
        raise _DamageError(f"damaged: a size of {_brief(text or '')} at byte {start}", start + BLOCK) from error
    if size < 0:
        raise _DamageError(f"damaged: a size of {size} at byte {start}", start + BLOCK)
    return size


def _extension(stream: Stream, header: tarfile.TarInfo, start: int) -> bytes:
    size = _size(None, header, start)
    if size > MAX_EXTENSION_BYTES:
        raise _DamageError(
            f"damaged: a header extension of {size} bytes at byte {start}, at most {MAX_EXTENSION_BYTES} is read",
            start + BLOCK,
            hides_name=header.type in _OWN_PAX_TYPES,
        )
    data = stream.read(size)
    if len(data) < size or not stream.skip(-size % BLOCK):
        raise _DamageError(
            f"cut: ends inside the header extension at byte {start}",
            start + BLOCK,
            hides_name=header.type in _OWN_PAX_TYPES,
        )
    return data


def _pax_records(data: bytes, start: int) -> dict[str, str]:
    """Records of the form `LENGTH KEY=VALUE\\n`, LENGTH counting itself."""
    records: dict[str, str] = {}
    data = data.rstrip(b"\0")
    position = 0
    while position < len(data):
        space = data.find(b" ", position, position + 10)
        digits = data[position:space] if space > 0 else b""
        end = position + int(digits) if digits.isdigit() else 0
        key, equals, value = data[space + 1 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise _DamageError(
                f"damaged: the pax header at byte {start} is malformed", start + BLOCK, hides_name=True
            )
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        position = end
    return records


def _skip_sparse_maps(stream: Stream, block: bytes, start: int) -> None:
    """Old GNU sparse headers go on in further blocks while a flag byte says so."""
    more = block[482]
    while more:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise _DamageError(f"cut: ends inside the sparse header at byte {start}", start + BLOCK)
        more = block[504]
