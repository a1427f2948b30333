"""Files of a megabyte or so, within all limits of size, that take their decoder minutes, hours or gigabytes."""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding import child, jpeg, pillow
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import child_pid, encode, photo
from tests.decoding.images import SMALL, progressive_bomb
from tests.peaks import peak_memory_mib

MIB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
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


def test_an_image_that_takes_too_much_memory_is_an_error_and_the_next_is_decoded() -> None:
    decoder = Decoder(replace(RULES, max_pixels=100_000, image_timeout_s=30.0))
    limit = decoder.rules.memory_bytes // MIB
    with pytest.raises(
        SampleError, match=f"^too much memory: it takes over {limit} MiB, the limit for 100000 pixels$"
    ):
        decoder.decode(tiff_of_repeated_strips(200, 16_000_000))
    good = encode(photo(2), "PNG")
    np.testing.assert_array_equal(decoder.decode(good), pillow.decode(good, decoder.rules))
    assert peak_memory_mib(child_pid()) < 200 + limit


SIDE = 2000


def large(mode: str, side: int = SIDE) -> Image.Image:
    return photo(1, (side, side)).convert(mode)


LARGE = {
    "WebP with alpha": lambda: encode(large("RGBA"), "WEBP", lossless=True, method=0, quality=0),
    "WebP": lambda: encode(large("RGB"), "WEBP", method=0),
    "progressive CMYK": lambda: encode(large("CMYK"), progressive=True),
    "progressive JPEG that its worker does not take": lambda: encode(large("RGB"), progressive=True, subsampling=0),
    "AVIF with alpha": lambda: encode(large("RGBA"), "AVIF", speed=10),
    "PNG": lambda: encode(large("RGBA"), "PNG", compress_level=1),
    "floats": lambda: encode(large("F"), "TIFF"),
    "32 bits": lambda: encode(large("I"), "TIFF", compression="tiff_lzw"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_memory_grows_with_pixels_as_the_rules_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a job: without the limits of glibc's that the Makefile sets for tests.
    for variable in [one for one in os.environ if one.startswith("MALLOC_")]:
        monkeypatch.delenv(variable)
    child.end()
    file, num_pixels = LARGE[name](), SIDE * SIDE
    rules = replace(RULES, image_timeout_s=60.0)
    child.decode(encode(photo(1), "PNG"), rules)
    before = peak_memory_mib(child_pid())
    child.decode(file, rules)
    added = (peak_memory_mib(child_pid()) - before) * MIB - 2 * len(file)
    per_pixel = (
        replace(rules, max_pixels=2 * num_pixels).memory_bytes - replace(rules, max_pixels=num_pixels).memory_bytes
    ) / num_pixels
    assert added <= per_pixel * num_pixels + 28 * MIB


def test_what_the_default_lets_pass_takes_a_gibibyte_and_a_half_at_most() -> None:
    default = replace(RULES, max_pixels=Config.max_pixels)
    assert default.memory_bytes <= 3 * 2**29
    # Cameras of 64 megapixels, and the WebP of 118 bytes that took 3.8 GiB.
    assert default.max_pixels >= 9248 * 6936
    webp = b"RIFF\x6e\0\0\0WEBPVP8X\n\0\0\0\0\0\0\0" + (13376).to_bytes(3, "little") * 2
    with pytest.raises(SampleError, match=f"^too many pixels: 178944129, the limit is {default.max_pixels}$"):
        Decoder(default).decode(webp + bytes(88))


def test_a_jpeg_2000_is_refused_sooner_as_it_takes_more_memory() -> None:
    rules = replace(RULES, max_pixels=50_000_000)
    assert rules.jpeg_2000_pixels < rules.max_pixels
    header = bytearray(encode(photo(1), "JPEG2000", no_jp2=True))
    header[8:16] = struct.pack(">II", 7000, 7000)
    with pytest.raises(SampleError, match=f"^too many pixels: 7000x7000, the limit is {rules.jpeg_2000_pixels}$"):
        pillow.decode(bytes(header), rules)


def test_an_ico_is_refused_before_it_is_decoded() -> None:
    png = encode(Image.new("1", (2300, 2300)), "PNG")
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(png), 22) + png
    with pytest.raises(SampleError, match=r"^too many pixels: 5290000, the limit is 4000000$"):
        pillow.decode(ico, replace(RULES, max_pixels=4_000_000))
    assert pillow.decode(ico, replace(RULES, max_pixels=5_290_000)).shape == (32, 32, 3)


def test_a_header_without_end_is_not_read_to_it_in_this_process() -> None:
    """Each of these has millions of markers, of which Python would look at every one."""
    for filler in (segment(0xFE, b""), b"\xff\0", b"\xff", b"\xff\xd0"):
        file = jpeg_with(filler * 50_000)
        seen = list(jpeg.segments(file, 1000))
        assert len(seen) <= 1000
        assert jpeg.read_header(file, 1000) is None
        # In the child, which has a limit of time, it is.
        assert jpeg.read_header(file) is not None


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
