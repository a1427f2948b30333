"""Resize and crop in one step, as Pillow does."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

from shard_embedder.pipeline.decoding.preprocess import Preprocess, resized_size

# What weights may ask for, by torchvision's names. Pillow's bicubic is Catmull and Rom's: a = -0.5.
INTERPOLATIONS = {
    "bilinear": FilterType.bilinear,
    "bicubic": FilterType.catmull_rom,
    "lanczos": FilterType.lanczos3,
}
# Half the width of the widest of these filters (Lanczos), in pixels of the larger side of the scale.
_SUPPORT = 3.0
# Pixels of an image between two steps of a resize, where its source has fewer.
_MAX_BETWEEN = 2**24
# Pixels that are resized at once: what is copied of a large image.
_BAND_PIXELS = 2**22

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class Shrunk(NamedTuple):
    """The image that pixels are of which were decoded smaller, and where in them it begins; upright, as they are."""

    height: int
    width: int
    scale: float
    top: float
    left: float


def upright(pixels: np.ndarray[Any, np.dtype[np.uint8]], orientation: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB [H, W, 3] as its EXIF orientation, 2 to 8, says it is to be seen."""
    turned, mirrored = TURNS[orientation]
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, turned)


# Quarter turns against the clock, after mirroring left to right.
TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}


def resize_crop(
    pixels: np.ndarray[Any, np.dtype[np.uint8]], preprocess: Preprocess, shrunk: Shrunk | None = None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB [H, W, 3]: resized, then the centre `crop`, as torchvision does, rounding included.

    Source: `torchvision.transforms.functional.resize` and `center_crop` on PIL images.
    """
    whole = shrunk or Shrunk(pixels.shape[0], pixels.shape[1], 1.0, 0.0, 0.0)
    height, width, scale = whole.height, whole.width, whole.scale
    crop_height, crop_width = preprocess.crop
    new_height, new_width = resized_size(height, width, preprocess)
    # Where the crop is larger than the resized image, all of that is seen, on black.
    seen_height, seen_width = min(crop_height, new_height), min(crop_width, new_width)
    top, left = round((new_height - seen_height) / 2.0), round((new_width - seen_width) / 2.0)
    x, y = width / new_width, height / new_height
    box = (
        whole.left + scale * left * x,
        whole.top + scale * top * y,
        whole.left + scale * min((left + seen_width) * x, width),
        whole.top + scale * min((top + seen_height) * y, height),
    )
    height_first = is_height_first(height, width, new_height, new_width)
    resized = _resize(pixels, (seen_width, seen_height), box, INTERPOLATIONS[preprocess.interpolation], height_first)
    if (seen_height, seen_width) == preprocess.crop:
        return resized
    padded = np.zeros((crop_height, crop_width, 3), np.uint8)
    top, left = (crop_height - seen_height) // 2, (crop_width - seen_width) // 2
    padded[top : top + seen_height, left : left + seen_width] = resized
    return padded


def is_height_first(height: int, width: int, new_height: int, new_width: int) -> bool:
    """Whether Pillow resizes the height before the width: where it shrinks by over twice as many pixels.

    Which comes first shows: what is between is rounded. The rule is that of Pillow 13, found by trying.
    """
    return new_height < height and height - new_height > 2 * (width - new_width)


def _resize(
    pixels: np.ndarray[Any, np.dtype[np.uint8]],
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    interpolation: FilterType,
    height_first: bool,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The box (left, top, right, bottom) at `size` (width, height)."""
    # Only what the filter reaches is copied.
    (left, right), (top, bottom) = (
        _reached(box[axis], box[axis + 2], size[axis], pixels.shape[1 - axis]) for axis in (0, 1)
    )
    seen = pixels[top:bottom, left:right]
    height, width = seen.shape[:2]
    x, across, y, down = box[0] - left, box[2] - box[0], box[1] - top, box[3] - box[1]
    method = ResizeAlg.convolution(interpolation)
    # In Pillow's order. In the other an eighth of the values is rounded to a neighbour, and embeddings of trained
    # backbones fall to a cosine of 0.9997. But for a few columns, high as a tower, that are made wide: between the
    # steps they would be hundreds of times their size.
    if not height_first and size[0] * height <= max(width * height, _MAX_BETWEEN):
        between = _to_width(seen, size[0], CropBox(x, 0, across, height), method)
        last = CropBox(0, y, size[0], down)
    else:
        between = _to_height(seen, size[1], CropBox(0, y, width, down), method)
        last = CropBox(x, 0, across, size[1])
    return _array(_convolved(between, size, last, method))


def _to_width(pixels: Pixels, width: int, box: CropBox, method: ResizeAlg) -> ImageData:
    """All rows at `width`. Rows do not touch each other: of a large image some at a time are copied."""
    height = len(pixels)
    rows = max(1, _BAND_PIXELS // pixels.shape[1])
    if rows >= height:
        return _convolved(_image(pixels), (width, height), box, method)
    resized = np.empty((height, width, 3), np.uint8)
    for row in range(0, height, rows):
        band = pixels[row : row + rows]
        seen = CropBox(box.left, 0, box.width, len(band))
        resized[row : row + rows] = _array(_convolved(_image(band), (width, len(band)), seen, method))
    return _image(resized)


def _to_height(pixels: Pixels, height: int, box: CropBox, method: ResizeAlg) -> ImageData:
    """All columns at `height`, as `_to_width` does rows."""
    width = pixels.shape[1]
    columns = max(1, _BAND_PIXELS // len(pixels))
    if columns >= width:
        return _convolved(_image(pixels), (width, height), box, method)
    resized = np.empty((height, width, 3), np.uint8)
    for column in range(0, width, columns):
        band = pixels[:, column : column + columns]
        seen = CropBox(0, box.top, band.shape[1], box.height)
        resized[:, column : column + columns] = _array(
            _convolved(_image(band), (band.shape[1], height), seen, method)
        )
    return _image(resized)


def _convolved(image: ImageData, size: tuple[int, int], box: CropBox, method: ResizeAlg) -> ImageData:
    """The box of an image at `size` (width, height)."""
    resized = ImageData(*size, PixelType.U8x3)
    Resizer().resize(image, resized, ResizeOptions(method, crop_box=box))
    return resized


def _image(pixels: Pixels) -> ImageData:
    return ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())


def _array(image: ImageData) -> Pixels:
    return np.frombuffer(image.get_buffer(), np.uint8).reshape(image.height, image.width, 3)


def _reached(start: float, end: float, size: int, available: int) -> tuple[int, int]:
    """The first pixel and the one after the last that a filter reaches, scaling `start` to `end` to `size`."""
    margin = math.ceil(_SUPPORT * max(1.0, (end - start) / size)) + 1
    return max(0, math.floor(start) - margin), min(available, math.ceil(end) + margin)
