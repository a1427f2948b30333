"""Single images of a shard, for previews and verification: read without embedding."""

from __future__ import annotations

import contextlib
import itertools
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO, cast

from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import ShardError
from pipeline.core.redact import describe
from pipeline.core.storage import locate
from pipeline.shards.find import Shard
from pipeline.shards.grouping import Sample, iter_samples
from pipeline.shards.keys import Naming
from pipeline.shards.stream import ShardStream

# What tarfile raises on damage.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)
_VOLUME_LABEL = b"V"
# What tells how large the samples of a shard are.
_FRONT_SAMPLES, _FRONT_BYTES = 256, 4 * 2**20


@dataclass(frozen=True, slots=True)
class Entry:
    """A member of a shard, and where its data lies."""

    name: str
    offset: int
    num_bytes: int
    info: tarfile.TarInfo


def images(shard: Shard, naming: Naming, wanted: set[int], max_bytes: int | None = None) -> dict[int, bytes]:
    """The encoded images of the `wanted` samples of a shard. Raises `OSError` and `ShardError`.

    With `max_bytes`, no more than the first so many bytes of the shard are read, and images beyond are not found.
    """
    found: dict[int, bytes] = {}
    num_bytes = shard.num_bytes if max_bytes is None else min(shard.num_bytes, max_bytes)
    with open_tar(shard._replace(num_bytes=num_bytes)) as tar:
        for index, sample in enumerate(itertools.islice(tar.samples(naming), max(wanted) + 1)):
            image = sample.image
            # A local file is not cut by its number of bytes.
            if max_bytes is not None and image is not None and image.offset + image.num_bytes > max_bytes:
                break
            data = tar.read(image) if image is not None and index in wanted else None
            if data is not None:
                found[index] = data
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
                count, end = count + 1, tar.reached
                if end > _FRONT_BYTES:
                    break
    except (OSError, ShardError):
        return None
    return end / count if count else None


@contextlib.contextmanager
def open_tar(shard: Shard) -> Iterator[TarReader]:
    """A shard for `tarfile`, from wherever it is. Raises `OSError` and `ShardError`."""
    fs, path = locate(shard.url)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:
            yield TarReader(file)
    else:
        with ShardStream(shard.url, shard.num_bytes, shard.version) as stream:
            yield TarReader(cast(IO[bytes], _StreamFile(stream)))


class _StreamFile:
    """What `tarfile` needs of a file, for a shard on object storage: in chunks that are retried."""

    def __init__(self, stream: ShardStream) -> None:
        self._stream = stream

    def read(self, num_bytes: int) -> bytes:
        if num_bytes < 0:
            raise ValueError(f"read length must be at least 0, got {num_bytes}")
        return self._stream.read(num_bytes)

    def seek(self, offset: int) -> None:
        self._stream.position = offset

    def tell(self) -> int:
        return self._stream.position


class TarReader:
    """A shard as `tarfile` reads it with `ignore_zeros`, up to the first fault, which is then in `fault`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.fault: str | None = None
        # The byte after the last member.
        self.reached = 0
        # Image members among those that are of no sample.
        self.hidden_images = 0
        self._file = file
        self._tar: tarfile.TarFile | None = None

    def samples(self, naming: Naming, metadata: Collection[str] = frozenset()) -> Iterator[Sample[Entry]]:
        """Each sample, grouped as the job does it."""
        for found in iter_samples(self._entries(), naming, metadata):
            if isinstance(found, Sample):
                yield found
            else:
                self.hidden_images += naming.is_hidden_image(found.name)

    def _entries(self) -> Iterator[Entry]:
        for member in self._members():
            self.reached = member.offset_data + member.size
            if not member.isdir() and member.type != _VOLUME_LABEL:
                yield Entry(member.name, member.offset_data, member.size, member)

    def _members(self) -> Iterator[tarfile.TarInfo]:
        reached = -1
        try:
            self._tar = tarfile.open(  # noqa: SIM115 - it holds nothing but the caller's file
                fileobj=self._file, mode="r:", ignore_zeros=True, encoding="utf-8", errors="surrogateescape"
            )
            while (member := self._tar.next()) is not None:
                if self._tar.offset <= reached:
                    self.fault = f"it goes back to byte {self._tar.offset}"
                    return
                reached = self._tar.offset
                # tarfile keeps all members, which is gigabytes for millions.
                self._tar.members.clear()  # type: ignore[attr-defined]
                yield member
        except _TAR_ERRORS as error:
            self.fault = describe(error)

    def read(self, entry: Entry) -> bytes | None:
        """The data of a member; None for links and other members without data, and for one that is cut."""
        try:
            file = self._tar.extractfile(entry.info) if self._tar is not None and entry.info.isreg() else None
            return None if file is None else file.read()
        except _TAR_ERRORS:
            return None
