"""Single images of a shard, for previews and verification: read without embedding.

A shard is walked here from header to header, apart from the job's own walk (`tars.iter_members`), so that a
fault of that one shows. The standard library says of each block whether it is a header, and how many bytes
follow it; names are by the job's rules.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from fsspec.implementations.local import LocalFileSystem

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.storage import locate
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.grouping import Sample, brief, iter_samples
from shard_embedder.pipeline.shards.headers import (
    BLOCK,
    LONG_TYPES,
    MAX_EXTENSION_BYTES,
    MAX_PAX_BYTES,
    PAX_TYPES,
    VOLUME_LABEL,
    Header,
    PaxRecords,
    Stream,
    member_name,
    parse_header,
    problem_of,
    read_pax,
    skip_sparse_maps,
)
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.stream import ShardStream

# What tells how large the samples of a shard are.
_FRONT_SAMPLES, _FRONT_BYTES = 256, 4 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a shard, and where its data lies. Without `has_data` it is a link, a device, sparse or cut."""

    name: str
    offset: int
    num_bytes: int
    has_data: bool


def images(shard: Shard, naming: Naming, wanted: set[int], max_bytes: int | None = None) -> dict[int, bytes]:
    """The encoded images of the `wanted` samples of a shard. Raises `OSError` and `ShardError`.

    With `max_bytes`, no more than the first so many bytes of the shard are read, and images beyond are not found.
    """
    found: dict[int, bytes] = {}
    num_bytes = shard.num_bytes if max_bytes is None else min(shard.num_bytes, max_bytes)
    with open_tar(shard._replace(num_bytes=num_bytes)) as tar:
        for index, sample in enumerate(itertools.islice(tar.samples(naming), max(wanted) + 1)):
            data = tar.read(sample.image) if sample.image is not None and index in wanted else None
            if data is not None:
                found[index] = data
    return found


def image_sizes(shard: Shard, naming: Naming, wanted: set[int]) -> dict[int, int]:
    """The bytes of the encoded images of the `wanted` samples. Raises as `images` does."""
    found: dict[int, int] = {}
    with open_tar(shard) as tar:
        for index, sample in enumerate(itertools.islice(tar.samples(naming), max(wanted) + 1)):
            if sample.image is not None and index in wanted:
                found[index] = sample.image.num_bytes
    return found


def is_one_image(shard: Shard, naming: Naming, wanted: set[int]) -> bool:
    """Whether the `wanted` samples of a shard have the same image, byte for byte. Raises as `images` does."""
    first: bytes | None = None
    with open_tar(shard) as tar:
        for sample in (sample for index, sample in enumerate(tar.samples(naming)) if index in wanted):
            data = None if sample.image is None else tar.read(sample.image)
            if data is None or (first is not None and data != first):
                return False
            first = data
    return first is not None


def mean_sample_bytes(shard: Shard, naming: Naming) -> float | None:
    """Bytes of the shard for each sample at its front; None where it cannot be read, or has none."""
    count = end = 0
    try:
        with open_tar(shard) as tar:
            for _ in itertools.islice(tar.samples(naming), _FRONT_SAMPLES):
                count, end = count + 1, tar.sample_end
                if end > _FRONT_BYTES:
                    break
    except (OSError, ShardError):
        return None
    return end / count if count else None


@contextlib.contextmanager
def open_tar(shard: Shard) -> Iterator[TarReader]:
    """A shard to walk, from wherever it is. Raises `OSError` and `ShardError`."""
    fs, path = locate(shard.url)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:
            yield TarReader(_FileStream(file, shard.num_bytes))
    else:
        with ShardStream(shard.url, shard.num_bytes, shard.version) as stream:
            yield TarReader(stream)


class _FileStream:
    """A local file, of which only what is asked for is read."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self.num_bytes = min(num_bytes, os.fstat(file.fileno()).st_size)

    @property
    def position(self) -> int:
        return self._file.tell()

    @position.setter
    def position(self, position: int) -> None:
        self._file.seek(position)

    def read(self, num_bytes: int) -> bytes:
        return self._file.read(max(min(num_bytes, self.num_bytes - self._file.tell()), 0))

    def skip(self, num_bytes: int) -> bool:
        end = self._file.tell() + num_bytes
        self._file.seek(min(end, self.num_bytes))
        return end <= self.num_bytes


class TarReader:
    """A shard from its first header to the last, past ends of archives and damage, up to the first fault.

    `fault` says then what it is. `hidden_images` counts image members that are of no sample, `sample_end` is the
    byte after the sample that was given last.
    """

    def __init__(self, stream: Stream) -> None:
        self.fault: str | None = None
        self.hidden_images = 0
        self.sample_end = 0
        self._stream = stream

    def samples(self, naming: Naming, metadata: Collection[str] = frozenset()) -> Iterator[Sample[Entry]]:
        """Each sample, grouped as the job does it."""
        for found in iter_samples(self._entries(), naming, metadata):
            if isinstance(found, Sample):
                yield found
            else:
                self.hidden_images += naming.is_hidden_image(found.name)

    def _entries(self) -> Iterator[Entry]:
        stream = self._stream
        extensions = _Extensions()
        begin: int | None = None
        while True:
            start = stream.position
            block = stream.read(BLOCK)
            if len(block) < BLOCK:
                if block.strip(b"\0") or begin is not None:
                    self.fault = f"cut: ends inside the header at byte {start}"
                return
            try:
                header = parse_header(block)
            except (tarfile.HeaderError, ValueError):
                # Zeros or damage. Another header may follow.
                extensions, begin = _Extensions(), None
                continue
            # Of a member, with the extensions before it.
            begin = start if begin is None else begin
            try:
                if extensions.take(stream, header):
                    continue
                if header.type == tarfile.GNUTYPE_SPARSE:
                    skip_sparse_maps(stream, block, start)
                size = _data_bytes(header, extensions.pax)
            except (ValueError, ShardError) as error:
                self.fault = f"damaged: {error}"
                return
            name, pax = member_name(header, extensions.pax, extensions.long_name), extensions.pax
            offset, left = stream.position, stream.num_bytes - stream.position
            self.sample_end, begin, extensions = begin, None, _Extensions()
            if not header.is_folder and header.type != VOLUME_LABEL:
                yield Entry(name, offset, size, size <= left and problem_of(header, pax) is None)
            if size > left:
                self.fault = f"cut: ends inside {brief(name)} at byte {offset}, after {left} of {size} bytes"
                return
            self.sample_end = stream.position = offset + size
            stream.skip(-size % BLOCK)

    def read(self, entry: Entry) -> bytes | None:
        """The data of a member; None where it has none."""
        if not entry.has_data:
            return None
        position, self._stream.position = self._stream.position, entry.offset
        data = self._stream.read(entry.num_bytes)
        self._stream.position = position
        return data


@dataclass(slots=True)
class _Extensions:
    """What the header extensions before a member say of it."""

    pax: PaxRecords | None = None
    long_name: str | None = None

    def take(self, stream: Stream, header: Header) -> bool:
        """Read what follows a header, if that is an extension's. Raises `ValueError` where it is malformed."""
        is_pax, size = header.type in PAX_TYPES, header.size
        if not is_pax and header.type not in LONG_TYPES:
            return False
        most = min(MAX_PAX_BYTES if is_pax else MAX_EXTENSION_BYTES, stream.num_bytes - stream.position)
        if not 0 <= size <= most:
            raise ValueError(f"a header extension of {size} bytes before byte {stream.position}, of {most} at most")
        if is_pax:
            records = read_pax(stream, size)
            self.pax = self.pax if header.type == tarfile.XGLTYPE else records
        else:
            text = stream.read(size).split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
            self.long_name = text if header.type == tarfile.GNUTYPE_LONGNAME else self.long_name
        stream.skip(-size % BLOCK)
        return True


def _data_bytes(header: Header, pax: PaxRecords | None) -> int:
    """How many bytes of data follow a header. Raises `ValueError` where it does not say."""
    if not header.has_data or header.type == VOLUME_LABEL:
        return 0
    size = header.size if pax is None or pax.size is None else int(pax.size)
    if size < 0:
        raise ValueError(f"a size of {size}")
    return size
