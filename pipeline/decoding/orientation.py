"""How an image is to be turned to be upright, as its EXIF or XMP metadata say."""

from __future__ import annotations

import re
import struct
from typing import Any

from PIL import Image

# What Pillow raises on broken input: the first line is what 100,000 broken files of every format raised,
# the second what Pillow itself expects of its parsers (`ImageFile.__init__`), and a lack of memory.
PILLOW_ERRORS = (
    OSError, ValueError, SyntaxError, RuntimeError, struct.error,
    IndexError, TypeError, KeyError, EOFError, ArithmeticError, MemoryError,
)  # fmt: skip
_TAG = 0x0112
_IN_XMP = re.compile(rb'tiff:Orientation(="|>)([0-9])')


def orientation_of(image: Image.Image) -> int:
    """The orientation of an open image, 1 to 8; 1 where its metadata is missing or broken."""
    try:
        value = image.getexif().get(_TAG, 1)
    except PILLOW_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def orientation_in(exif: bytes, xmp: bytes) -> int:
    """The same of metadata alone, as `Image.getexif` reads it: XMP counts where EXIF names no orientation."""
    tags = Image.Exif()
    try:
        if exif:
            tags.load(exif)
        value: Any = tags.get(_TAG)
    except PILLOW_ERRORS:
        return 1
    if value is None and (found := _IN_XMP.search(xmp)):
        value = int(found[2])
    return value if value in range(1, 9) else 1
