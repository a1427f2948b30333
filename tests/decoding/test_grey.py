"""Grey of other depths than 8 bits: scaled by the range that a file declares, or refused."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import encode
from tests.decoding.images import SMALL

RULES = DecodingRules(preprocess=SMALL, max_pixels=4_000_000)
WIDTH, HEIGHT = 64, 48
GREY = (np.arange(HEIGHT)[:, None] * 2 + np.arange(WIDTH)[None] * 2).astype(np.uint8)
WIDE = GREY.astype(np.uint16) * 257


def tiff(
    pixels: np.ndarray[Any, Any] | bytes,
    bits: int,
    *,
    white_is_zero: bool = False,
    sample_format: int = 1,
    endian: str = "<",
    declared: tuple[float, float] | None = None,
) -> bytes:
    """An uncompressed TIFF of one strip; `declared` is its range (SMinSampleValue and SMaxSampleValue)."""
    data = pixels if isinstance(pixels, bytes) else pixels.tobytes()
    tags: list[tuple[int, int, int, bytes]] = [
        (tag, 4, 1, struct.pack(endian + "I", value))
        for tag, value in [
            (256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 300), (277, 1),
            (278, HEIGHT), (279, len(data)), (339, sample_format),
        ]
    ]  # fmt: skip
    if declared is not None:
        tags += [(340 + i, 11, 1, struct.pack(endian + "f", value)) for i, value in enumerate(declared)]
    body = struct.pack(endian + "H", len(tags))
    body += b"".join(struct.pack(endian + "HHI", *tag[:3]) + tag[3] for tag in tags) + bytes(4)
    mark = b"II*\0" if endian == "<" else b"MM\0*"
    return (mark + struct.pack(endian + "I", 8) + body).ljust(300, b"\0") + data


def twelve_bits() -> bytes:
    """Two values in three bytes."""
    values = (WIDE >> 4).astype(int)
    even, odd = values[:, 0::2], values[:, 1::2]
    return np.dstack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255]).astype(np.uint8).tobytes()


FLOATS = (GREY / np.float32(255)).astype("<f4")
SCALED = {
    "16 bits": tiff(WIDE, 16),
    "16 bits, the upper one first": tiff(WIDE.astype(">u2"), 16, endian=">"),
    "8 bits, white is zero": tiff(255 - GREY, 8, white_is_zero=True),
    "12 bits": tiff(twelve_bits(), 12),
    "16 bits, white is zero": tiff(65535 - WIDE, 16, white_is_zero=True),
    "16 bits with a sign": tiff((WIDE >> 1).astype("<i2"), 16, sample_format=2),
    "16 bits with a sign, the upper one first": tiff((WIDE >> 1).astype(">i2"), 16, sample_format=2, endian=">"),
    "floats of 0 to 1": tiff(FLOATS, 32, sample_format=3),
    "floats of 0 to 1, the upper byte first": tiff(FLOATS.astype(">f4"), 32, sample_format=3, endian=">"),
    "floats of 0 to 1, white is zero": tiff(1 - FLOATS, 32, sample_format=3, white_is_zero=True),
    "floats of 0 to 255": tiff(GREY.astype("<f4"), 32, sample_format=3),
    "floats of a declared range": tiff(FLOATS * 3000 - 1000, 32, sample_format=3, declared=(-1000, 2000)),
    "32 bits": tiff(GREY.astype("<u4"), 32),
    "PNG of 16 bits": encode(Image.fromarray(WIDE), "PNG"),
    "PGM of 16 bits": b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + WIDE.astype(">u2").tobytes(),
    "PGM of 12 bits": b"P5 %d %d 4095\n" % (WIDTH, HEIGHT) + (WIDE >> 4).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", SCALED)
def test_its_declared_range_becomes_black_to_white(name: str) -> None:
    expected = Decoder(RULES).decode(encode(Image.fromarray(GREY), "PNG"))
    difference = np.abs(Decoder(RULES).decode(SCALED[name]).astype(int) - expected)
    assert difference.max() <= 1


def test_eight_bits_with_a_sign_are_seven_of_grey() -> None:
    found = Decoder(RULES).decode(tiff((GREY >> 1).astype("i1"), 8, sample_format=2))
    assert np.abs(found.astype(int) - Decoder(RULES).decode(encode(Image.fromarray(GREY), "PNG"))).max() <= 2


@pytest.mark.parametrize("kind", ["<i2", "i1"])
def test_below_black_is_black(kind: str) -> None:
    signed = np.full((HEIGHT, WIDTH), -100, kind)
    assert Decoder(RULES).decode(tiff(signed, signed.dtype.itemsize * 8, sample_format=2)).max() == 0


@pytest.mark.parametrize("values", [(0, 4000), (-1, 1), (0, np.nan), (0, np.inf)])
def test_floats_of_no_known_range_are_refused(values: tuple[float, float]) -> None:
    pixels = np.full((HEIGHT, WIDTH), values[0], "<f4")
    pixels[20:] = values[1]
    with pytest.raises(SampleError, match=r"^grey without a scale: floats of .*, and their range is not declared$"):
        Decoder(RULES).decode(tiff(pixels, 32, sample_format=3))
