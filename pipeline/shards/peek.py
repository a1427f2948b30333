"""Single images of a shard, for previews and verification: read without embedding."""

from __future__ import annotations

import contextlib
import itertools
import re
import tarfile
from collections.abc import Iterator
from typing import IO, cast

from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import ShardError
from pipeline.core.redact import describe
from pipeline.core.storage import locate
from pipeline.shards.find import Shard
from pipeline.shards.keys import image_rank
from pipeline.shards.stream import ShardStream

# What tarfile raises on damage.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)
_VOLUME_LABEL = b"V"
# What tells how large the samples of a shard are.
_FRONT_SAMPLES, _FRONT_BYTES = 256, 4 * 2**20
_NAME = re.compile(r"((?:.*/)?[^/.]+)(?:\.([^/]*))?", re.DOTALL)

Members = list[tuple[str, tarfile.TarInfo]]  # (extension, member)


def images(
    shard: Shard, image_member: str | None, wanted: set[int], max_bytes: int | None = None
) -> dict[int, bytes]:
    """The encoded images of the `wanted` samples of a shard. Raises `OSError` and `ShardError`.

    With `max_bytes`, no more than the first so many bytes of the shard are read, and images beyond are not found.
    """
    found: dict[int, bytes] = {}
    num_bytes = shard.num_bytes if max_bytes is None else min(shard.num_bytes, max_bytes)
    with open_tar(shard._replace(num_bytes=num_bytes)) as tar:
        for index, (_, members) in enumerate(itertools.islice(tar.samples(), max(wanted) + 1)):
            # A local file is not cut by its number of bytes.
            if max_bytes is not None and any(m.offset_data + m.size > max_bytes for _, m in members):
                break
            data = _image(tar, members, image_member) if index in wanted else None
            if data is not None:
                found[index] = data
    return found


def image_sizes(shard: Shard, image_member: str | None, wanted: set[int]) -> dict[int, int]:
    """The bytes of the encoded images of the `wanted` samples. Raises as `images` does."""
    found: dict[int, int] = {}
    with open_tar(shard) as tar:
        for index, (_, members) in enumerate(itertools.islice(tar.samples(), max(wanted) + 1)):
            member = _find_image(members, image_member) if index in wanted else None
            if member is not None:
                found[index] = member.size
    return found


def is_one_image(shard: Shard, image_member: str | None, wanted: set[int]) -> bool:
    """Whether the `wanted` samples of a shard have the same image, byte for byte. Raises as `images` does."""
    first: bytes | None = None
    with open_tar(shard) as tar:
        for _, members in (sample for index, sample in enumerate(tar.samples()) if index in wanted):
            data = _image(tar, members, image_member)
            if data is None or (first is not None and data != first):
                return False
            first = data
    return first is not None


def mean_sample_bytes(shard: Shard) -> float | None:
    """Bytes of the shard for each sample at its front; None where it cannot be read, or has none."""
    count = end = 0
    try:
        with open_tar(shard) as tar:
            for _, members in itertools.islice(tar.samples(), _FRONT_SAMPLES):
                count, end = count + 1, max(member.offset_data + member.size for _, member in members)
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
        self._file = file
        self._tar: tarfile.TarFile | None = None

    def samples(self) -> Iterator[tuple[str, Members]]:
        """Each run of members of one key, by WebDataset's rule."""
        files = (member for member in self._members() if not member.isdir() and member.type != _VOLUME_LABEL)
        named = ((_NAME.fullmatch(member.name), member) for member in files)
        keyed = ((match[1], match[2] or "", member) for match, member in named if match is not None)
        for key, members in itertools.groupby(keyed, key=lambda item: item[0]):
            yield key, [(extension, member) for _, extension, member in members]

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

    def read(self, member: tarfile.TarInfo) -> bytes | None:
        """The data of a member; None for links and other members without data, and for one that is cut."""
        try:
            file = self._tar.extractfile(member) if self._tar is not None and member.isreg() else None
            return None if file is None else file.read()
        except _TAR_ERRORS:
            return None


def _image(tar: TarReader, members: Members, image_member: str | None) -> bytes | None:
    member = _find_image(members, image_member)
    return None if member is None else tar.read(member)


def _find_image(members: Members, image_member: str | None) -> tarfile.TarInfo | None:
    """The member that is the sample's image: its extension comes first in the documented order."""
    ranked = [(image_rank(extension, image_member), member) for extension, member in members]
    known = [(rank, member) for rank, member in ranked if rank is not None]
    return min(known, key=lambda item: item[0])[1] if known else None
