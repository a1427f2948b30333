"""Image bytes to uint8 RGB pixels, resized and cropped as the weights ask.

Pillow decodes and resizes, as `weights.transforms()` does on a PIL image; resize and centre crop are one
`Image.resize` with a box in source coordinates, which gives the pixels of the two steps without making
those that the crop throws away.
"""

from __future__ import annotations

import io
import struct
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from pipeline.errors import SampleError
from pipeline.schema import (
    IMAGE,
    PIXELS,
    REASON,
    STAGE,
    STAGE_DECODE,
    part_row,
    part_rows,
    pixels_field,
    with_payload,
)

# Formats that Pillow reads by itself; never those that run another program (EPS) or fetch anything.
FORMATS = (
    "JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "ICO",
)  # fmt: skip
# Everything that Pillow raises on broken input, by its sources and by fuzzing.
_PILLOW_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    struct.error,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    ZeroDivisionError,
    AttributeError,
    NotImplementedError,
    MemoryError,
    Image.DecompressionBombError,
)
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of one weights: what `weights.transforms()` does to a PIL image.

    `resize` is the length of the shorter side in pixels, `crop` (height, width); `mean` and `std` are
    for RGB in 0 to 1.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def with_size(self, size: tuple[int, int]) -> Preprocess:
        """For another input size: the longer side keeps the ratio of resize to crop."""
        resize = round(max(size) * self.resize / max(self.crop))
        return Preprocess(resize, size, self.interpolation, self.mean, self.std)


class Decoder:
    """Decodes by the rules of one job."""

    def __init__(self, preprocess: Preprocess, *, max_pixels: int, ignore_orientation: bool) -> None:
        self._preprocess = preprocess
        self._max_pixels = max_pixels
        self._ignore_orientation = ignore_orientation
        self._resample = Image.Resampling[preprocess.interpolation.upper()]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Parts with encoded images in, the same parts with pixels out."""
        return pa.concat_tables([self._part(values, samples) for values, samples in part_rows(table)])

    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = time.perf_counter()
        height, width = self._preprocess.crop
        pixels = np.zeros((len(samples), height, width, 3), np.uint8)
        stages, reasons = samples.field(STAGE).to_pylist(), samples.field(REASON).to_pylist()
        for row, image in enumerate(samples.field(IMAGE)):
            if reasons[row] is not None:
                continue
            try:
                pixels[row] = self.decode(image.as_buffer())
            except SampleError as error:
                stages[row], reasons[row] = STAGE_DECODE, str(error)
        payload = pixels_field(height, width)
        mask = pa.array([reason is not None for reason in reasons], pa.bool_())
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(pixels.reshape(-1)), type=payload.type, mask=mask if len(mask) else None
        )
        decoded = with_payload(
            samples,
            payload,
            **{STAGE: pa.array(stages, pa.string()), REASON: pa.array(reasons, pa.string()), PIXELS: column},
        )
        return part_row({**values, "decode_s": time.perf_counter() - start}, decoded)

    def decode(self, data: bytes | pa.Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One encoded image as uint8 RGB of shape [H, W, 3].

        Raises:
            SampleError: not an image, broken, or larger than `max_pixels`.
        """
        if len(data) == 0:
            raise SampleError("empty: 0 bytes")
        # The header alone tells the size, so that a bomb is refused before a pixel is decoded.
        Image.MAX_IMAGE_PIXELS = self._max_pixels
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                    num_pixels = image.width * image.height
                    if num_pixels > self._max_pixels:
                        raise SampleError(
                            f"too many pixels: {image.width}x{image.height}, the limit is {self._max_pixels}"
                        )
                    return self._to_pixels(image)
        except UnidentifiedImageError as error:
            raise SampleError("not an image of a known format") from error
        except Image.DecompressionBombError as error:
            raise SampleError(f"too many pixels: {error}") from error
        except _PILLOW_ERRORS as error:
            raise SampleError(f"broken image: {type(error).__name__}: {str(error)[:200]}") from error

    def _to_pixels(self, image: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
        orientation = 1 if self._ignore_orientation else _orientation(image)
        rgb = to_rgb(image)
        if orientation != 1:
            rgb = _upright(rgb, orientation)
        return np.asarray(resize_crop(rgb, self._preprocess, self._resample))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is missing or broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSE[orientation])


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as `Image.convert` gives it, but 16-bit grey is scaled to 8 bits instead of clipped.

    Alpha is dropped, as `weights.transforms()` users do with `convert("RGB")`.
    """
    image.load()
    if image.mode.startswith("I;16"):
        wide = np.asarray(image, dtype=np.uint16)
        return Image.fromarray((wide >> 8).astype(np.uint8), "L").convert("RGB")
    if image.mode == "I":
        wide = np.asarray(image)
        return Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8), "L").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resize_crop(image: Image.Image, preprocess: Preprocess, resample: Image.Resampling) -> Image.Image:
    """Shorter side to `resize`, then the centre `crop`: torchvision's Resize and CenterCrop, rounding included.

    Source: `torchvision.transforms.functional.resize` and `center_crop` on PIL images.
    """
    width, height = image.size
    short, long = sorted((width, height))
    long = int(preprocess.resize * long / short)
    new_width, new_height = (preprocess.resize, long) if width <= height else (long, preprocess.resize)
    crop_height, crop_width = preprocess.crop
    top, left = round((new_height - crop_height) / 2.0), round((new_width - crop_width) / 2.0)
    if top < 0 or left < 0:
        # The crop is larger than the image: torchvision pads with zeros.
        resized = image.resize((new_width, new_height), resample)
        return resized.crop((left, top, left + crop_width, top + crop_height))
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, (left + crop_width) * x, (top + crop_height) * y)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))
    return image.resize((crop_width, crop_height), resample, box=box)
