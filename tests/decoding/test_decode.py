"""Image bytes to pixels: every format, the geometry of torchvision, and whatever a file can be broken into."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import random
import resource
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.schema import (
    IMAGE,
    PIXELS,
    REASON,
    STAGE,
    image_field,
    part_row,
    part_rows,
    sample_type,
)
from shard_embedder.pipeline.decoding import jpeg, pillow
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.orientation import orientation_of
from shard_embedder.pipeline.decoding.pillow import FORMATS
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.resize import is_height_first, resize_crop
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import child_pid, encode, peak_memory_mib, photo

FUZZ_INPUTS = int(os.environ.get("EMBED_FUZZ_INPUTS", "5000"))
FUZZ_SEED = int(os.environ.get("EMBED_FUZZ_SEED", "0"))
MIB = 2**20
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
SMALL = Preprocess(40, (32, 32), "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_decoder(preprocess: Preprocess = SMALL, max_pixels: int = 4_000_000, **rules: Any) -> Decoder:
    return Decoder(DecodingRules(preprocess=preprocess, max_pixels=max_pixels, **rules))


def pixels(image: Image.Image, preprocess: Preprocess = SMALL) -> Any:
    """What the decoder should make of an image that is RGB and upright."""
    return resize_crop(np.asarray(image), preprocess)


def with_orientation(image: Image.Image, orientation: int, format: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, format, exif=exif, **options)


def sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, whose upper 8 are the image's."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rgb_png(bits: int, size: int = 40) -> bytes:
    """An RGB PNG of 8 or 16 bits a channel, which Pillow cannot write."""
    values = np.asarray(photo(5, (size, size)))
    rows = values if bits == 8 else (values.astype(">u2") * 257).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", size, size, bits, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def every_format() -> dict[str, bytes]:
    """A real file of every format and mode that is promised."""
    image = photo(1)
    alpha = image.copy()
    alpha.putalpha(photo(2, mode="L"))
    palette = image.quantize(64)
    return {
        "jpeg": encode(image, quality=90),
        "jpeg progressive": encode(image, progressive=True),
        "jpeg grey": encode(image.convert("L")),
        "jpeg cmyk": encode(image.convert("CMYK"), quality=95),
        "jpeg exif": with_orientation(image, 6, "JPEG"),
        "mpo": encode(image, "MPO", save_all=True, append_images=[photo(3)]),
        "png": encode(image, "PNG"),
        "png 16-bit grey": encode(sixteen_bits(image), "PNG"),
        "png 16-bit rgb": rgb_png(16),
        "png palette": encode(palette, "PNG"),
        "png palette alpha": encode(palette, "PNG", transparency=3),
        "png rgba": encode(alpha, "PNG"),
        "png la": encode(alpha.convert("LA"), "PNG"),
        "png 1-bit": encode(image.convert("1"), "PNG"),
        "png exif": with_orientation(image, 8, "PNG"),
        "webp": encode(image, "WEBP"),
        "webp lossless alpha": encode(alpha, "WEBP", lossless=True),
        "webp animation": encode(image, "WEBP", save_all=True, append_images=[photo(3)]),
        "gif": encode(image, "GIF"),
        "gif animation": encode(image, "GIF", save_all=True, append_images=[photo(3), photo(4)]),
        "bmp": encode(image, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "dib": encode(image, "DIB"),
        "tiff": encode(image, "TIFF"),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode(image, "TIFF", compression="tiff_adobe_deflate"),
        "tiff jpeg": encode(image, "TIFF", compression="jpeg"),
        "tiff cmyk": encode(image.convert("CMYK"), "TIFF"),
        "tiff 16-bit": encode(sixteen_bits(image), "TIFF"),
        "tiff 1-bit": encode(image.convert("1"), "TIFF", compression="group4"),
        "avif": encode(image, "AVIF", quality=80, speed=10),
        "avif alpha": encode(alpha, "AVIF", speed=10),
        "avif exif": with_orientation(image, 6, "AVIF", speed=10),
        "jpeg 2000": encode(image, "JPEG2000"),
        "ppm": encode(image, "PPM"),
        "pgm": encode(image.convert("L"), "PPM"),
        "tga": encode(image, "TGA", compression="tga_rle"),
        "ico": encode(image, "ICO"),
    }


FILES = every_format()
LOSSLESS = (
    "png", "png 16-bit grey", "png 16-bit rgb", "png palette", "png palette alpha", "png rgba", "png la", "png 1-bit",
    "webp lossless alpha", "bmp", "bmp palette", "dib", "tiff", "tiff lzw", "tiff deflate", "tiff 16-bit",
    "tiff 1-bit", "jpeg 2000", "ppm", "pgm", "tga",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_rgb_pixels(name: str) -> None:
    decoded = make_decoder().decode(FILES[name])
    assert decoded.shape == (32, 32, 3)
    assert decoded.dtype == np.uint8
    image = photo(1) if name != "png 16-bit rgb" else photo(5, (40, 40))
    if "palette" in name:
        image = image.quantize(64).convert("RGB")
    if "exif" in name:
        image = image.transpose(Image.Transpose.ROTATE_90 if name == "png exif" else Image.Transpose.ROTATE_270)
    if "grey" in name or ("16-bit" in name and "rgb" not in name) or name in ("png la", "pgm"):
        image = image.convert("L").convert("RGB")
    if "1-bit" in name:
        image = image.convert("1").convert("RGB")
    difference = np.abs(decoded.astype(int) - pixels(image)).mean()
    # What is lossy, and ICO's resizing, stays near; another image would be off by 40 and more.
    assert difference < (0.01 if name in LOSSLESS else 8)


def test_sixteen_bits_of_grey_become_the_upper_eight() -> None:
    for file in (FILES["png 16-bit grey"], FILES["tiff 16-bit"]):
        assert np.array_equal(make_decoder().decode(file), pixels(photo(1).convert("L").convert("RGB")))


def test_alpha_is_dropped_and_not_blended() -> None:
    assert np.array_equal(make_decoder().decode(FILES["png rgba"]), pixels(photo(1)))


def test_animations_give_their_first_frame() -> None:
    first = encode(photo(1), "GIF", save_all=True, append_images=[photo(3)])
    assert np.array_equal(make_decoder().decode(first), make_decoder().decode(FILES["gif"]))


def torchvision_pixels(image: Image.Image, preprocess: Preprocess) -> Any:
    from torchvision.transforms import functional as F
    from torchvision.transforms.functional import InterpolationMode

    resized = F.resize(image, [preprocess.resize], InterpolationMode(preprocess.interpolation))
    return np.asarray(F.center_crop(resized, list(preprocess.crop)))


def assert_near(ours: Any, theirs: Any) -> None:
    """One level apart at most, but for a value in 10,000 or so: two roundings of box coordinates meet there."""
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= 2
    assert (difference > 1).sum() <= max(2, difference.size // 1000)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "size",
    [
        (256, 256),
        (500, 375),
        (375, 500),
        (97, 333),
        (1000, 61),
        (31, 900),
        (224, 224),
        (8, 8),
        (640, 481),
        (233, 232),
    ],
)
def test_geometry_is_torchvisions(size: tuple[int, int], interpolation: str) -> None:
    image = photo(size[0], size)
    for resize, crop in ((256, (224, 224)), (232, (224, 224)), (224, (224, 224)), (320, (320, 256)), (57, (50, 33))):
        preprocess = Preprocess(resize, crop, interpolation, (0.5,) * 3, (0.5,) * 3)
        assert_near(pixels(image, preprocess), torchvision_pixels(image, preprocess))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size", [(500, 375), (40, 50)])
def test_hardly_a_value_of_noise_is_rounded_otherwise(size: tuple[int, int], interpolation: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    preprocess = Preprocess(256, (224, 224), interpolation, (0.5,) * 3, (0.5,) * 3)
    difference = np.abs(pixels(noise, preprocess).astype(int) - torchvision_pixels(noise, preprocess))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.02


@settings(max_examples=60, deadline=None)
@given(st.floats(-2.4, 2.4), st.integers(20, 500), st.integers(0, 2**32 - 1), st.booleans())
def test_hardly_a_value_of_any_shape_is_rounded_otherwise(
    log_ratio: float, shorter: int, seed: int, is_bicubic: bool
) -> None:
    """Shapes from 1:11 to 11:1: for some of the tall ones Pillow takes the height first."""
    longer = round(shorter * math.exp(abs(log_ratio)))
    size = (longer, shorter) if log_ratio > 0 else (shorter, longer)
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    preprocess = Preprocess(73, (64, 64), "bicubic" if is_bicubic else "bilinear", (0.5,) * 3, (0.5,) * 3)
    difference = np.abs(pixels(noise, preprocess).astype(int) - torchvision_pixels(noise, preprocess))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.05


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 90), st.integers(2, 200), st.integers(1, 90), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_the_order_of_the_two_steps_is_pillows(
    width: int, height: int, new_width: int, new_height: int, seed: int
) -> None:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    between = (width, new_height) if is_height_first(height, width, new_height, new_width) else (new_width, height)
    bilinear = Image.Resampling.BILINEAR
    in_steps = noise.resize(between, bilinear).resize((new_width, new_height), bilinear)
    assert np.array_equal(np.asarray(noise.resize((new_width, new_height), bilinear)), np.asarray(in_steps))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(8, 60),
    st.integers(8, 60),
    st.integers(8, 60),
    st.booleans(),
)
@example(32, 36, 48, 8, 8, False)
def test_geometry_is_torchvisions_for_any_size(
    width: int, height: int, resize: int, crop_height: int, crop_width: int, bicubic: bool
) -> None:
    interpolation = "bicubic" if bicubic else "bilinear"
    preprocess = Preprocess(resize, (crop_height, crop_width), interpolation, (0.5,) * 3, (0.5,) * 3)
    image = photo(width, (width, height))
    difference = np.abs(pixels(image, preprocess).astype(int) - torchvision_pixels(image, preprocess))
    # At a scale such as 2:3 one value in six is an exact half, which each of the two steps may round up or down.
    assert difference.max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (1, 4_000_000), (4_000_000, 1), (3, 1_000_000)])
@pytest.mark.parametrize("resize", [40, 20])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_extreme_aspect_ratios_cost_no_more_than_their_pixels(size: tuple[int, int], resize: int, mode: str) -> None:
    preprocess = Preprocess(resize, (32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3, mode)
    file = encode(Image.new("RGB", size, (200, 100, 50)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = make_decoder(preprocess).decode(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
    assert decoded[16, 16].tolist() == [200, 100, 50]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(format: str, orientation: int) -> None:
    file = with_orientation(photo(orientation), orientation, format)
    with Image.open(io.BytesIO(file)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert expected.size == ((80, 96) if orientation > 4 else (96, 80))
    assert np.array_equal(make_decoder().decode(file), pixels(expected))


def test_a_tiff_of_32_bits_is_clipped_as_pillow_does_and_one_of_16_scaled() -> None:
    values = np.arange(96 * 80, dtype=np.int32).reshape(80, 96) % 256
    file = encode(Image.fromarray(values), "TIFF")
    with Image.open(io.BytesIO(file)) as image:
        assert image.mode == "I"
        assert np.array_equal(make_decoder().decode(file), pixels(image.convert("RGB")))
    scaled = Image.fromarray(values.astype(np.uint8)).convert("RGB")
    of_16_bits = Image.fromarray((values * 256).astype(np.uint16))
    for format in ("TIFF", "PNG"):
        assert np.array_equal(make_decoder().decode(encode(of_16_bits, format)), pixels(scaled))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_ignored_where_asked(format: str, orientation: int) -> None:
    file = with_orientation(photo(orientation), orientation, format)
    assert np.array_equal(make_decoder(ignore_orientation=True).decode(file), pixels(photo(orientation)))


def jpeg_with_exif(exif: bytes) -> bytes:
    """A JPEG without JFIF, so that Pillow looks into its EXIF when it opens it."""
    plain = encode(photo(1))
    after_app0 = plain[4 + int.from_bytes(plain[4:6], "big") :]
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + after_app0


def exif_with(tag: int, kind: int, count: int, value: int) -> bytes:
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, tag, kind, count, value, 0)


BROKEN_EXIF = {
    "empty": b"Exif\0\0",
    "garbage": b"Exif\0\0" + bytes(range(200)),
    "no endian mark": b"Exif\0\0XX*\0\x08\0\0\0\0\0",
    "offset beyond the end": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "many tags claimed": b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
    "orientation of 9": exif_with(0x0112, 3, 1, 9),
    "orientation of 0": exif_with(0x0112, 3, 1, 0),
    "orientation as text": exif_with(0x0112, 2, 4, 0x41414141),
    "orientation as a fraction by 0": exif_with(0x0112, 5, 1, 8),
    "no orientations": exif_with(0x0112, 3, 0, 0),
    "a huge count": exif_with(0x0112, 3, 0xFFFFFFFF, 8),
    "an ifd that is itself": exif_with(0x8769, 4, 1, 8),
    # Pillow does not open a JPEG with this one.
    "a resolution of one byte": b"Exif\0\0II*\0"
    + struct.pack("<IHHHIIHHII", 8, 2, 0x011A, 1, 1, 72, 0x0128, 3, 1, 2)
    + bytes(4),
}


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


def test_every_format_that_is_opened_is_one_that_pillow_knows() -> None:
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


def test_an_ico_is_none_of_tga_whatever_its_size() -> None:
    png = FILES["png"]
    png = png[:33] + png_chunk(b"abCd", bytes(2**19)) + png[33:]
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 96, 80, 0, 0, 1, 32, len(png), 22) + png
    assert np.array_equal(make_decoder().decode(ico), pixels(photo(1)))


def reason_of(file: bytes, **options: Any) -> str:
    with pytest.raises(SampleError) as caught:
        make_decoder(**options).decode(file)
    return str(caught.value)


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


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def progressive_bomb(side: int, num_scans: int) -> bytes:
    """A progressive JPEG that repeats one empty scan of some hundred bytes."""
    file = encode(Image.new("L", (side, side), 128), progressive=True)
    first = file.index(b"\xff\xda", file.index(b"\xff\xda") + 2)
    end = min(at for at in (file.find(b"\xff\xc4", first), file.find(b"\xff\xda", first + 2)) if at > 0)
    return file[:end] + file[first:end] * num_scans + file[end:]


def bombs() -> dict[str, bytes]:
    flat = Image.new("1", (30_000, 30_000))
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
        "png of 900 megapixels": encode(flat, "PNG"),
        "tiff of 900 megapixels": encode(flat, "TIFF", compression="group4"),
        "jpeg that lies": bytes(jpeg),
        "gif that lies": bytes(gif),
        "bmp that lies": bytes(bmp),
        "just over the limit": encode(Image.new("L", (2001, 2000)), "PNG"),
    }


def test_bombs_are_refused_by_their_header_before_decoding() -> None:
    files = bombs()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    reasons = {name: reason_of(file) for name, file in files.items()}
    assert {reason.partition(":")[0] for reason in reasons.values()} == {"too many pixels"}, reasons
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    assert time.perf_counter() - start < 10


def test_the_pixel_limit_is_the_users_above_pillows_own() -> None:
    before = Image.MAX_IMAGE_PIXELS
    file = encode(Image.new("1", (14_000, 13_700)), "PNG")
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


def test_a_bomb_of_compressed_text_in_a_png_costs_no_memory_and_no_image() -> None:
    text = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(200 * MIB), 9))
    file = FILES["png"][:33] + text + FILES["png"][33:]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rules = make_decoder().rules
    assert np.array_equal(pillow.decode(file, rules), pillow.decode(FILES["png"], rules))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def part(files: list[bytes | None]) -> pa.Table:
    """A part as the reader gives it; None is a sample that already has a reason."""
    kind = sample_type(image_field(), ())
    rows = [
        {
            "sample_index": i,
            "image_id": f"id-{i}",
            "member": f"id-{i}.jpg",
            "stage": "read" if file is None else None,
            "reason": "no image: none" if file is None else None,
            "image": file,
        }
        for i, file in enumerate(files)
    ]
    values = {
        "name": "shard", "url": "shard.tar", "num_bytes": 1, "version": "1", "part": 0, "first_index": 0,
        "num_samples": len(files), "end": "last", "fault": None, "fault_transient": False, "ignored_members": 0,
        "unused_images": 0, "unused_example": None, "apart_samples": 0, "kept_nulls": 0,
        "kept": [], "read_bytes": 1, "batch_size": 0, "device_refused": 0, "device_refusal": None,
        "read_s": 0.0, "decode_s": 0.0, "embed_s": 0.0, "write_s": 0.0,
    }  # fmt: skip
    return part_row(values, pa.array(rows, kind))


def decoded(files: list[bytes | None]) -> list[tuple[dict[str, Any], pa.StructArray]]:
    """The parts that a part of these files becomes."""
    return [one for table in make_decoder()(part(files)) for one in part_rows(table)]


def test_parts_are_decoded_one_at_a_time_as_they_are_asked_for() -> None:
    files = [encode(photo(seed)) for seed in range(3)]
    tables = make_decoder()(pa.concat_tables([part([file]) for file in files]))
    for file in files:
        ((_, samples),) = part_rows(next(tables))
        assert np.array_equal(samples.field(PIXELS).flatten().to_numpy(), make_decoder().decode(file).reshape(-1))
    assert next(tables, None) is None


def test_neighbours_of_a_bad_image_are_unharmed_bit_for_bit() -> None:
    good = [encode(photo(i)) for i in range(6)]
    bad = [b"", good[0][:300], png_header(9000, 9000), b"text", None]
    mixed = [file for pair in zip(good, [*bad, good[5]], strict=True) for file in pair]
    ((_, alone),) = decoded(list(good))
    ((_, among),) = decoded(mixed)
    assert among.field(PIXELS).take(pa.array([0, 2, 4, 6, 8, 10])).equals(alone.field(PIXELS))
    reasons = among.field(REASON).to_pylist()
    assert [reason is not None for reason in reasons] == [file in bad for file in mixed]
    assert among.field(PIXELS).is_null().to_pylist() == [reason is not None for reason in reasons]
    assert [reasons[i].partition(":")[0] for i in (1, 3, 5, 7, 9)] == [
        "empty",
        "broken image",
        "too many pixels",
        "not an image of a known format",
        "no image",
    ]
    assert among.field(STAGE).to_pylist()[1::2] == ["decode"] * 4 + ["read", None]


def test_a_part_without_samples_and_one_without_images_pass() -> None:
    for files in ([], [None], [None, None]):
        ((values, samples),) = decoded(list(files))
        assert len(samples) == values["num_samples"] == len(files)
        assert samples.field(PIXELS).null_count == len(files)
        assert IMAGE not in [samples.type.field(i).name for i in range(samples.type.num_fields)]


def test_what_is_decoded_without_pillow_has_pillows_pixels() -> None:
    rng = random.Random(FUZZ_SEED)
    jpegs = [data for name, data in FILES.items() if "jpeg" in name and data[:2] == b"\xff\xd8"]
    jpegs += [encode(photo(9, (201, 133)), quality=quality, subsampling=subsampling)
              for quality in (30, 95) for subsampling in (0, 1, 2)]  # fmt: skip
    # Changed bytes that leave it a JPEG without a fault are rare: most of the changes are few.
    files = jpegs + [flipped(rng.choice(jpegs), rng) for _ in range(3000)]
    num_plain = 0
    for file in files:
        try:
            with Image.open(io.BytesIO(file), formats=FORMATS) as image:
                header = make_decoder().plain_jpeg(file)
                plain = None if header is None else jpeg.decode(file, header)
                if header is not None and plain is not None:
                    assert np.array_equal(plain, np.asarray(image.convert("RGB")))
                    assert header.orientation == orientation_of(image)
                    num_plain += 1
        except (OSError, ValueError, SyntaxError):
            continue
    assert num_plain > 300


def flipped(file: bytes, rng: random.Random) -> bytes:
    changed = bytearray(file)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_pillows_warnings_about_a_file_stay_out_of_the_log() -> None:
    file = jpeg_with_exif(BROKEN_EXIF["a huge count"])
    large = encode(Image.new("L", (1999, 2000)), "PNG")
    palette = encode(photo(1).quantize(8), "PNG", transparency=b"\0\1\2")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        decoded([file, large, palette])
    assert [str(warning.message) for warning in shown] == []


def mutate(file: bytes, other: bytes, rng: random.Random) -> bytes:
    """`file` with one to four kinds of damage."""
    data = bytearray(file)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = max(1, len(data))
        # Half of the damage falls on the header, where a parser decides.
        at = rng.randrange(min(size, 256)) if rng.random() < 0.5 else rng.randrange(size)
        kind = rng.randrange(8)
        if kind == 0 and data:
            for _ in range(rng.randint(1, 10)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))])
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            begin = rng.randrange(len(other))
            data[at:] = other[begin:]
        elif kind == 4:
            del data[at : at + rng.randint(1, 200)]
        elif kind == 5:
            data[at:at] = data[at : at + rng.randint(1, 200)]
        elif kind == 6:
            value = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, rng.getrandbits(32)))
            number = value.to_bytes(4, rng.choice(("little", "big")))
            data[at : at + 4] = number if rng.random() < 0.5 else number[:2]
        else:
            data[at : at + rng.randint(1, 64)] = bytes(rng.randint(1, 64))
    return bytes(data)


def fuzz_input(seed: int, index: int) -> tuple[str, bytes]:
    rng = random.Random(f"{seed}-{index}")
    name = list(FILES)[index % len(FILES)]
    return name, mutate(FILES[name], FILES[rng.choice(list(FILES))], rng)


def fuzz(seed: int, count: int, progress_path: str) -> dict[str, Any]:
    """Decode `count` broken files; each one's number is in a file before its turn, should the process die."""
    decoder = make_decoder()
    outcomes: Counter[str] = Counter()
    escaped: dict[str, int] = {}
    slowest = 0.0
    with open(progress_path, "wb", buffering=0) as progress:
        for index in range(count):
            name, data = fuzz_input(seed, index)
            progress.seek(0)
            progress.write(f"{index:012d} {name:<40}".encode())
            start = decoder.clock()
            try:
                assert decoder.decode(data).shape == (32, 32, 3)
                outcomes["embedded"] += 1
            except SampleError as error:
                outcomes[": ".join(str(error).split(": ")[:2]) if "broken" in str(error) else str(error)[:15]] += 1
            except Exception as error:
                escaped.setdefault(f"{type(error).__name__}: {error}", index)
            slowest = max(slowest, decoder.clock() - start)
    return {
        "inputs": count,
        "outcomes": outcomes,
        "escaped": escaped,
        "slowest_s": round(slowest, 3),
        "peak_mib": peak_memory_mib(),
        "child_peak_mib": peak_memory_mib(child_pid()),
    }


def test_no_broken_file_crashes_or_raises_anything_but_a_sample_error(tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(FUZZ_SEED), str(FUZZ_INPUTS), str(progress)]
    worker = subprocess.run(command, capture_output=True, text=True, check=False)
    where = progress.read_text() if progress.exists() else "the start"
    assert worker.returncode == 0, f"ended with {worker.returncode} at {where} of seed {FUZZ_SEED}: {worker.stderr}"
    result = json.loads(worker.stdout)
    sys.stdout.write(json.dumps(result, indent=2))
    assert result["escaped"] == {}
    assert sum(result["outcomes"].values()) == FUZZ_INPUTS
    # Most of what is flipped is still an image to Pillow, and much is not: both ways are walked.
    assert result["outcomes"]["embedded"] > FUZZ_INPUTS // 20
    assert sum(result["outcomes"].values()) - result["outcomes"]["embedded"] > FUZZ_INPUTS // 5
    # What kills the child, in whichever way, would be found by users: no known file does.
    assert [outcome for outcome in result["outcomes"] if outcome.startswith("decoder")] == []
    # Of processor time and memory no input takes more than some megapixels should.
    assert result["slowest_s"] < 5
    assert result["peak_mib"] < 300
    assert result["child_peak_mib"] < 70 + make_decoder().rules.memory_bytes // MIB


if __name__ == "__main__":
    sys.stdout.write(json.dumps(fuzz(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])))
