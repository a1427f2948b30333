"""Pictures of which a part is missing, though Pillow decodes them: errors, but where they are asked for."""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.output.settings import OutputSettings
from tests.conftest import encode, photo
from tests.decoding.images import SMALL, every_format, pixels, png_chunk, with_orientation

RULES = DecodingRules(preprocess=SMALL, max_pixels=4_000_000)
END = b"\xff\xd9"
SIZE = (200, 160)


def noisy(mode: str = "RGB") -> Image.Image:
    values = np.asarray(photo(1, SIZE)).astype(int) + np.random.default_rng(0).integers(-40, 40, (*SIZE[::-1], 3))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert(mode)


def jpegs() -> dict[str, bytes]:
    image = noisy()
    return {
        "baseline": encode(image, quality=90),
        "progressive": encode(image, progressive=True),
        "grey": encode(image.convert("L")),
        "4:4:4, which ends in zeros sooner": encode(image, quality=95, subsampling=0),
        "with restarts": encode(image, restart_marker_rows=1),
        "CMYK": encode(image.convert("CMYK")),
        "optimised": encode(image, optimize=True),
        "with junk before a segment": encode(image).replace(b"\xff\xdb", b"junk\xff\xdb", 1),
        "MPO": encode(image, "MPO", save_all=True, append_images=[photo(2)]).partition(b"\xff\xd9\xff\xd8")[0] + END,
    }


def png_of(rows: int, *, is_interlaced: bool = False) -> bytes:
    """A PNG with the first rows only, in a zlib stream that ends as it should."""
    values = np.asarray(noisy())
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = [
        b"\0" + values[y, x0::dx].tobytes()
        for x0, y0, dx, dy in (passes if is_interlaced else [(0, 0, 1, 1)])
        for y in range(y0, SIZE[1], dy)
    ]
    header = struct.pack(">IIBBBBB", *SIZE, 8, 2, 0, 0, is_interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines[:rows]))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def tiff_of_half_its_strips(orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    noisy().save(buffer, "TIFF", tiffinfo={278: 16, 274: orientation})
    data = bytearray(buffer.getvalue())
    start = int.from_bytes(data[4:8], "little")
    for number in range(int.from_bytes(data[start : start + 2], "little")):
        at = start + 2 + 12 * number
        tag, kind, count, value = struct.unpack_from("<HHII", data, at)
        if tag in (273, 279):  # where strips are, and how long
            struct.pack_into("<HHII", data, at, tag, kind, count // 2, value)
    return bytes(data)


def jpeg_2000_of_half_its_tiles() -> bytes:
    data = encode(noisy(), "JPEG2000", no_jp2=True, tile_size=(64, 64))
    starts = [data.index(b"\xff\x90")]
    while data[starts[-1] : starts[-1] + 2] == b"\xff\x90":
        starts.append(starts[-1] + int.from_bytes(data[starts[-1] + 6 : starts[-1] + 10], "big"))
    return data[: starts[len(starts) // 2]] + END


def without_a_colour() -> bytes:
    """A JPEG of one scan a component, of which the last is gone."""
    file = encode(Image.new("RGB", (64, 64), (200, 30, 60)), subsampling=0)
    start = file.index(b"\xff\xda")
    scans = [b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, number, 0, 0, 63, 0) + bytes(40) for number in (1, 2)]
    return file[:start] + b"".join(scans) + END


def halves() -> dict[str, bytes]:
    made = {}
    for name, file in jpegs().items():
        half = len(file) // 2
        made[f"{name}: cut, with an end"] = file[:half] + END
        made[f"{name}: its second half zeros"] = file[:half] + bytes(len(file) - half - 2) + END
    made |= {
        "PNG of half its rows": png_of(SIZE[1] // 2),
        "PNG without its last row": png_of(SIZE[1] - 1),
        "PNG without its last pass": png_of(SIZE[1] + 70, is_interlaced=True),
        "TIFF of half its strips": tiff_of_half_its_strips(),
        "TIFF of half its strips, turned": tiff_of_half_its_strips(6),
        "JPEG 2000 of half its tiles": jpeg_2000_of_half_its_tiles(),
        "JPEG without a colour": without_a_colour(),
    }
    return made


HALVES = halves()


@pytest.mark.parametrize("name", HALVES)
def test_half_a_picture_is_an_error_but_where_it_is_asked_for(name: str) -> None:
    with pytest.raises(SampleError, match=r"^damaged image: .*; --accept-damaged embeds it$"):
        Decoder(RULES).decode(HALVES[name])
    with Image.open(io.BytesIO(HALVES[name])) as image:
        expected = pixels(image.convert("RGB") if name[-6:] != "turned" else turned(image))
    assert np.array_equal(Decoder(replace(RULES, accept_damaged=True)).decode(HALVES[name]), expected)


def turned(image: Image.Image) -> Image.Image:
    image.load()
    return image.convert("RGB")


def test_the_reason_says_what_is_missing() -> None:
    filler = "its data ends in filler, which was decoded as picture"
    told = {
        "baseline: cut, with an end": "premature end of data segment",
        "PNG of half its rows": "its data ends before its last row",
        "JPEG without a colour": "1 of its 3 colour components are missing",
        "4:4:4, which ends in zeros sooner: its second half zeros": filler,
    }
    for name, what in told.items():
        with pytest.raises(SampleError, match=re.escape(f"damaged image: {what}; --accept-damaged embeds it")):
            Decoder(RULES).decode(HALVES[name])


def test_whole_pictures_that_end_in_black_or_in_filler_are_whole() -> None:
    black = Image.new("RGB", SIZE)
    wide = photo(3, SIZE)
    wide.paste(black.crop((0, 0, SIZE[0], 40)), (0, SIZE[1] - 40))
    files = [encode(one, format) for one in (black, wide) for format in ("PNG", "TIFF", "GIF", "JPEG2000", "BMP")]
    files += [with_orientation(wide, orientation, "TIFF") for orientation in (3, 6, 8)]
    files += [png_of(10**6), png_of(10**6, is_interlaced=True), encode(wide, "PNG", interlace=1)]
    transparent = wide.quantize(8)
    files += [encode(transparent, "GIF", transparency=0), encode(transparent, "PNG", transparency=b"\0\1")]
    for file in jpegs().values():
        # Cameras pad with zeros, and some writers leave a few bytes.
        files += [file[:-2] + bytes(20_000) + END, file[:-2] + b"abc" + END, file + bytes(1000)]
    for file in files:
        assert Decoder(RULES).decode(file).shape == (32, 32, 3)


def test_the_first_frame_of_a_gif_need_not_fill_it() -> None:
    data = bytearray(encode(photo(1).quantize(8), "GIF"))
    data[6:10] = struct.pack("<HH", 200, 200)
    assert Decoder(RULES).decode(bytes(data)).shape == (32, 32, 3)


def test_a_job_accepts_them_where_it_is_told_to() -> None:
    def settings(**values: str) -> OutputSettings:
        config = parse({"input": "in", "output": "out"} | values)
        looked_up: dict[str, Any] = {"preprocess": SMALL, "embedding_shape": (8,)}
        return OutputSettings.of(config, backbone="resnet18", weights_sha256="0", **looked_up)

    strict, lenient = settings(), settings(accept_damaged="true")
    assert [one.rules.accept_damaged for one in (strict, lenient)] == [False, True]
    assert OutputSettings.from_json(lenient.to_json()) == lenient
    assert [difference.name for difference in strict.differences(lenient)] == ["accept_damaged"]


def test_every_format_is_whole() -> None:
    for file in every_format().values():
        Decoder(RULES).decode(file)
