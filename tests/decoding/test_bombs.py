"""Files of a megabyte or so, within all limits of size, that take their decoder minutes, hours or gigabytes."""

from __future__ import annotations

import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from pipeline.core.errors import SampleError
from pipeline.decoding import pillow
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.rules import DecodingRules
from tests.conftest import encode, photo
from tests.decoding.test_decode import SMALL, progressive_bomb

RULES = DecodingRules(preprocess=SMALL, max_pixels=2**26, image_timeout_s=0.5)


def tiff_of_repeated_strips(side: int, count: int) -> bytes:
    """One bit a pixel. Two strips by its height, which are listed again and again."""
    half, stride = side // 2, (side + 7) // 8
    pixels = bytes(stride * half)
    start = 8 + 4 * count
    tags = [
        (256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 1), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, count, 8),
        (277, 3, 1, 1), (278, 4, 1, half), (279, 4, 1, len(pixels)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    head = b"II*\0" + struct.pack("<I", start + len(pixels))
    return head + struct.pack("<I", start) * count + pixels + directory


def jpeg_with(segment: bytes) -> bytes:
    plain = encode(photo(1))
    return plain[:2] + segment + plain[2:]


def segment(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


SLOW = {
    "TIFF that lists its strips 100,000 times": lambda: tiff_of_repeated_strips(2000, 100_000),
    "PPM of comments": lambda: b"P3\n1 1\n255\n" + b"#\n" * 2**21 + b"1 2 3\n",
    "PGM of 255 values": lambda: b"P5\n%d 1\n254\n" % 2**24 + bytes(2**24),
    "progressive JPEG of 300 scans": lambda: progressive_bomb(4000, 300),
}


@pytest.mark.parametrize("name", SLOW)
def test_an_image_that_takes_too_long_is_an_error_and_the_next_is_decoded(name: str) -> None:
    decoder = Decoder(RULES)
    with pytest.raises(SampleError, match=r"^decoder timeout: it took over 0\.5 s of processor time$"):
        decoder.decode(SLOW[name]())
    good = encode(photo(2), "PNG")
    np.testing.assert_array_equal(decoder.decode(good), pillow.decode(good, RULES))


@pytest.mark.parametrize(
    "file",
    [
        jpeg_with(segment(0xE1, b"Exif\0\0" + b"x" * 100) * 70_000),
        jpeg_with(segment(0xFE, b"") * 500_000),
        jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000)) * 100),
    ],
    ids=["Exif segments", "empty comments", "colour profiles"],
)
def test_metadata_without_end_costs_no_image(file: bytes) -> None:
    rules = replace(RULES, image_timeout_s=20.0)
    np.testing.assert_array_equal(Decoder(rules).decode(file), Decoder(rules).decode(encode(photo(1))))


def test_what_may_take_long_is_not_decoded_in_this_process() -> None:
    decoder = Decoder(RULES)
    assert decoder.plain_jpeg(encode(photo(1, (3000, 2000)), progressive=True)) is not None
    for file in (
        progressive_bomb(4000, 1100),
        encode(Image.new("L", (6000, 6000))),
        jpeg_with(segment(0xFE, b"") * 5000),
        jpeg_with(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 10),
    ):
        assert decoder.plain_jpeg(file) is None
