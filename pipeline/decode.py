"""Image bytes to uint8 RGB pixels, resized and cropped as the weights ask.

Pillow is the reference, and reads every header. Plain JPEGs are then decoded by libjpeg-turbo without
Pillow around it, to the same pixels: only those in which it finds nothing to complain of, so that what is
broken stays Pillow's to judge. Resize and centre crop are one convolution with a box in source coordinates,
which gives the pixels of the two steps without making those that the crop throws away. It is done by
fast_image_resize, which has Pillow's filters with SIMD: in less than half the time, to the same values but for a few.
"""

from __future__ import annotations

import io
import math
import struct
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

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
CENTER, SQUASH = "center", "squash"


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of one weights: what `weights.transforms()` does to a PIL image.

    `crop` is (height, width); `mean` and `std` are for RGB in 0 to 1. With the mode `center`, `resize` is the
    length of the shorter side in pixels; with `squash` that of the longer side of `crop` before it is cropped:
    the image is stretched to the shape of `crop`, and its own is lost.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str = CENTER

    def with_size(self, size: tuple[int, int]) -> Preprocess:
        """For another input size: the longer side keeps the ratio of resize to crop."""
        return replace(self, resize=round(max(size) * self.resize / max(self.crop)), crop=size)

    def settings(self) -> dict[str, Any]:
        """The same as JSON has it in a fingerprint; a mode of `center` is not said, as before there was another."""
        values = asdict(self)
        if self.mode == CENTER:
            del values["mode"]
        return values

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Preprocess:
        """The inverse of `settings`, also after JSON, which has lists where it has tuples."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
        }
        return cls(**values)


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
    """Decodes by the rules of one job."""

    # Of the core, which tasks share: there may be more of them than cores.
    clock = staticmethod(time.thread_time)

    def __init__(self, preprocess: Preprocess, *, max_pixels: int, ignore_orientation: bool) -> None:
        self.preprocess = preprocess
        self._max_pixels = max_pixels
        self._ignore_orientation = ignore_orientation

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Parts with encoded images in, the same parts with pixels out: one by one, as these may be far larger."""
        for values, samples in part_rows(table):
            yield self._part(values, samples)

    @pillow_does_not_warn()
    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = self.clock()
        height, width = self.preprocess.crop
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
            pixels = _upright(pixels, orientation)
        return resize_crop(pixels, self.preprocess)

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
        return Header(image.height, image.width, 1 if self._ignore_orientation else _orientation(image))

    def _load(self, data: bytes) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], int]:
        """The image as RGB [H, W, 3], and the orientation that it has yet to be turned by."""
        try:
            with self._bounded():
                image = _open(data)
                self._check_work(image, data)
                pixels = _plain_jpeg(image, data)
                if pixels is not None:
                    return pixels, 1 if self._ignore_orientation else _orientation(image)
                orientation = _orientation_after_load(image, self._ignore_orientation)
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
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, self._max_pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before

    def _check_work(self, image: Image.Image, data: bytes) -> None:
        """Refuse a bomb before a pixel is decoded."""
        num_pixels = image.width * image.height
        if num_pixels > self._max_pixels:
            raise SampleError(f"too many pixels: {image.width}x{image.height}, the limit is {self._max_pixels}")
        limit = MAX_SCANS * self._max_pixels
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


def _upright(pixels: np.ndarray[Any, np.dtype[np.uint8]], orientation: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    turned, mirrored = TURNS[orientation]
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, turned)


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


# Quarter turns against the clock, after mirroring left to right.
TURNS = {2: (0, True), 3: (2, False), 4: (2, True), 5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}


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


def resize_crop(
    pixels: np.ndarray[Any, np.dtype[np.uint8]], preprocess: Preprocess
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """RGB [H, W, 3]: resized, then the centre `crop`, as torchvision does, rounding included.

    Source: `torchvision.transforms.functional.resize` and `center_crop` on PIL images.
    """
    height, width = pixels.shape[:2]
    crop_height, crop_width = preprocess.crop
    new_height, new_width = resized_size(height, width, preprocess)
    # Where the crop is larger than the resized image, all of that is seen, on black.
    seen_height, seen_width = min(crop_height, new_height), min(crop_width, new_width)
    top, left = round((new_height - seen_height) / 2.0), round((new_width - seen_width) / 2.0)
    x, y = width / new_width, height / new_height
    box = (left * x, top * y, min((left + seen_width) * x, width), min((top + seen_height) * y, height))
    resized = _resize(pixels, (seen_width, seen_height), box, INTERPOLATIONS[preprocess.interpolation])
    if (seen_height, seen_width) == preprocess.crop:
        return resized
    padded = np.zeros((crop_height, crop_width, 3), np.uint8)
    top, left = (crop_height - seen_height) // 2, (crop_width - seen_width) // 2
    padded[top : top + seen_height, left : left + seen_width] = resized
    return padded


def resized_size(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width of an image before it is cropped."""
    if preprocess.mode == SQUASH:
        longer = max(preprocess.crop)
        new_height, new_width = (side * preprocess.resize // longer for side in preprocess.crop)
        return new_height, new_width
    long = int(preprocess.resize * max(height, width) / min(height, width))
    return (long, preprocess.resize) if width <= height else (preprocess.resize, long)


def _resize(
    pixels: np.ndarray[Any, np.dtype[np.uint8]],
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    interpolation: FilterType,
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The box (left, top, right, bottom) at `size` (width, height)."""
    # Only what the filter reaches is copied.
    (left, right), (top, bottom) = (
        _reached(box[axis], box[axis + 2], size[axis], pixels.shape[1 - axis]) for axis in (0, 1)
    )
    width, height = right - left, bottom - top
    image = ImageData(width, height, PixelType.U8x3, pixels[top:bottom, left:right].tobytes())
    x, across, y, down = box[0] - left, box[2] - box[0], box[1] - top, box[3] - box[1]
    if size[0] * height <= max(width * height, _MAX_BETWEEN):
        # Width, then height, as Pillow does it. In the other order, which is this library's own, an eighth of the
        # values is rounded to a neighbour, and embeddings of trained backbones fall to a cosine of 0.9997.
        steps = ((size[0], height), CropBox(x, 0, across, height)), (size, CropBox(0, y, size[0], down))
    else:
        # A few columns, high as a tower, that are made wide: what is between would be hundreds of times their size.
        steps = ((width, size[1]), CropBox(0, y, width, down)), (size, CropBox(x, 0, across, size[1]))
    resizer, method = Resizer(), ResizeAlg.convolution(interpolation)
    for step, seen in steps:
        resized = ImageData(*step, PixelType.U8x3)
        resizer.resize(image, resized, ResizeOptions(method, crop_box=seen))
        image = resized
    return np.frombuffer(image.get_buffer(), np.uint8).reshape(size[1], size[0], 3)


def _reached(start: float, end: float, size: int, available: int) -> tuple[int, int]:
    """The first pixel and the one after the last that a filter reaches, scaling `start` to `end` to `size`."""
    margin = math.ceil(_SUPPORT * max(1.0, (end - start) / size)) + 1
    return max(0, math.floor(start) - margin), min(available, math.ceil(end) + margin)
