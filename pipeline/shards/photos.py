"""A folder of images as shards: packed below an output, and kept like the folder from run to run.

Each shard has a list of the images that it was made of, with their sizes and modification times. New images get new
shards. A shard of which an image was changed or deleted is written again. The other shards stay as they are.
"""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem

from shard_embedder.pipeline.core.config import Field
from shard_embedder.pipeline.core.errors import InputError, NoShardError, OutputError, StoredDataError
from shard_embedder.pipeline.core.formatting import format_count, format_size
from shard_embedder.pipeline.core.groups import grouped
from shard_embedder.pipeline.core.progress import Progress, no_progress
from shard_embedder.pipeline.core.storage import locate
from shard_embedder.pipeline.shards.find import ShardSet, find_shards
from shard_embedder.pipeline.shards.left_out import SUFFIX
from shard_embedder.pipeline.shards.pack import (
    HEADER,
    TEMPORARY_PREFIX,
    TEMPORARY_SUFFIX,
    Found,
    ImageFile,
    find_images,
    holds_images,
    make_sample,
)

# Below the output.
PACKED = "packed"
# Where an image is below its folder, which is its id; `make_sample` writes it.
PATH = Field.parse("json:path")
_PREFIX, _LIST_SUFFIX = "images-", ".json"
# Beside the images themselves: three tar headers, a `.json`, and padding.
_BYTES_BESIDE = 3072

# Size and modification time of an image, by its path.
Stamp = tuple[int, int]
Stamps = dict[str, Stamp]


class PackingRules(NamedTuple):
    """What a shard holds at most, and the extensions of images that cannot be decoded, and are not packed.

    A changed image makes the job embed all of its shard again: it is small.
    """

    max_samples: int = 1000
    max_bytes: int = 2**30
    undecodable: tuple[str, ...] = ()


RULES = PackingRules()


@dataclass(frozen=True, kw_only=True)
class Photos:
    """A folder of images, and what of it is yet to be packed into `shards`.

    `to_write` are the images of each shard to write, by its name; none where all of them were deleted.
    """

    folder: Path
    shards: Path
    rules: PackingRules
    found: Found
    stamps: Stamps
    to_write: dict[str, list[ImageFile]]
    num_new: int
    num_changed: int
    num_deleted: int
    num_undecodable: int

    @property
    def is_begun(self) -> bool:
        """Whether any shard is packed."""
        return any(self.shards.glob(f"*{SUFFIX}"))

    @property
    def num_images(self) -> int:
        """Images that are packed, or to be packed."""
        return len(self.stamps) - self.num_undecodable

    @property
    def num_to_pack(self) -> int:
        """Images in the shards to write."""
        return sum(map(len, self.to_write.values()))

    @property
    def bytes_to_pack(self) -> int:
        """Bytes of these images."""
        return sum(self.stamps[image.path][0] for images in self.to_write.values() for image in images)

    def __str__(self) -> str:
        """What is to be packed, such as `12 of 96 images (3.1 MiB) of photos into 1 shard in out/packed: 12 new`."""
        total = format_count(self.num_images, "image")
        if not self.to_write:
            return f"{total} of {self.folder}, all in {self.shards}"
        number = "" if self.num_to_pack == self.num_images else f"{self.num_to_pack:,} of "
        changes = ((self.num_new, "new"), (self.num_changed, "changed"), (self.num_deleted, "deleted"))
        why = ", ".join(f"{count:,} {what}" for count, what in changes if count)
        # Whole shards are written, so that images that did not change may be among them.
        shards = format_count(len(self.to_write), "shard")
        return (
            f"{number}{total} of {self.folder} ({format_size(self.bytes_to_pack)}) into {shards} in {self.shards}"
            + (f": {why}" if number else "")
        )


def find_shards_or_images(inputs: Sequence[str]) -> ShardSet | Path:
    """The shards that inputs name; if they name none, the folder of images on this machine that they are.

    Raises:
        InputError: they name neither.
    """
    try:
        return find_shards(inputs)
    except NoShardError:
        folder = local_folder(inputs[0]) if len(inputs) == 1 else None
        if folder is None or not holds_images(folder):
            raise
        return folder


def local_folder(url: str) -> Path | None:
    """Where a folder is on this machine, there or yet to be made; None where it is elsewhere, or a file."""
    fs, path = locate(url)
    is_folder = isinstance(fs, LocalFileSystem) and (os.path.isdir(path) or not os.path.lexists(path))
    return Path(path) if is_folder else None


def find_photos(folder: Path, output: Path, rules: PackingRules = RULES) -> Photos:
    """The images of `folder`, compared with what is packed below `output`.

    Raises:
        InputError: the folder cannot be read, holds no image, or holds the output.
        OutputError: something else is packed there.
    """
    if output.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"output must lie outside of the folder of images {str(folder)!r}, got {str(output)!r}: "
            "its shards would become a part of the input"
        )
    shards = output / PACKED
    found = find_images(folder)
    return _compare(folder, shards, rules, found, {image.path: _stamp(folder / image.path) for image in found.images})


def compare_again(photos: Photos) -> Photos:
    """The same with what is packed now: another run may have packed since."""
    return _compare(photos.folder, photos.shards, photos.rules, photos.found, photos.stamps)


def _compare(folder: Path, shards: Path, rules: PackingRules, found: Found, stamps: Stamps) -> Photos:
    packed = dict(_read_lists(shards))
    images = {image.path: image for image in found.images}
    to_write: dict[str, list[ImageFile]] = {}
    num_listed = num_known = num_changed = num_deleted = 0
    new = dict(images)
    for name, listed in packed.items():
        there = [path for path in listed if new.pop(path, None) is not None]
        changed = sum(stamps[path] != listed[path] for path in there)
        if changed or len(there) < len(listed) or not (shards / f"{name}{SUFFIX}").exists():
            to_write[name] = [images[path] for path in there]
        # With another time alone it may still be the same image.
        num_known += sum(stamps[path][0] == listed[path][0] for path in there)
        num_listed += len(listed)
        num_changed += changed
        num_deleted += len(listed) - len(there)
    if num_listed and not num_known:
        raise OutputError(
            f"input must be the folder that the output was made of, got {str(folder)!r}: it has none of the "
            f"{format_count(num_listed, 'image')} in {shards}; choose another output"
        )
    undecodable = [image.path for image in new.values() if image.extension in rules.undecodable]
    for path in undecodable:
        del new[path]
    first = max((int(name.removeprefix(_PREFIX)) + 1 for name in packed), default=0)
    groups = grouped(new.values(), lambda image: stamps[image.path][0], rules.max_bytes, rules.max_samples)
    for number, some in enumerate(groups, first):
        to_write[f"{_PREFIX}{number:05d}"] = some
    return Photos(
        folder=folder,
        shards=shards,
        rules=rules,
        found=found,
        stamps=stamps,
        to_write=to_write,
        num_new=len(new),
        num_changed=num_changed,
        num_deleted=num_deleted,
        num_undecodable=len(undecodable),
    )


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"an image of the input cannot be read: {error}") from error
    return status.st_size, status.st_mtime_ns


def _read_lists(shards: Path) -> Iterator[tuple[str, Stamps]]:
    """The packed shards by their names, each with its images."""
    for path in sorted(shards.glob(f"*{SUFFIX}")):
        if not path.with_suffix(_LIST_SUFFIX).exists():
            raise OutputError(f"{shards} must hold only what was packed there, got {path.name}; move it elsewhere")
    for path in sorted(shards.glob(f"{_PREFIX}*{_LIST_SUFFIX}")):
        if not path.stem.removeprefix(_PREFIX).isdecimal():
            continue
        try:
            listed = {image: (size, time) for image, (size, time) in json.loads(path.read_bytes()).items()}
        except (ValueError, AttributeError, TypeError) as error:
            raise StoredDataError(f"{path} is damaged: delete {shards}, and all images are packed again") from error
        yield path.stem, listed


def pack_photos(photos: Photos, on_progress: Progress = no_progress) -> None:
    """Write the shards that are to be written, one after the other: a later call goes on after the last.

    Raises:
        OutputError: the disk has no room for them.
        OSError: an image cannot be read, or a shard not written.
    """
    # It imports torch, which takes seconds.
    from webdataset import TarWriter  # noqa: PLC0415

    photos.shards.mkdir(parents=True, exist_ok=True)
    needed = photos.bytes_to_pack + _BYTES_BESIDE * photos.num_to_pack
    free = shutil.disk_usage(photos.shards).free
    if needed > free:
        raise OutputError(
            f"{photos.shards} must have room for the packed images, {format_size(needed)}, got {format_size(free)}"
        )
    for leftover in photos.shards.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover)
    done = itertools.count(1)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=photos.shards) as temporary:
        for name, images in photos.to_write.items():
            fresh = Path(temporary, f"{name}{SUFFIX}{TEMPORARY_SUFFIX}")
            with TarWriter(str(fresh), encoder=False, **HEADER) as writer:
                for image in images:
                    writer.write(make_sample(photos.folder, image, {}))
                    on_progress("images packed", next(done), photos.num_to_pack)
            _publish(
                fresh, photos.shards / f"{name}{SUFFIX}", {image.path: photos.stamps[image.path] for image in images}
            )


def _publish(fresh: Path, shard: Path, listed: Stamps) -> None:
    """Put a shard and its list in place. A list without its shard, which a death may leave, has it written again."""
    stays = shard.exists() and filecmp.cmp(fresh, shard, shallow=False)
    if not stays:
        with fresh.open("rb") as file:
            os.fsync(file.fileno())
        shard.unlink(missing_ok=True)
    fresh_list = fresh.with_name(f"{shard.stem}{_LIST_SUFFIX}")
    fresh_list.write_text(json.dumps(listed), encoding="ascii")
    fresh_list.replace(shard.with_suffix(_LIST_SUFFIX))
    if not stays:
        fresh.replace(shard)
