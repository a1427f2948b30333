"""Shards for the benchmark, the same in every run: photos of ImageNet's size, and many tiny ones."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from shard_embedder.jobs.support.photos import PHOTOS
from shard_embedder.pipeline.core.errors import InputError

# The mean image of ImageNet's training set has about these many pixels and bytes.
PHOTO_SIZE = (500, 375)
PHOTO_BYTES = 107_000
IMAGES_A_SHARD = 128
# A phone's photo of 12 megapixels, and the quality that it is written with.
LARGE_MEGAPIXELS = 12
_LARGE_SIZE, _LARGE_QUALITY, _LARGE_COUNT = (4032, 3024), 85, 3
# So many photos differ; a larger set repeats them under other keys.
_MAX_DISTINCT = 256
_MAX_SOURCES = 64
_TRIED = 24  # photos that the grain is chosen on
_QUALITY = 95  # what cameras and websites write photos with
_TINY_SIDE = 32
_MANIFEST = "bench.json"
_FORMAT = 1


def photo_shards(folder: Path, num_images: int, images_a_shard: int = IMAGES_A_SHARD) -> dict[str, Any]:
    """Make shards of `num_images` photos below `folder`, unless they are there, and say what they are.

    Photos are crops of real ones at `PHOTO_SIZE`, as JPEG of quality 95, with as much grain as gives them
    `PHOTO_BYTES` in the mean: their sources are small, and scaling up leaves nothing of a camera's noise.
    They come from grocery shards in EMBED_TEST_DATA where it has any, else from scikit-image.

    Raises:
        InputError: neither is there.
    """
    source, load = _sources()
    wanted = {"format": _FORMAT, "kind": "photos", "num_images": num_images, "images_a_shard": images_a_shard}

    def make() -> dict[str, Any]:
        photos = list(load())
        tried = [_View(photos, seed, PHOTO_SIZE) for seed in range(min(_TRIED, num_images))]
        grain = _choose_grain(
            lambda grain: sum(len(view.jpeg(grain, _QUALITY)) for view in tried) / len(tried), PHOTO_BYTES
        )
        views = (_View(photos, seed, PHOTO_SIZE) for seed in range(min(num_images, _MAX_DISTINCT)))
        images = [view.jpeg(grain, _QUALITY) for view in views]
        for number, start in enumerate(range(0, num_images, images_a_shard)):
            rows = range(start, min(start + images_a_shard, num_images))
            members = [(f"{row:08d}.jpg", images[row % len(images)]) for row in rows]
            (folder / f"photos-{number:05d}.tar").write_bytes(_tar(members))
        return {"size": list(PHOTO_SIZE), "grain": grain, "mean_bytes": sum(map(len, images)) // len(images)}

    return _made(folder, {**wanted, "source": source}, make)


def large_photos(num_bytes: int, megapixels: int = LARGE_MEGAPIXELS) -> list[bytes]:
    """Photos of so many megapixels: real ones scaled up, with grain that gives them so many bytes in the mean."""
    photos = list(itertools.islice(_sources()[1](), _LARGE_COUNT))
    scale = math.sqrt(megapixels / LARGE_MEGAPIXELS)
    size = round(_LARGE_SIZE[0] * scale), round(_LARGE_SIZE[1] * scale)
    views = [_View(photos, seed, size) for seed in range(_LARGE_COUNT)]

    def encoded(grain: float) -> list[bytes]:
        return [view.jpeg(grain, _LARGE_QUALITY) for view in views]

    return encoded(_choose_grain(lambda grain: sum(map(len, encoded(grain))) / _LARGE_COUNT, num_bytes))


def tiny_shards(folder: Path, num_shards: int, images_a_shard: int = 10) -> dict[str, Any]:
    """Make shards of a few images of 32 x 32 each below `folder`, unless they are there, and say what they are."""
    wanted = {"format": _FORMAT, "kind": "tiny", "num_shards": num_shards, "images_a_shard": images_a_shard}

    def make() -> dict[str, Any]:
        rng = np.random.default_rng(0)
        coarse = rng.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)
        side = (_TINY_SIDE, _TINY_SIDE)
        images = [_jpeg(Image.fromarray(one).resize(side, Image.Resampling.BICUBIC), 85) for one in coarse]
        for number in range(num_shards):
            rows = range(number * images_a_shard, (number + 1) * images_a_shard)
            members = [(f"{row:08d}.jpg", images[row % len(images)]) for row in rows]
            (folder / f"tiny-{number:06d}.tar").write_bytes(_tar(members))
        return {"size": list(side), "num_images": num_shards * images_a_shard}

    return _made(folder, wanted, make)


def _made(folder: Path, wanted: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What lies in `folder`: as its manifest says where that is what is `wanted`, else made anew."""
    manifest = folder / _MANIFEST
    try:
        found: dict[str, Any] = json.loads(manifest.read_text())
        if wanted.items() <= found.items():
            return found
    except (OSError, ValueError):
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} must be empty, or hold shards that bench.py made") from None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made = wanted | make()
    # Last, so that shards which are not all there are made again.
    manifest.write_text(json.dumps(made, indent=2) + "\n")
    return made


def _sources() -> tuple[str, Callable[[], Iterator[Image.Image]]]:
    """What the photos come from, and how they are loaded."""
    default = Path(__file__).resolve().parent.parent.parent / "shared"
    grocery = Path(os.environ.get("EMBED_TEST_DATA", default)) / "data" / "grocery"
    shards = sorted(grocery.glob("*.tar"))
    if shards:
        return "GroceryStoreDataset", lambda: _from_shards(shards)
    spec = find_spec("skimage")
    data = Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else Path()
    files = [data / name for name in PHOTOS if (data / name).exists()]
    if not files:
        raise InputError("the photos come with scikit-image: pip install scikit-image, or set EMBED_TEST_DATA")
    return "scikit-image", lambda: (Image.open(path).convert("RGB") for path in files)


def _from_shards(shards: list[Path]) -> Iterator[Image.Image]:
    left = _MAX_SOURCES
    for shard in shards:
        with tarfile.open(shard) as tar:
            for info in tar:
                file = tar.extractfile(info) if info.name.endswith(".jpg") else None
                if file is not None:
                    yield Image.open(io.BytesIO(file.read())).convert("RGB")
                    left -= 1
                if not left:
                    return


class _View:
    """Photo number `seed`: a crop of one of `photos` at `size`, perhaps mirrored; its grain is added later."""

    def __init__(self, photos: list[Image.Image], seed: int, size: tuple[int, int]) -> None:
        photo = photos[seed % len(photos)]
        rng = random.Random(seed)
        width, height = size
        scale = min(photo.width / width, photo.height / height) * rng.uniform(0.8, 1.0)
        left = rng.uniform(0, photo.width - width * scale)
        top = rng.uniform(0, photo.height - height * scale)
        box = (left, top, left + width * scale, top + height * scale)
        view = photo.resize(size, Image.Resampling.LANCZOS, box=box)
        if rng.random() < 0.5:
            view = ImageOps.mirror(view)
        self._pixels = np.asarray(view)
        self._noise = np.random.default_rng(seed).standard_normal((height, width, 1))

    def jpeg(self, grain: float, quality: int) -> bytes:
        """As a file; `grain` in levels of 256."""
        pixels = np.clip(self._pixels + grain * self._noise, 0, 255).astype(np.uint8)
        return _jpeg(Image.fromarray(pixels), quality)


def _choose_grain(mean_bytes: Callable[[float], float], wanted: int) -> float:
    """The grain with which photos have the wanted bytes in the mean, as far as any has."""
    low, high = 0.0, 20.0
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_bytes(middle) < wanted else (low, middle)
    return low


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _tar(members: list[tuple[str, bytes]]) -> bytes:
    """A tar in memory; `tarfile` would take most of the time for a hundred thousand small members."""
    pieces = []
    for name, data in members:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        pieces += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join([*pieces, bytes(2 * tarfile.BLOCKSIZE)])
