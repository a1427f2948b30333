"""The small pictures on a page: all of an image, in its own shape, with its own size."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from shard_embedder.pipeline.pages.previews import preview
from tests.conftest import encode, photo


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_all_of_an_image_is_seen_upright_and_in_its_own_shape(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encode(photo(3, (600, 200)), format, exif=exif)
    found = preview(image, 150)
    assert found.jpeg is not None
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(image)))
    assert (found.width, found.height) == upright.size == ((200, 600) if orientation > 4 else (600, 200))
    assert found.num_bytes == len(image)
    shown = Image.open(io.BytesIO(found.jpeg))
    assert shown.size == ((50, 150) if orientation > 4 else (150, 50))
    expected = np.asarray(upright.convert("RGB").resize(shown.size, Image.Resampling.BICUBIC), np.float32)
    assert np.abs(np.asarray(shown, np.float32) - expected).mean() < 8


def test_a_small_image_is_not_made_larger_and_a_line_stays_one() -> None:
    assert Image.open(io.BytesIO(preview(encode(photo(1, (40, 30)))).jpeg or b"")).size == (40, 30)
    assert Image.open(io.BytesIO(preview(encode(photo(1, (3000, 2)))).jpeg or b"")).size == (384, 1)


def test_what_is_no_image_has_the_reason_of_the_job() -> None:
    assert preview(b"").reason == "empty: 0 bytes"
    assert preview(b"x" * 100).reason == "not an image of a known format: text"
    assert preview(encode(photo(1))[:600]).reason.startswith("broken image")
