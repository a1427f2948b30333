"""Image bytes to uint8 RGB pixels, resized and cropped as the weights ask.

Pillow is the reference, and reads every header. Plain JPEGs are then decoded by libjpeg-turbo without
Pillow around it, to the same pixels: only those in which it finds nothing to complain of, so that what is
broken stays Pillow's to judge. Resize and centre crop are one convolution with a box in source coordinates,
which gives the pixels of the two steps without making those that the crop throws away. It is done by
fast_image_resize, which has Pillow's filters with SIMD: in less than half the time, to the same values but for a few.
"""

from __future__ import annotations

import io
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from pipeline.core.errors import SampleError
from pipeline.core.schema import (
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
from pipeline.decoding.resize import resize_crop, upright
from pipeline.decoding.rules import DecodingRules

# Formats that Pillow reads by itself; never those that run another program (EPS) or fetch anything.
FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "ICO",
)  # fmt: skip
# What Pillow raises on broken input: the first line is what 100,000 broken files of every format raised,
# the second what Pillow itself expects of its parsers (`ImageFile.__init__`), and a lack of memory.
_PILLOW_ERRORS = (
    OSError, ValueError, SyntaxError, RuntimeError, struct.error,
    IndexError, TypeError, KeyError, EOFError, ArithmeticError, MemoryError,
)  # fmt: skip
_ORIENTATION_TAG, _BITS_TAG = 0x0112, 0x0102
# A JPEG, progressive or not, can repeat its scans, each as much work as a decode and ten bytes long or more: what all
# of them go over is at most this many times `max_pixels`. Encoders write ten or so.
MAX_SCANS = 100
_START_OF_SCAN, _SCAN_BYTES = b"\xff\xda", 10


class Header(NamedTuple):
    """What Pillow reads of a JPEG before it is decoded; `orientation` (1 to 8) is what it has to be turned by."""

    height: int
    width: int
    orientation: int


@contextmanager
def pillow_does_not_warn() -> Iterator[None]:
    """Pillow warns of what it reads in spite of faults. For a part: a filter for each image would cost time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


class Decoder:
    """Decodes by one set of rules."""

    # Of the core, which tasks share: there may be more of them than cores.
    clock = staticmethod(time.thread_time)

    def __init__(self, rules: DecodingRules) -> None:
        self.rules = rules

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Parts with encoded images in, the same parts with pixels out: one by one, as these may be far larger."""
        for values, samples in part_rows(table):
            yield self._part(values, samples)

    @pillow_does_not_warn()
    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = self.clock()
        height, width = self.rules.preprocess.crop
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
        return part_row({**values, "decode_s": self.clock() - start}, decoded)

    def decode(self, data: bytes | pa.Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One encoded image as uint8 RGB of shape [H, W, 3].

        Raises:
            SampleError: not an image, broken, or larger than `max_pixels`.
        """
        if len(data) == 0:
            raise SampleError("empty: 0 bytes")
        pixels, orientation = self._load(bytes(memoryview(data)))
        if orientation != 1:
            pixels = upright(pixels, orientation)
        return resize_crop(pixels, self.rules.preprocess)

    def jpeg_header(self, data: bytes) -> Header | None:
        """The header of a JPEG, RGB or grey, that is not refused by it; None for everything else."""
        try:
            with self._bounded():
                image = _open(data)
                self._check_work(image, data)
        except (SampleError, Image.DecompressionBombError, *_PILLOW_ERRORS):
            return None
        if not _is_jpeg(image):
            return None
        return Header(image.height, image.width, 1 if self.rules.ignore_orientation else _orientation(image))

    def _load(self, data: bytes) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], int]:
        """The image as RGB [H, W, 3], and the orientation that it has yet to be turned by."""
        try:
            with self._bounded():
                image = _open(data)
                self._check_work(image, data)
                pixels = _plain_jpeg(image, data)
                if pixels is not None:
                    return pixels, 1 if self.rules.ignore_orientation else _orientation(image)
                orientation = _orientation_after_load(image, self.rules.ignore_orientation)
                return np.asarray(to_rgb(image)), orientation
        except UnidentifiedImageError as error:
            raise SampleError("not an image of a known format") from error
        except Image.DecompressionBombError as error:
            raise SampleError(f"too many pixels: {error}") from error
        except _PILLOW_ERRORS as error:
            raise SampleError(f"broken image: {type(error).__name__}: {str(error)[:200]}") from error

    @contextmanager
    def _bounded(self) -> Iterator[None]:
        """Pillow refuses by the header alone what has over twice `max_pixels`; the process keeps its own limit."""
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, self.rules.max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before

    def _check_work(self, image: Image.Image, data: bytes) -> None:
        """Refuse a bomb before a pixel is decoded."""
        num_pixels = image.width * image.height
        if num_pixels > self.rules.max_pixels:
            raise SampleError(f"too many pixels: {image.width}x{image.height}, the limit is {self.rules.max_pixels}")
        limit = MAX_SCANS * self.rules.max_pixels
        # Most images are too small for it, whatever they hold.
        if image.format in ("JPEG", "MPO") and len(data) // _SCAN_BYTES * num_pixels > limit:
            num_scans = data.count(_START_OF_SCAN)
            if num_scans * num_pixels > limit:
                raise SampleError(f"too many scans: {num_scans} of {image.width}x{image.height} pixels")


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except _PILLOW_ERRORS:
        # For some faults of an EXIF block Pillow gives up on a JPEG or AVIF, which is there without it.
        if b"Exif" not in data:
            raise
        return Image.open(io.BytesIO(data.replace(b"Exif", b"none")), formats=FORMATS)


def _is_jpeg(image: Image.Image) -> bool:
    return image.format == "JPEG" and image.mode in ("RGB", "L")


def _plain_jpeg(image: Image.Image, data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """Pixels of a JPEG without a fault, [H, W, 3]; None for everything else."""
    if not _is_jpeg(image):
        return None
    try:
        # Strict: what libjpeg only warns of, such as data that ends too early, is refused.
        pixels: np.ndarray[Any, np.dtype[np.uint8]] = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (image.height, image.width) else None


def _orientation_after_load(image: Image.Image, ignore: bool) -> int:
    """Load the image, and give the orientation that it has yet to be turned by to be upright, or as stored."""
    if not ignore:
        image.load()
        return _orientation(image)
    # Pillow turns a TIFF upright when it loads it, which is to be undone.
    turned = _orientation(image) if image.format == "TIFF" else 1
    image.load()
    return _UNDO.get(turned, turned)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the EXIF block is missing or broken."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PILLOW_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


# The orientations that undo each other; every other undoes itself.
_UNDO = {6: 8, 8: 6}


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB as `Image.convert` gives it, but 16-bit grey is scaled to 8 bits instead of clipped.

    Alpha is dropped, as `weights.transforms()` users do with `convert("RGB")`.
    """
    if image.mode.startswith("I;16"):
        wide = np.asarray(image, dtype=np.uint16)
        return Image.fromarray((wide >> 8).astype(np.uint8), "L").convert("RGB")
    if image.mode == "I" and not _has_32_bits(image):
        wide = np.asarray(image)
        return Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8), "L").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _has_32_bits(image: Image.Image) -> bool:
    """Whether it is a TIFF of 32-bit integers, which may be of any range: `convert` clips them, as for all."""
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_BITS_TAG, (0,))[0] == 32
