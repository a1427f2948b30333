"""Any image to pixels by Pillow, the reference: for a process of its own, which an image may kill."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import formats, heif, jpeg, png
from shard_embedder.pipeline.decoding.orientation import PILLOW_ERRORS, orientation_of
from shard_embedder.pipeline.decoding.resize import resize_crop, upright
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.decoding.scaled import eighths_for, fit
from shard_embedder.pipeline.decoding.versions import INSTALL_HEIF

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_Loaded = TypeVar("_Loaded")

# Formats that Pillow reads by itself; never those that run another program (EPS) or fetch anything. TGA, which has no
# mark, is the last: it would take an ICO of half a mebibyte for its own.
FORMATS = (
    "JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "GIF", "JPEG2000", "PPM", "ICO", "TGA",
)  # fmt: skip
_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _ORIENTATION_TAG = 0x0100, 0x0101, 0x0102, 0x0106, 0x0112
_SAMPLE_FORMAT_TAG, _LEAST_TAG, _MOST_TAG = 0x0153, 0x0154, 0x0155
_ICO = b"\0\0\1\0"
# The class of reasons of HEIC images that nothing here decodes.
NEEDS_HEIF = "needs pillow-heif"
# Pixels that are converted at once.
_BAND_PIXELS = 2**22
# Those whose decoders say nothing where there are too few rows, and leave the rest black.
_MAY_END_EARLY = ("PNG", "TIFF", "GIF", "JPEG2000")
# The orientations that undo each other; every other undoes itself.
_UNDO = {6: 8, 8: 6}


def decode(data: bytes, rules: DecodingRules) -> Pixels:
    """One encoded image as uint8 RGB [H, W, 3], as the rules ask.

    Raises:
        SampleError: not an image, broken, or larger than the rules allow.
    """
    with _judged(data, rules):
        header = jpeg.read_header(data)
        if header is not None:
            pixels, eighths = _load_jpeg(data, header, rules)
            return fit(pixels, header, eighths, rules)
        pixels, orientation = _load_image(data, rules)
        return resize_crop(upright(pixels, orientation) if orientation != 1 else pixels, rules.preprocess)


def upright_size(data: bytes, rules: DecodingRules) -> tuple[int, int]:
    """Width and height of an encoded image as it is to be seen. Raises `SampleError` as `decode` does."""
    with _judged(data, rules):
        header = jpeg.read_header(data)
        if header is not None:
            size, orientation = (header.width, header.height), header.orientation
        else:
            size, orientation = _with_less_metadata(data, lambda bare: _size(_open(bare, rules), rules))
        return size[::-1] if orientation > 4 and not rules.ignore_orientation else size


def _size(image: Image.Image, rules: DecodingRules) -> tuple[tuple[int, int], int]:
    """Width and height, and the orientation to turn it by: Pillow has the upright size of a TIFF itself."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return image.size, orientation_of(image)
    return _stored_size(image) if rules.ignore_orientation else image.size, 1


def _stored_size(image: TiffImagePlugin.TiffImageFile) -> tuple[int, int]:
    return image.tag_v2[_WIDTH_TAG], image.tag_v2[_HEIGHT_TAG]


@contextmanager
def _judged(data: bytes, rules: DecodingRules) -> Iterator[None]:
    """Errors become the reasons that samples have."""
    try:
        with _bounded(data, rules):
            yield
    except UnidentifiedImageError as error:
        raise _unknown(data, rules) from error
    except Image.DecompressionBombError as error:
        # Pillow tells of its own limit, which is another.
        found = re.search(r"\((\d+) pixels\)", str(error))
        size = found[1] if found else f"over {rules.max_pixels}"
        raise SampleError(f"too many pixels: {size}, the limit is {rules.max_pixels}") from error
    except MemoryError as error:
        limit = f"{rules.memory_bytes // 2**20} MiB, the limit for {rules.max_pixels} pixels"
        raise SampleError(f"too much memory: it takes over {limit}") from error
    except PILLOW_ERRORS as error:
        raise SampleError(f"broken image: {type(error).__name__}: {str(error)[:200]}") from error


@contextmanager
def _bounded(data: bytes, rules: DecodingRules) -> Iterator[None]:
    """Pillow refuses by the header alone what has over twice as many pixels; the process keeps its own limit."""
    # But an ICO is decoded when it is opened.
    most = rules.max_pixels // 2 if data.startswith(_ICO) else rules.max_pixels
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, most
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _load_jpeg(data: bytes, header: jpeg.JpegHeader, rules: DecodingRules) -> tuple[Pixels, int]:
    """Its pixels, and at how many eighths of its size: all of what libjpeg-turbo finds a fault in."""
    # Faults of metadata cost no image: Pillow sees none of it.
    bare = jpeg.without_metadata(data)
    image = _open(bare, rules)
    limit = jpeg.MAX_SCANS * rules.max_pixels
    cost = jpeg.scans_cost(header, bare, limit)
    if cost > limit:
        raise SampleError(
            f"too many scans: at least {cost // header.coded_pixels} of {header.width}x{header.height} pixels"
        )
    eighths = eighths_for(header, rules)
    pixels = jpeg.decode(bare, header, eighths) if image.mode in ("RGB", "L") else None
    if pixels is None:
        image.load()

    def looks_the_same(other: bytes) -> bool:
        return _is_same(image, _open(other, rules))

    if not rules.accept_damaged:
        damage = jpeg.damage(bare, looks_the_same, is_faultless=pixels is not None)
        if damage is not None:
            raise _damaged(damage)
    return (to_rgb(image), jpeg.WHOLE) if pixels is None else (pixels, eighths)


def _is_same(image: Image.Image, other: Image.Image) -> bool:
    """Whether two images of one size and mode have the same pixels."""
    other.load()
    pairs = zip(_bands(image), _bands(other), strict=True)
    return all(np.array_equal(np.asarray(one), np.asarray(two)) for (_, one), (_, two) in pairs)


def _load_image(data: bytes, rules: DecodingRules) -> tuple[Pixels, int]:
    return _with_less_metadata(data, lambda bare: _load_as_it_is(bare, rules))


def _with_less_metadata(data: bytes, load: Callable[[bytes], _Loaded]) -> _Loaded:
    """Only what its pixels need may cost an image: where Pillow gives up on it, it is tried without its metadata."""
    try:
        return load(data)
    except PILLOW_ERRORS as error:
        problem = error.with_traceback(None)
    for bare in _without_metadata(data):
        try:
            return load(bare)
        except PILLOW_ERRORS as error:
            problem = error.with_traceback(None)
    raise problem


def _without_metadata(data: bytes) -> Iterator[bytes]:
    yield from png.without_metadata(data)
    # For some faults of an EXIF block Pillow gives up on an AVIF, and pillow-heif on a HEIC.
    if (formats.broken_format(data) == "AVIF" or formats.is_heic(data)) and b"Exif" in data:
        yield data.replace(b"Exif", b"none")


def _load_as_it_is(data: bytes, rules: DecodingRules) -> tuple[Pixels, int]:
    image = _open(data, rules)
    # What lies outside of a GIF's first frame is its background.
    may_end_early = image.format in _MAY_END_EARLY and (
        image.format != "GIF" or image.tile[0].extents == (0, 0, *image.size)
    )
    is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION_TAG, 1) != 1
    orientation = _orientation_after_load(image, rules.ignore_orientation)
    is_cut = (may_end_early and not rules.accept_damaged and _ends_early(image, data, rules, is_turned)) or (
        image.format == heif.FORMAT and heif.is_cut(data)
    )
    if is_cut and not rules.accept_damaged:
        raise _damaged("its data ends before its last row")
    return to_rgb(image), orientation


def _unknown(data: bytes, rules: DecodingRules) -> SampleError:
    if formats.is_heic(data) and not rules.heif:
        return SampleError(f"{NEEDS_HEIF}: {INSTALL_HEIF}")
    broken = "HEIC" if formats.is_heic(data) else formats.broken_format(data)
    other = formats.other_kind(data)
    if broken is not None:
        return SampleError(f"broken image: the {broken} header cannot be read")
    return SampleError("not an image of a known format" + ("" if other is None else f": {other}"))


def _damaged(what: str) -> SampleError:
    return SampleError(f"damaged image: {what}; --accept-damaged embeds it")


def _ends_early(image: Image.Image, data: bytes, rules: DecodingRules, is_turned: bool) -> bool:
    """Whether rows at the end of a loaded image were never decoded: on another background they look otherwise."""
    end = _end(image, is_turned)
    if not is_turned and end.reshape(len(end), -1).any(axis=1).all():
        return False
    again = _open(data, rules)
    size = _stored_size(again) if isinstance(again, TiffImagePlugin.TiffImageFile) else again.size
    num_bands = len(again.getbands())
    again.im = Image.new(again.mode, size, 1 if num_bands == 1 else (1,) * num_bands).im
    again.load()
    return not np.array_equal(end, _end(again, is_turned))


def _end(image: Image.Image, is_turned: bool) -> np.ndarray[Any, Any]:
    """The last two rows, as the last of an interlaced image may be of an early pass; all of one that was turned."""
    return np.asarray(image if is_turned else image.crop((0, max(0, image.height - 2), *image.size)))


def _open(data: bytes, rules: DecodingRules) -> ImageFile.ImageFile:
    """The image with its header read. Refuses a bomb before a pixel is decoded."""
    # After AVIF, which may have the same mark.
    extra: tuple[str, ...] = ()
    if rules.heif and formats.is_heic(data):
        heif.register()
        extra = (heif.FORMAT,)
    image: ImageFile.ImageFile = Image.open(io.BytesIO(data), formats=(*FORMATS, *extra))
    limit = rules.max_pixels if image.format != "JPEG2000" else min(rules.max_pixels, rules.jpeg_2000_pixels)
    if image.width * image.height > limit:
        raise SampleError(f"too many pixels: {image.width}x{image.height}, the limit is {limit}")
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


def to_rgb(image: Image.Image) -> Pixels:
    """A loaded image as RGB [H, W, 3] as `Image.convert` gives it, but deeper grey as `_eight_bits` gives it.

    Alpha is dropped, as `weights.transforms()` users do with `convert("RGB")`.
    """
    tags: Mapping[int, Any] = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    is_signed = tags.get(_SAMPLE_FORMAT_TAG, (1,))[0] == 2
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16") or (image.mode == "L" and is_signed)
    scale = _scale_of_floats(image, tags) if image.mode == "F" else None
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for row, band in _bands(image):
        if is_deep:
            pixels[row : row + band.height] = _eight_bits(np.asarray(band), tags, is_signed, scale)[..., None]
        else:
            pixels[row : row + band.height] = np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    return pixels


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image in bands of rows, and their first rows: what is made of a large image is made of a part at a time."""
    step = max(1, _BAND_PIXELS // image.width)
    if step >= image.height:
        yield 0, image
        return
    for row in range(0, image.height, step):
        yield row, image.crop((0, row, image.width, min(row + step, image.height)))


def _eight_bits(
    values: np.ndarray[Any, Any], tags: Mapping[int, Any], is_signed: bool, scale: tuple[float, float] | None
) -> Pixels:
    """Grey of 8 bits: the range that the file declares becomes 0 to 255.

    - Integers of 12 and 16 bits: their upper 8. Of signed ones, from 0 up: what is below black is black.
    - Integers of 32 bits, which are of any range: clipped to 0 to 255, as Pillow does.
    - Floats: by `scale`, the values that are black and white.

    Where white is zero, it is turned round.
    """
    bits = tags.get(_BITS_TAG, (16,))[0]
    if scale is not None:
        black, white = scale
        grey = np.clip((values.astype(np.float64) - black) * (255 / (white - black)), 0, 255)
        grey = grey if white == 255 else np.rint(grey)
    elif bits == 32:
        grey = np.clip(values, 0, 255)
    elif bits == 8:
        grey = np.clip(values.view(np.int8), 0, None).astype(np.uint8) * 2
    elif is_signed:
        grey = np.clip(values, 0, 2 ** (bits - 1) - 1) >> (bits - 9)
    else:
        grey = np.clip(values, 0, 2**bits - 1) >> (bits - 8)
    white_is_zero = tags.get(_PHOTOMETRIC_TAG) == 0
    return (255 - grey if white_is_zero else grey).astype(np.uint8)


def _scale_of_floats(image: Image.Image, tags: Mapping[int, Any]) -> tuple[float, float]:
    """The values of black and white: those that a TIFF declares, else 0 and 1, or 0 and 255 where one is above 1.

    Raises:
        SampleError: there are values beyond these, or that are no numbers.
    """
    extremes = [
        (float(values.min()), float(values.max())) for values in (np.asarray(band) for _, band in _bands(image))
    ]
    low, high = np.min(extremes), np.max(extremes)
    if np.isfinite(low) and np.isfinite(high):
        if _LEAST_TAG in tags and _MOST_TAG in tags:
            black, white = (float(np.ravel(tags[tag])[0]) for tag in (_LEAST_TAG, _MOST_TAG))
            if -math.inf < black < white < math.inf:
                return black, white
        if low >= 0 and high <= 255:
            return 0.0, 1.0 if high <= 1 else 255.0
    raise SampleError(f"grey without a scale: floats of {low:g} to {high:g}, and their range is not declared")
