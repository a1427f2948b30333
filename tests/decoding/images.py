"""Image files of every format, files that are broken, and decoders of small pixels for them."""

from __future__ import annotations

import os
import random
import struct
import zlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.schema import (
    image_field,
    part_row,
    sample_type,
)
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.resize import resize_crop
from shard_embedder.pipeline.decoding.rules import DecodingRules
from tests.conftest import encode, photo

FUZZ_SEED = int(os.environ.get("EMBED_FUZZ_SEED", "0"))
MIB = 2**20
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


def reason_of(file: bytes, **options: Any) -> str:
    with pytest.raises(SampleError) as caught:
        make_decoder(**options).decode(file)
    return str(caught.value)


def png_header(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(1000)))


def progressive_bomb(side: int, num_scans: int) -> bytes:
    """A progressive JPEG that repeats one empty scan of some hundred bytes."""
    file = encode(Image.new("L", (side, side), 128), progressive=True)
    first = file.index(b"\xff\xda", file.index(b"\xff\xda") + 2)
    end = min(at for at in (file.find(b"\xff\xc4", first), file.find(b"\xff\xda", first + 2)) if at > 0)
    return file[:end] + file[first:end] * num_scans + file[end:]


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
