"""Groups of images that the device resizes at once: the pixels are those of the resize for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.resize import resize_crop, upright
from shard_embedder.pipeline.embedding.device_resize import plan_resizes, resize_group
from tests.embedding.test_device_decode import SMALL


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("resize", "crop", "mode"),
    [
        (40, (32, 28), "center"),
        pytest.param(31, (31, 31), "center", marks=pytest.mark.slow),
        pytest.param(20, (32, 32), "center", marks=pytest.mark.slow),
        (33, (32, 20), "squash"),
    ],
)
def test_the_geometry_is_that_of_the_decoder(
    interpolation: str, resize: int, crop: tuple[int, int], mode: str
) -> None:
    preprocess = replace(SMALL, resize=resize, crop=crop, interpolation=interpolation, mode=mode)
    sizes = [(96, 80), (80, 97), (41, 41), (17, 200), (200, 17), (333, 250), (24, 24), (900, 100), (3, 5), (95, 80)]
    # Large steps between pixels, so that bicubic overshoots.
    images = [np.random.default_rng(size).integers(0, 2, (*size, 3), dtype=np.uint8) * 255 for size in sizes]
    for orientation in range(1, 9):
        found = resized(images, orientation, preprocess)
        for pixels, image in zip(found, images, strict=True):
            seen = image if orientation == 1 else upright(image, orientation)
            assert (pixels != resize_crop(seen, preprocess)).mean() < 0.002


def resized(images: list[Any], orientation: int, preprocess: Preprocess) -> list[Any]:
    """Pixels [H, W, 3] of an EXIF orientation, by the groups of the device."""
    sizes = np.array([image.shape[:2] for image in images])
    plan = plan_resizes(sizes, np.full(len(images), orientation), preprocess)
    found: dict[int, Any] = {}
    for group in plan.groups:
        chosen = plan.order[group.start : group.end].tolist()
        given = [torch.from_numpy(images[place]).permute(2, 0, 1) for place in chosen]
        axes = torch.from_numpy(plan.axes[group.start : group.end])
        found |= dict(zip(chosen, resize_group(given, axes, group, preprocess).numpy(), strict=True))
    return [found[place] for place in range(len(images))]


def test_groups_are_of_shapes_alike_and_what_they_hold_is_bounded() -> None:
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 5000, (300, 2)), np.full((600, 2), 500), [[1, 65000], [65000, 1]]])
    orientations = rng.integers(1, 9, len(sizes))
    plan = plan_resizes(sizes, orientations, replace(SMALL, resize=256, crop=(224, 224)))
    assert [number for group in plan.groups for number in range(group.start, group.end)] == list(range(len(sizes)))
    assert sorted(plan.order.tolist()) == list(range(len(sizes)))
    for group in plan.groups:
        chosen = plan.order[group.start : group.end]
        rows, columns = sizes[chosen].max(0)
        assert len(chosen) == 1 or len(chosen) * (3 * rows * columns + 224 * (rows + columns)) <= 2**28
        assert len(chosen) <= 128
        assert set(orientations[chosen] > 4) == {group.is_turned}
    # Groups of 6 million pixels an image on average cannot be large; those of 250,000 are full.
    assert len(plan.groups) < 120
    assert [group.end - group.start for group in plan.groups].count(128) >= 1
