"""Image bytes to pixels: every format and orientation, and a part of samples of which some are broken."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from shard_embedder.pipeline.core.schema import (
    IMAGE,
    PIXELS,
    REASON,
    STAGE,
    part_rows,
)
from shard_embedder.pipeline.decoding.pillow import FORMATS
from tests.conftest import encode, photo
from tests.decoding.images import (
    BROKEN_EXIF,
    FILES,
    jpeg_with_exif,
    make_decoder,
    part,
    pixels,
    png_chunk,
    png_header,
    with_orientation,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
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


def test_every_format_that_is_opened_is_one_that_pillow_knows() -> None:
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


def test_an_ico_is_none_of_tga_whatever_its_size() -> None:
    png = FILES["png"]
    png = png[:33] + png_chunk(b"abCd", bytes(2**19)) + png[33:]
    ico = struct.pack("<HHHBBBBHHII", 0, 1, 1, 96, 80, 0, 0, 1, 32, len(png), 22) + png
    assert np.array_equal(make_decoder().decode(ico), pixels(photo(1)))


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


def test_pillows_warnings_about_a_file_stay_out_of_the_log() -> None:
    file = jpeg_with_exif(BROKEN_EXIF["a huge count"])
    large = encode(Image.new("L", (1999, 2000)), "PNG")
    palette = encode(photo(1).quantize(8), "PNG", transparency=b"\0\1\2")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        decoded([file, large, palette])
    assert [str(warning.message) for warning in shown] == []
