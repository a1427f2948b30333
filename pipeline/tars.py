"""A tar stream as members, in constant memory, with the end of the archive proven.

`tarfile` (and `webdataset` on top of it) stops without a word at a damaged header, so that the rest of
a shard is lost in silence. Here the standard library parses single headers (`TarInfo.frombuf`), and
the walk from header to header is ours: whatever is not a header, and not the end, is a `ShardError`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(BLOCK)
# A header extension (long name, pax record) is small; a larger one is damage.
MAX_EXTENSION_BYTES = 2**20
# tar pads an archive with zeros, by 10 KiB as a rule and by 1 MiB at most; more is a hole in the file.
MAX_PADDING_BYTES = 2**20
_MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89PNG": "a PNG image",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"<": "an HTML or XML text",
    b"{": "a JSON text",
}


class Stream(Protocol):
    """What a tar is read from."""

    position: int

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


_LINKS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.FIFOTYPE: "a fifo",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}


def iter_members(stream: Stream, wanted: Callable[[str], bool], max_member_bytes: int) -> Iterator[Member]:
    """Yield the members of a tar in order, with the data of those whose name is `wanted`.

    A member that is cut short is yielded, with its problem, before the error. Concatenated tars are
    read through, as `tar --ignore-zeros` does.

    Raises:
        ShardError: the stream is not a tar, is damaged, or ends before the archive does.
    """
    pax: dict[str, str] = {}
    long_name: str | None = None
    while True:
        start = stream.position
        block = stream.read(BLOCK)
        if not block:
            raise ShardError(
                "empty file: 0 bytes" if start == 0 else "ends without an end-of-archive block: cut between members"
            )
        if len(block) < BLOCK:
            raise ShardError(f"cut: ends inside the header at byte {start}{_looks_like(block, start)}")
        if block == _ZEROS:
            following = _next_header(stream)
            if following is None:
                return
            start, block = following
        header = _parse(block, start)
        if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax_records(_extension(stream, header, start), start)
            if header.type != tarfile.XGLTYPE:
                pax = records
            continue
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _extension(stream, header, start).split(b"\0", 1)[0]
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = text.decode("utf-8", "surrogateescape")
            continue
        if header.type == tarfile.GNUTYPE_SPARSE:
            _skip_sparse_maps(stream, block, start)
        name = pax.get("GNU.sparse.name", pax.get("path", long_name or header.name))
        size = _size(pax.get("size"), header, start)
        sparse = any(key.startswith("GNU.sparse.") for key in pax)
        pax, long_name = {}, None
        yield from _member(stream, header, name, size, sparse, wanted, max_member_bytes)


def _member(
    stream: Stream,
    header: tarfile.TarInfo,
    name: str,
    size: int,
    sparse: bool,
    wanted: Callable[[str], bool],
    max_member_bytes: int,
) -> Iterator[Member]:
    padding = -size % BLOCK
    problem = "a sparse file" if sparse else _LINKS.get(header.type)
    has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    if not has_data:
        if not header.isdir():
            yield Member(name, 0, problem=problem)
        return
    if problem is None and size > max_member_bytes:
        problem = f"{size} bytes, more than the limit of {max_member_bytes}"
    start = stream.position
    if problem is None and wanted(name):
        data = stream.read(size)
        whole = len(data) == size
        if whole:
            yield Member(name, size, data)
            # The padding of the last member may be missing only where the archive is cut.
            whole = stream.skip(padding)
            if not whole:
                raise ShardError(f"cut: ends in the padding after {name!a}")
            return
    else:
        whole = stream.skip(size)
        if whole:
            yield Member(name, size, problem=problem)
            if not stream.skip(padding):
                raise ShardError(f"cut: ends in the padding after {name!a}")
            return
    had = stream.position - start
    yield Member(name, size, problem=f"cut after {had} of {size} bytes")
    raise ShardError(f"cut: ends inside {name!a}, after {had} of {size} bytes")


def _next_header(stream: Stream) -> tuple[int, bytes] | None:
    """After one zero block: None where only zeros follow to the end, else the next header and its start."""
    zeros = BLOCK
    while True:
        start = stream.position
        block = stream.read(BLOCK)
        if len(block) == BLOCK and block != _ZEROS:
            if zeros < 2 * BLOCK:
                raise ShardError(f"damaged: a lone zero block before byte {start}")
            return start, block
        if block.strip(b"\0"):
            raise ShardError(f"{len(block)} bytes of garbage after the end of the archive, at byte {start}")
        zeros += len(block)
        if len(block) < BLOCK:
            break
    if zeros > MAX_PADDING_BYTES:
        raise ShardError(f"ends in {zeros} zero bytes, more than any padding: a hole in the file")
    return None


def _parse(block: bytes, start: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        raise ShardError(f"damaged: no tar header at byte {start} ({error}){_looks_like(block, start)}") from error


def _looks_like(block: bytes, start: int) -> str:
    if start > 0:
        return ""
    kinds = [kind for magic, kind in _MAGIC.items() if block.lstrip()[: len(magic)] == magic]
    return f"; it looks like {kinds[0]}, and only plain .tar is read" if kinds else ""


def _size(text: str | None, header: tarfile.TarInfo, start: int) -> int:
    try:
        size = header.size if text is None else int(text)
    except ValueError as error:
        raise ShardError(f"damaged: a size of {text[:40]!a} at byte {start}") from error  # type: ignore[index]
    if size < 0:
        raise ShardError(f"damaged: a size of {size} at byte {start}")
    return size


def _extension(stream: Stream, header: tarfile.TarInfo, start: int) -> bytes:
    size = _size(None, header, start)
    if size > MAX_EXTENSION_BYTES:
        raise ShardError(
            f"damaged: a header extension of {size} bytes at byte {start}, at most {MAX_EXTENSION_BYTES} is read"
        )
    data = stream.read(size)
    if len(data) < size or not stream.skip(-size % BLOCK):
        raise ShardError(f"cut: ends inside the header extension at byte {start}")
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
        if not equals or not value.endswith(b"\n"):
            raise ShardError(f"damaged: the pax header at byte {start} is malformed")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
        position = end
    return records


def _skip_sparse_maps(stream: Stream, block: bytes, start: int) -> None:
    """Old GNU sparse headers go on in further blocks while a flag byte says so."""
    more = block[482]
    while more:
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            raise ShardError(f"cut: ends inside the sparse header at byte {start}")
        more = block[504]
