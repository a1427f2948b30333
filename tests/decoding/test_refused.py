"""What is no image or a broken one, and bombs of pixels, scans and text: each is a reason."""

from __future__ import annotations

import gzip
import io
import resource
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from shard_embedder.pipeline.decoding import pillow
from tests.conftest import encode, photo
from tests.decoding.images import (
    BROKEN_EXIF,
    FILES,
    MIB,
    jpeg_with_exif,
    make_decoder,
    png_chunk,
    png_header,
    progressive_bomb,
    reason_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", BROKEN_EXIF)
def test_broken_exif_does_not_cost_the_image(name: str, format: str) -> None:
    exif = BROKEN_EXIF[name]
    file = jpeg_with_exif(exif) if format == "JPEG" else encode(photo(1), format, exif=exif)
    assert np.array_equal(make_decoder().decode(file), make_decoder().decode(encode(photo(1), format)))


def test_broken_exif_does_not_cost_an_avif() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a caption"
    file = encode(photo(1), "AVIF", exif=exif, speed=10)
    header = exif.tobytes()[6:14]
    assert file.count(header) == 1
    broken = file.replace(header, b"\xff" * len(header))
    assert np.array_equal(make_decoder().decode(broken), make_decoder().decode(file))


def test_what_is_no_image_says_so() -> None:
    assert reason_of(b"") == "empty: 0 bytes"
    files = {
        b"\x01\x80": "",
        b"x": ": text",
        b"hello, this is text" * 1000: ": text",
        "für".encode() * 5000: ": text",
        b"GIF": ": text",
        b"<html></html>": ": HTML",
        b"\xef\xbb\xbf\n<!DOCTYPE HTML><p>404": ": HTML",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>': ": SVG",
        b"%PDF-1.7\n" * 20: ": a PDF",
        bytes(5000): ": nothing but zeros",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n": (
            ": a pointer of Git LFS, whose file was never fetched"
        ),
        gzip.compress(b"an image"): ": gzip data",
        b"\0\0\0\x18ftypisom" + bytes(100): ": an MP4 video, or its like",
        b"\xff\x0a" + bytes(range(100)): ": JPEG XL",
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100): ": JPEG XL",
    }
    for file, kind in files.items():
        assert reason_of(file) == f"not an image of a known format{kind}"


def test_a_known_format_that_cannot_be_opened_is_not_called_unknown() -> None:
    for name, kind in (
        ("png", "PNG"),
        ("gif", "GIF"),
        ("tiff", "TIFF"),
    ):
        assert reason_of(FILES[name][:12]) == f"broken image: the {kind} header cannot be read"


def test_formats_that_run_programs_or_fetch_are_not_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(canary) print\n"
    assert reason_of(eps) == "not an image of a known format: PostScript"
    assert reason_of(encode(photo(1), "PDF")) == "not an image of a known format: a PDF"


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("gif animation", "mpo")])
def test_a_truncated_file_is_an_error_and_not_half_an_image(name: str) -> None:
    file = FILES[name]
    reason = reason_of(file[: len(file) // 2])
    assert reason.partition(":")[0] in ("broken image", "not an image of a known format")


def black_png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, made row by row: Pillow would hold a byte of each pixel."""
    deflate, row = zlib.compressobj(), bytes(1 + (width + 7) // 8)
    data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def white_tiff(width: int, height: int) -> bytes:
    """A TIFF of CCITT group 4, where a bit says that a row is as the one before, which is white at first."""
    data = b"\xff" * (height // 8) + b"\0\x10\x01"
    tags = [
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 1), (259, 3, 1, 4), (262, 3, 1, 0), (273, 4, 1, 8),
        (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, len(data)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


@pytest.mark.parametrize(("make", "value"), [(black_png, 0), (white_tiff, 255)])
def test_the_files_that_stand_for_huge_ones_are_whole(make: Callable[[int, int], bytes], value: int) -> None:
    with Image.open(io.BytesIO(make(320, 240))) as image:
        assert (image.mode, image.size) == ("1", (320, 240))
        assert np.asarray(image.convert("L")).tolist() == [[value] * 320] * 240


def bombs() -> dict[str, bytes]:
    jpeg = bytearray(encode(photo(1)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65_000, 65_000)
    gif = bytearray(FILES["gif"])
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    bmp = bytearray(FILES["bmp"])
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    return {
        "png of 2^31 x 2^31": png_header(2**31 - 1, 2**31 - 1),
        "png of 20000 x 20000": png_header(20_000, 20_000),
        "png of 900 megapixels": black_png(30_000, 30_000),
        "tiff of 900 megapixels": white_tiff(30_000, 30_000),
        "jpeg that lies": bytes(jpeg),
        "gif that lies": bytes(gif),
        "bmp that lies": bytes(bmp),
        "just over the limit": encode(Image.new("L", (2001, 2000)), "PNG"),
    }


@pytest.mark.slow
def test_bombs_are_refused_by_their_header_before_decoding() -> None:
    files = bombs()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    reasons = {name: reason_of(file) for name, file in files.items()}
    assert {reason.partition(":")[0] for reason in reasons.values()} == {"too many pixels"}, reasons
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    assert time.perf_counter() - start < 10


@pytest.mark.slow
def test_the_pixel_limit_is_the_users_above_pillows_own() -> None:
    before = Image.MAX_IMAGE_PIXELS
    file = black_png(14_000, 13_700)
    assert reason_of(file, max_pixels=191_000_000).startswith("too many pixels: 14000x13700")
    assert make_decoder(max_pixels=192_000_000).decode(file).shape == (32, 32, 3)
    assert before == Image.MAX_IMAGE_PIXELS


def baseline_bomb(side: int, num_scans: int) -> bytes:
    """A JPEG that is not progressive, and has one scan a component, of which one is repeated without its data."""
    file = encode(Image.new("RGB", (side, side), (128, 128, 128)), subsampling=0)
    start = file.index(b"\xff\xda")
    scans = [b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, number, 0, 0, 63, 0) for number in (1, 2, 3)]
    return file[:start] + scans[0] * num_scans + b"".join(scans) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_though_it_is_not_progressive() -> None:
    with Image.open(io.BytesIO(baseline_bomb(1000, 20))) as image:
        assert not image.info.get("progressive")
    assert reason_of(baseline_bomb(1000, 100_000)).startswith("too many scans: ")
    # Scans without their data are damage.
    assert make_decoder(accept_damaged=True).decode(baseline_bomb(1000, 20)).shape == (32, 32, 3)


def test_a_progressive_jpeg_of_many_scans_is_refused() -> None:
    assert len(progressive_bomb(1000, 100_000)) < 3 * MIB
    start = time.perf_counter()
    assert reason_of(progressive_bomb(1000, 100_000)).startswith("too many scans: ")
    assert time.perf_counter() - start < 5
    assert make_decoder().decode(progressive_bomb(1000, 20)).shape == (32, 32, 3)


@pytest.mark.slow
def test_a_bomb_of_compressed_text_in_a_png_costs_no_memory_and_no_image() -> None:
    deflate = zlib.compressobj(9)
    packed = b"".join(deflate.compress(bytes(MIB)) for _ in range(200)) + deflate.flush()
    text = png_chunk(b"zTXt", b"comment\0\0" + packed)
    file = FILES["png"][:33] + text + FILES["png"][33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rules = make_decoder().rules
    assert np.array_equal(pillow.decode(file, rules), pillow.decode(FILES["png"], rules))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
