"""Any image to pixels by Pillow, the reference: for a process of its own, which an image may kill."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from pipeline.core.errors import SampleError
from pipeline.decoding import jpeg
from pipeline.decoding.orientation import PILLOW_ERRORS, orientation_of
from pipeline.decoding.resize import resize_crop, upright
from pipeline.decoding.rules import DecodingRules

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Formats that Pillow reads by itself; never those that run another program (EPS) or fetch anything.
FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "TGA", "ICO",
)  # fmt: skip
_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _ORIENTATION_TAG = 0x0100, 0x0101, 0x0102, 0x0112
# Those whose decoders say nothing where there are too few rows, and leave the rest black.
_MAY_END_EARLY = ("PNG", "TIFF", "GIF", "JPEG2000")
# The orientations that undo each other; every other undoes itself.
_UNDO = {6: 8, 8: 6}


def decode(data: bytes, rules: DecodingRules) -> Pixels:
    """One encoded image as uint8 RGB [H, W, 3], as the rules ask.

    Raises:
        SampleError: not an image, broken, or larger than `max_pixels`.
    """
    pixels, orientation = _load(data, rules)
    if orientation != 1:
        pixels = upright(pixels, orientation)
    return resize_crop(pixels, rules.preprocess)


def _load(data: bytes, rules: DecodingRules) -> tuple[Pixels, int]:
    """The image as RGB [H, W, 3], and the orientation that it has yet to be turned by."""
    try:
        with _bounded(rules.max_pixels):
            header = jpeg.read_header(data)
            return _load_image(data, rules) if header is None else _load_jpeg(data, header, rules)
    except UnidentifiedImageError as error:
        raise SampleError("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise SampleError(f"too many pixels: {error}") from error
    except PILLOW_ERRORS as error:
        raise SampleError(f"broken image: {type(error).__name__}: {str(error)[:200]}") from error


@contextmanager
def _bounded(max_pixels: int) -> Iterator[None]:
    """Pillow refuses by the header alone what has over twice `max_pixels`; the process keeps its own limit."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _load_jpeg(data: bytes, header: jpeg.JpegHeader, rules: DecodingRules) -> tuple[Pixels, int]:
    orientation = 1 if rules.ignore_orientation else header.orientation
    # Faults of metadata cost no image: Pillow sees none of it.
    bare = jpeg.without_metadata(data)
    image = _open(bare, rules)
    limit = jpeg.MAX_SCANS * rules.max_pixels
    cost = jpeg.scans_cost(header, bare, limit)
    if cost > limit:
        raise SampleError(f"too many scans: {cost // header.coded_pixels} of {header.width}x{header.height} pixels")
    pixels = jpeg.decode(bare, header) if image.mode in ("RGB", "L") else None
    is_faultless = pixels is not None
    if pixels is None:
        pixels = np.asarray(to_rgb(image))
    if not rules.accept_damaged and (damage := jpeg.damage(bare, is_faultless=is_faultless)) is not None:
        raise _damaged(damage)
    return pixels, orientation


def _load_image(data: bytes, rules: DecodingRules) -> tuple[Pixels, int]:
    try:
        image = _open(data, rules)
    except PILLOW_ERRORS:
        # For some faults of an EXIF block Pillow gives up on an AVIF, which is there without it.
        if b"Exif" not in data:
            raise
        image = _open(data.replace(b"Exif", b"none"), rules)
    # What lies outside of a GIF's first frame is its background.
    may_end_early = image.format in _MAY_END_EARLY and (
        image.format != "GIF" or image.tile[0].extents == (0, 0, *image.size)
    )
    is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION_TAG, 1) != 1
    orientation = _orientation_after_load(image, rules.ignore_orientation)
    if not rules.accept_damaged and may_end_early and _ends_early(image, data, rules, is_turned):
        raise _damaged("its data ends before its last row")
    return np.asarray(to_rgb(image)), orientation


def _damaged(what: str) -> SampleError:
    return SampleError(f"damaged image: {what}; --accept-damaged embeds it")


def _ends_early(image: Image.Image, data: bytes, rules: DecodingRules, is_turned: bool) -> bool:
    """Whether rows at the end of a loaded image were never decoded: on another background they look otherwise."""
    end = _end(image, is_turned)
    if not is_turned and end.reshape(len(end), -1).any(axis=1).all():
        return False
    again = _open(data, rules)
    size = again.size
    if isinstance(again, TiffImagePlugin.TiffImageFile):  # as stored, not as turned
        size = again.tag_v2[_WIDTH_TAG], again.tag_v2[_HEIGHT_TAG]
    num_bands = len(again.getbands())
    again.im = Image.new(again.mode, size, 1 if num_bands == 1 else (1,) * num_bands).im
    again.load()
    return not np.array_equal(end, _end(again, is_turned))


def _end(image: Image.Image, is_turned: bool) -> np.ndarray[Any, Any]:
    """The last two rows, as the last of an interlaced image may be of an early pass; all of one that was turned."""
    return np.asarray(image if is_turned else image.crop((0, max(0, image.height - 2), *image.size)))


def _open(data: bytes, rules: DecodingRules) -> ImageFile.ImageFile:
    """The image with its header read. Refuses a bomb before a pixel is decoded."""
    image: ImageFile.ImageFile = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > rules.max_pixels:
        raise SampleError(f"too many pixels: {image.width}x{image.height}, the limit is {rules.max_pixels}")
    return image


def _orientation_after_load(image: Image.Image, ignore: bool) -> int:
    """Load the image, and give the orientation that it has yet to be turned by to be upright, or as stored."""
    if not ignore:
        image.load()
        return orientation_of(image)
    # Pillow turns a TIFF upright when it loads it, which is to be undone.
    turned = orientation_of(image) if image.format == "TIFF" else 1
    image.load()
    return _UNDO.get(turned, turned)


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
