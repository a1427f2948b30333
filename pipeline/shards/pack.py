"""Folders of images packed into shards."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shard_embedder.pipeline.core.errors import InputError, OutputError, SettingsError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.progress import Progress, no_progress
from shard_embedder.pipeline.shards.keys import IMAGE_EXTENSIONS, printable, split_key
from shard_embedder.pipeline.shards.left_out import SUFFIX

# No `.tar` at its end, so that nothing below it can be taken for a shard.
TEMPORARY_PREFIX = ".packing-"
TEMPORARY_SUFFIX = ".unfinished"
_MAX_WAYS = 1000
# All that a tar header says beside name and size, so that the same images give the same bytes.
HEADER = {"mtime": 0, "user": "", "group": "", "mode": 0o644}


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Settings of one packing. Raises `SettingsError` where a value breaks its rule."""

    folder: Path
    shards: Path
    prefix: str = "images"
    max_samples: int = 10_000
    max_bytes: int = 2**30
    extensions: tuple[str, ...] = IMAGE_EXTENSIONS
    overwrite: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        for name, path in (("FOLDER", self.folder), ("SHARDS", self.shards)):
            # `Path` makes one slash of the two in s3://.
            _check(":/" not in str(path), name, "be a folder on this machine", str(path).replace(":/", "://"))
        rule = "be letters, digits, _ and -, and may have dots inside"
        _check(bool(re.fullmatch(r"[\w-][\w.-]*", self.prefix, re.ASCII)), "prefix", rule, self.prefix)
        _check(self.max_samples >= 1, "max_samples", "be at least 1", self.max_samples)
        _check(self.max_bytes >= 1, "max_bytes", "be at least 1", self.max_bytes)
        for extension in self.extensions:
            _check(extension in IMAGE_EXTENSIONS, "extensions", f"be of {', '.join(IMAGE_EXTENSIONS)}", extension)


class ImageFile(NamedTuple):
    """One image to pack. `path` is below the folder; `label`, its class, is empty where it has none."""

    path: str
    key: str
    extension: str
    label: str


class Found(NamedTuple):
    """The images of a folder in the order of their paths, and how many files are left out, by reason."""

    images: list[ImageFile]
    left_out: Counter[str]


class Packed(NamedTuple):
    """What was written."""

    names: list[str]
    num_images: int
    num_bytes: int


def _check(holds: bool, field: str, rule: str, value: Any) -> None:
    if not holds:
        raise SettingsError(f"{field} must {rule}, got {value!r}")


def find_images(folder: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS, *, follow_links: bool = False) -> Found:
    """Look through `folder` and all folders in it; what links lead to outside of it only with `follow_links`.

    Raises:
        InputError: it is no folder, cannot be read, or holds no image.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "missing"
        raise InputError(f"FOLDER must be a folder of images, got {str(folder)!r}: it is {what}")
    paths: list[str] = []
    left_out: Counter[str] = Counter()
    try:
        inside = None if follow_links else f"{os.path.realpath(folder).rstrip('/')}/"
        for path, fault in _walk(str(folder), "", (), inside, Counter()):
            reason = fault or _why_left_out(path, extensions)
            if reason:
                left_out[reason] += 1
            else:
                paths.append(path)
    except OSError as error:
        raise InputError(f"FOLDER must be readable as a whole, got {error}") from error
    if not paths:
        others = f"; {describe_left_out(left_out)}" if left_out else " in it or below it"
        raise InputError(f"FOLDER must hold images ({', '.join(extensions)}), got none in {str(folder)!r}{others}")
    return Found(_with_keys(sorted(paths)), left_out)


def holds_images(folder: Path) -> bool:
    """Whether `find_images` may find any, or a fault to tell of."""
    inside = f"{os.path.realpath(folder).rstrip('/')}/"
    try:
        found = _walk(str(folder), "", (), inside, Counter())
        return any(not (fault or _why_left_out(path, IMAGE_EXTENSIONS)) for path, fault in found)
    except OSError:
        return True


def _walk(
    folder: str,
    prefix: str,
    above: tuple[tuple[int, int], ...],
    inside: str | None,
    ways: Counter[tuple[int, int]],
) -> Iterator[tuple[str, str]]:
    """Every file as (path below the top, why it is no file to read or ""). Links are followed, out of `inside` not.

    `ways` counts how often each folder was come by: links in linked folders double that at each step.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        yield prefix, "links to a folder that holds them"
        return
    ways[here] += 1
    if ways[here] > _MAX_WAYS:
        raise OSError(f"links that lead in more than {_MAX_WAYS} ways to {folder}")
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            is_out = inside is not None and entry.is_symlink() and not _leads_into(inside, entry.path)
            # Unlike those of `entry`, these are false for a link to itself.
            if os.path.isdir(entry.path) and not is_out:
                yield from _walk(entry.path, f"{path}/", (*above, here), inside, ways)
            elif not os.path.exists(entry.path) or not (os.path.isfile(entry.path) or is_out):
                yield path, "broken links and special files"
            else:
                yield path, "links out of the folder" if is_out else ""


def _leads_into(inside: str, path: str) -> bool:
    return f"{os.path.realpath(path)}/".startswith(inside)


def _why_left_out(path: str, extensions: tuple[str, ...]) -> str:
    if any(name.startswith(".") for name in path.split("/")):
        return "hidden"
    extension = os.path.splitext(path)[1][1:].lower()
    if extension in extensions:
        return ""
    return f".{printable(extension)}" if extension else "without an extension"


def _with_keys(paths: list[str]) -> list[ImageFile]:
    """Images with keys that no two share."""
    stems = Counter(os.path.splitext(path)[0] for path in paths)
    images = []
    for path in paths:
        stem, extension = os.path.splitext(path)
        key = make_key(stem) + (f"~{extension[1:]}" if stems[stem] > 1 else "")
        images.append(ImageFile(path, key, extension[1:].lower(), path.rpartition("/")[0]))
    assert len({image.key for image in images}) == len(images)
    return images


def make_key(stem: str) -> str:
    """The WebDataset key for a path without its extension; no two paths have the same.

    A key ends at the first dot of the basename, so dots there are escaped, and so are `%` and `~`, which
    keys use themselves, backslashes, and what cannot be printed.
    """
    folder, slash, base = stem.rpartition("/")
    return _escaped(folder, "") + slash + _escaped(base, ".")


def _escaped(text: str, also: str) -> str:
    return "".join(
        character
        if character.isprintable() and character not in "%~\\" + also
        else "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
        for character in text
    )


def pack(config: PackConfig, found: Found, on_progress: Progress = no_progress) -> Packed:
    """Write the images as shards, which appear in `config.shards` when all are written.

    Raises:
        OutputError: the folder holds shards, and may not or must not be overwritten.
        OSError: an image cannot be read, or a shard not written; no new shard has appeared.
    """
    old = check_old_shards(config)
    config.shards.mkdir(parents=True, exist_ok=True)
    for leftover in config.shards.glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=config.shards) as temporary:
        num_bytes = _write(config, found.images, temporary, on_progress)
        names = _publish(Path(temporary), config.shards, old)
    return Packed(names, len(found.images), num_bytes)


def check_old_shards(config: PackConfig) -> list[Path]:
    """Shards that this packing replaces."""
    if not config.shards.exists():
        return []
    if not config.shards.is_dir():
        raise OutputError(f"SHARDS must be a folder, got the file {str(config.shards)!r}")
    old = sorted(path for path in config.shards.iterdir() if path.suffix == SUFFIX)
    foreign = [path.name for path in old if not re.fullmatch(rf"{re.escape(config.prefix)}-\d+", path.stem)]
    if old and not config.overwrite:
        raise OutputError(
            f"SHARDS must hold no shards, got {len(old)} in {str(config.shards)!r} ({old[0].name}); "
            "choose another folder, or give --overwrite to replace them"
        )
    if foreign:
        raise OutputError(
            f"--overwrite replaces {config.prefix}-*.tar only, got {len(foreign)} others in {str(config.shards)!r} "
            f"({foreign[0]}); remove them, or choose another folder"
        )
    return old


def _write(config: PackConfig, images: Sequence[ImageFile], temporary: str, on_progress: Progress) -> int:
    """Write the shards under temporary names, and return the number of image bytes in them."""
    from webdataset import ShardWriter  # noqa: PLC0415  imports torch, which takes seconds; most that import this plan

    numbers = {label: i for i, label in enumerate(sorted({image.label for image in images} - {""}))}
    # ShardWriter fills in the shard's number with the % operator, and takes other % for its own.
    pattern = f"{temporary.replace('%', '%%')}/{config.prefix}-%05d{SUFFIX}{TEMPORARY_SUFFIX}"
    num_bytes = shard_bytes = 0
    # ShardWriter's own limit of bytes counts no headers, and is looked at only after it is passed.
    with ShardWriter(pattern, config.max_samples, sys.maxsize, verbose=0, encoder=False, **HEADER) as writer:
        for number, image in enumerate(images, 1):
            sample = make_sample(config.folder, image, numbers)
            sample_bytes = _tar_bytes(sample)
            if writer.count and _padded(shard_bytes + sample_bytes) > config.max_bytes:
                writer.next_stream()
            shard_bytes = sample_bytes + (shard_bytes if 0 < writer.count < config.max_samples else 0)
            writer.write(sample)
            num_bytes += len(sample[image.extension])
            on_progress("images packed", number, len(images))
    return num_bytes


def make_sample(folder: Path, image: ImageFile, numbers: Mapping[str, int]) -> dict[str, Any]:
    """The sample of one image, as `ShardWriter` takes it. Its class gets a `.cls` if `numbers` has it."""
    about = {"path": printable(image.path), "class": printable(image.label) or None}
    sample = {
        "__key__": image.key,
        image.extension: (folder / image.path).read_bytes(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }
    if image.label in numbers:
        sample["cls"] = str(numbers[image.label]).encode()
    assert split_key(f"{image.key}.json") == (image.key, "json")
    return sample


def _tar_bytes(sample: dict[str, Any]) -> int:
    """Bytes that a sample takes in a tar, headers and padding included."""
    names = [name for name in sample if name != "__key__"]
    headers = sum(len(tarfile.TarInfo(f"{sample['__key__']}.{name}").tobuf()) for name in names)
    return headers + sum(len(sample[name]) + -len(sample[name]) % tarfile.BLOCKSIZE for name in names)


def _padded(num_bytes: int) -> int:
    """Size of a tar whose members take `num_bytes`."""
    whole = num_bytes + 2 * tarfile.BLOCKSIZE
    return whole + -whole % tarfile.RECORDSIZE


def _publish(temporary: Path, shards: Path, old: list[Path]) -> list[str]:
    """Replace the old shards by the new, and return the new names.

    The first shard is the first that goes and the last that comes: a death in between leaves a set whose
    gap is plain to see.
    """
    written = sorted(temporary.iterdir())
    for path in written:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for path in old:
        path.unlink()
    names = [path.name.removesuffix(TEMPORARY_SUFFIX) for path in written]
    for path, name in reversed(list(zip(written, names, strict=True))):
        path.replace(shards / name)
    return names


def describe_left_out(left_out: Counter[str]) -> str:
    """Which files were not packed: how many, by reason."""
    reasons = ", ".join(f"{left_out[reason]} {reason}" for reason in sorted(left_out))
    return f"left out, as no images, {format_count(left_out.total(), 'file')}: {reasons}"
