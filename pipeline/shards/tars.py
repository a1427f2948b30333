"""A tar stream as members, in constant memory, with the end of the archive proven.

`tarfile` (and `webdataset` on top of it) stops without a word at a damaged header, so that the rest of
a shard is lost in silence. Here the walk from header to header is ours (`headers.py` reads each of them):
whatever is not a header, and not the end, is a fault. Past a fault the walk goes on at the next header that
can be found, so that one flipped bit does not cost the rest of a shard; the fault is raised when all that
can be read has been.

Time and memory have a bound whatever a shard says. Of its faults only the first one's text is kept. To
go on after a fault the walk goes back at most `WINDOW_BYTES`, and in all of a shard over no more bytes
than it has read forward.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.shards.headers import (
    BLOCK,
    LONG_TYPES,
    OWN_PAX_TYPES,
    PAX_TYPES,
    TYPE,
    USTAR,
    USTAR_AT,
    VOLUME_LABEL,
    DamageError,
    Header,
    PaxRecords,
    Stream,
    brief,
    is_header,
    long_text,
    member_name,
    parse_header,
    pax_records,
    problem_of,
    size_of,
    skip_sparse_maps,
)

_ZEROS = bytes(BLOCK)
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
_DECOMPRESS = {"gzip data": "gunzip", "bzip2 data": "bunzip2", "xz data": "unxz", "zstd data": "unzstd"}
_SEARCH_BYTES = (2**12, 2**18)
# So little is gone back over at any fault, to find a header that begins earlier than it should.
_FREE_BYTES = 2 * BLOCK


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
        except DamageError as fault:
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
    """The members from here to the end. Raises `DamageError` where they cannot be had.

    `hides_name` is of the damage before the first of them.
    """
    pax: PaxRecords | None = None
    long_name: str | None = None
    while True:
        expected, found = stream.position, _next_header(stream)
        if (pax is not None or long_name is not None) and (found is None or found[0] != expected):
            # It is not the next member's, which stands after the zeros.
            resume = stream.position if found is None else found[0]
            raise DamageError(f"damaged: a header extension without its member, at byte {expected}", resume)
        if found is None:
            return
        start, block = found
        header = _parse(block, start)
        if header.type in PAX_TYPES:
            records = pax_records(stream, header, start)
            if header.type != tarfile.XGLTYPE:
                pax = records
            continue
        if header.type in LONG_TYPES:
            text = long_text(stream, header, start)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            skip_sparse_maps(stream, block, start)
        name = member_name(header, pax, long_name)
        size = size_of(None if pax is None else pax.size, header, start)
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
            raise DamageError(f"cut: ends inside {brief(name)} at byte {start}, after {left} of {size} bytes", start)
        if problem is None and size > max_member_bytes:
            problem = f"{size} bytes, more than the limit of {max_member_bytes}"
        if problem is None and wanted(name):
            yield Member(name, size, stream.read(size))
        else:
            stream.skip(size)
            yield Member(name, size, problem=problem)
        if not stream.skip(-size % BLOCK):
            raise DamageError(f"cut: ends in the padding after {brief(name)}", stream.position)


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
            raise DamageError(f"damaged: a hole of zeros before byte {start}", stream.position)
    if len(block) == BLOCK:
        # Between two archives, and not within one that has a hole.
        if num_zeros and (num_zeros == BLOCK or not _is_padding(num_zeros, start)):
            raise DamageError(f"damaged: {num_zeros} bytes of zeros before byte {start}", start)
        return start, block
    if num_zeros and not block.strip(b"\0"):
        if num_zeros > tarfile.RECORDSIZE + BLOCK and not _is_padding(num_zeros, start):
            raise DamageError(f"damaged: a hole of {num_zeros} zero bytes at the end", start)
        return None
    if num_zeros:
        raise DamageError(f"damaged: {len(block)} bytes of garbage after the end of the archive", stream.position)
    if block:
        raise DamageError(f"cut: ends inside the header at byte {start}{_looks_like(block, start)}", stream.position)
    if start == 0:
        raise DamageError("empty file: 0 bytes", None)
    raise DamageError("cut: ends without an end-of-archive block, so members may be missing", None)


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
        raise DamageError(
            f"damaged: no tar header at byte {start} ({error}){other}",
            resume,
            hides_name=block[USTAR_AT:].startswith(USTAR) and block[TYPE] in OWN_PAX_TYPES,
        ) from error


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
        at = window.find(USTAR, USTAR_AT)
        while at >= 0:
            start = at - USTAR_AT
            if is_header(window[start : start + BLOCK]):
                stream.position = window_start + start
                return True
            at = window.find(USTAR, at + 1)
        window = window[1 - BLOCK :]
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
    if not kinds:
        return ""
    advice = f": decompress it with `{_DECOMPRESS[kinds[0]]}`" if kinds[0] in _DECOMPRESS else ""
    return f"; it looks like {kinds[0]}, and only plain .tar is read{advice}"
