"""Only what its pixels need may cost an image: faults of metadata do not, and orientation outlives them."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import encode, photo
from tests.decoding.images import SMALL, pixels, png_chunk, with_orientation

MIB = 2**20
RULES = DecodingRules(preprocess=SMALL, max_pixels=4_000_000)


def decoded(data: bytes) -> np.ndarray:  # type: ignore[type-arg]
    return Decoder(RULES).decode(data)


def in_png(chunk: bytes, image: bytes | None = None) -> bytes:
    """With a chunk behind the header."""
    file = image or encode(photo(1), "PNG")
    return file[:33] + chunk + file[33:]


def with_wrong_checksum(kind: bytes, data: bytes) -> bytes:
    return png_chunk(kind, data)[:-4] + b"\1\2\3\4"


CHUNKS = {
    "pHYs": struct.pack(">IIB", 2835, 2835, 1),
    "iCCP": b"profile\0\0" + zlib.compress(bytes(500)),
    "iTXt": b"Comment\0\0\0\0\0text",
    "tEXt": b"Comment\0text",
    "zTXt": b"Comment\0\0" + zlib.compress(b"text"),
    "gAMA": struct.pack(">I", 45455),
    "tIME": struct.pack(">HBBBBB", 2026, 1, 1, 0, 0, 0),
    "eXIf": b"II*\0\x08\0\0\0\0\0",
    "tRNS": struct.pack(">HHH", 1, 2, 3),
    "abCd": b"own",
}
LARGE = {
    "text": png_chunk(b"tEXt", b"Comment\0" + b"x" * 3 * MIB),
    "compressed text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(5 * MIB))),
    "international text": png_chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(5 * MIB))),
    "much text": png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(MIB - 100))) * 100,
    "profile": png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(5 * MIB))),
    "profiles": png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(MIB - 100))) * 100,
}
BROKEN = {
    "a length beyond the end": struct.pack(">I", 2**31 - 1) + b"tEXt",
    "text that is not compressed": png_chunk(b"zTXt", b"Comment\0\0not zlib"),
    "a resolution of two bytes": png_chunk(b"pHYs", b"\0\1"),
    "a time of one byte": png_chunk(b"tIME", b"\0"),
    "gamma without a value": png_chunk(b"gAMA", b""),
    "chromaticities of a byte": png_chunk(b"cHRM", b"\0"),
    "rendering without a value": png_chunk(b"sRGB", b""),
}


@pytest.mark.parametrize("kind", CHUNKS)
def test_a_png_with_a_wrong_checksum_in_a_chunk_that_pixels_need_not_is_decoded(kind: str) -> None:
    file = in_png(with_wrong_checksum(kind.encode(), CHUNKS[kind]))
    assert np.array_equal(decoded(file), pixels(photo(1)))


@pytest.mark.parametrize("name", LARGE | BROKEN)
def test_a_png_with_large_or_broken_metadata_is_decoded(name: str) -> None:
    if name == "a length beyond the end":  # behind the pixels
        file = encode(photo(1), "PNG")[:-12] + BROKEN[name]
    else:
        file = in_png((LARGE | BROKEN)[name])
    assert np.array_equal(decoded(file), pixels(photo(1)))


@pytest.mark.parametrize("fault", [CHUNKS["pHYs"], None], ids=["a wrong checksum", "large text"])
def test_a_png_is_turned_as_it_says_whatever_else_is_broken(fault: bytes | None) -> None:
    chunk = LARGE["compressed text"] if fault is None else with_wrong_checksum(b"pHYs", fault)
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>'
    for file in (
        in_png(chunk, with_orientation(photo(1), 6, "PNG")),
        in_png(chunk + png_chunk(b"iTXt", xmp)),
    ):
        assert np.array_equal(decoded(file), pixels(photo(1).transpose(Image.Transpose.ROTATE_270)))


def test_what_a_pngs_pixels_need_still_costs_it() -> None:
    for kind, data in ((b"IDAT", zlib.compress(bytes(100))), (b"PLTE", bytes(7))):
        with pytest.raises(Exception, match="broken image"):
            decoded(in_png(with_wrong_checksum(kind, data)))


def segment(kind: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(data) + 2) + data


SEGMENTS = {
    "a short block of Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "a short resolution of Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\0\2\0\0"),
    "a short Adobe": segment(0xEE, b"Adobe"),
    "a shorter Adobe": segment(0xEE, b"Adobe\0"),
    "a short JFIF": segment(0xE0, b"JFIF\0"),
    "a shorter JFIF": segment(0xE0, b"JFIF"),
    "a short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "a profile of one part of two": segment(0xE2, b"ICC_PROFILE\0\1\2" + bytes(100)),
    "a short list of pictures": segment(0xE2, b"MPF\0"),
    "an Exif of nothing": segment(0xE1, b"Exif\0\0"),
}


@pytest.mark.parametrize("is_progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_a_jpeg_with_a_broken_segment_is_decoded(name: str, mode: str, is_progressive: bool) -> None:
    plain = encode(photo(1, mode=mode), progressive=is_progressive)
    broken = plain[:2] + SEGMENTS[name] + plain[2:]
    assert np.array_equal(decoded(broken), decoded(plain))
    # Also in place of its JFIF segment.
    bare = plain[:2] + SEGMENTS[name] + plain[4 + int.from_bytes(plain[4:6], "big") :] if mode != "CMYK" else broken
    assert np.array_equal(decoded(bare), decoded(plain))


def test_a_jpeg_is_turned_as_xmp_says_where_exif_does_not() -> None:
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>')
    plain = encode(photo(1))
    turned = decoded(with_orientation(photo(1), 6, "JPEG"))
    assert np.array_equal(decoded(plain[:2] + xmp + plain[2:]), turned)
    both = with_orientation(photo(1), 1, "JPEG")
    assert np.array_equal(decoded(both[:2] + xmp + both[2:]), decoded(plain))
