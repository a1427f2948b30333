"""Groups of images of any sizes, turned, resized and cropped on their device at once.

The pixels are those of `pipeline.decoding.resize.resize_crop`, but for a few that it rounds the other way. Two
batched matrix products make them, one for the rows and one for the columns: with kernels for each image, the device
would wait for the host.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shard_embedder.pipeline.decoding.preprocess import Preprocess, resized_size
from shard_embedder.pipeline.decoding.resize import TURNS, is_height_first

# What is resized at once: enough to fill the device, and bounded whatever the images' size. One image of
# `MAX_DEVICE_PIXELS` takes nearly as many.
_GROUP_IMAGES = 128
_GROUP_FLOATS = 2**28
# Tensors of the size of the weights that are needed to make them.
_WEIGHTS_COPIES = 4

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Group:
    """Images `start` to `end` of a plan's order, which are turned alike, and resized in the same order of sides."""

    start: int
    end: int
    is_turned: bool
    rows_first: bool  # as stored

    def halves(self) -> tuple[Group, Group]:
        """The group in two."""
        middle = (self.start + self.end) // 2
        return (
            Group(self.start, middle, self.is_turned, self.rows_first),
            Group(middle, self.end, self.is_turned, self.rows_first),
        )


@dataclass(frozen=True)
class Plan:
    """How images are resized: their `order`, by shape, so that little is padded, and the groups in it.

    `axes` is float64 [N, 2, 4], in that order: for the rows and the columns of an image as stored, their number, the
    number that they are resized to, which of these is the crop's first, and whether they are counted from the end.
    """

    order: Ints
    groups: list[Group]
    axes: np.ndarray[Any, np.dtype[np.float64]]


def plan_resizes(sizes: Ints, orientations: Ints, preprocess: Preprocess) -> Plan:
    """Plan how images of `sizes` [N, 2] (height and width as stored) and EXIF `orientations` [N] are resized."""
    quarter, mirrored = np.array([(0, False), (0, False), *TURNS.values()]).T[:, orientations]
    is_turned = quarter % 2 == 1
    upright = np.where(is_turned[:, None], sizes[:, ::-1], sizes)
    new, height_first = np.empty_like(sizes), np.empty(len(sizes), bool)
    for place, (height, width) in enumerate(upright.tolist()):
        new_height, new_width = resized_size(height, width, preprocess)
        new[place] = new_height, new_width
        height_first[place] = is_height_first(height, width, new_height, new_width)
    seen = np.minimum(preprocess.crop, new)
    # Where the crop is larger than the resized image, it begins before it.
    first = np.rint((new - seen) / 2.0) - (preprocess.crop - seen) // 2
    # Mirroring comes first, and turning twice counts both sides from the end.
    from_end = np.stack([(quarter == 2) | (quarter == 3), mirrored ^ ((quarter == 1) | (quarter == 2))], 1)
    sides = np.stack([upright, new, first], 2)
    sides = np.where(is_turned[:, None, None], sides[:, ::-1], sides)
    axes = np.concatenate([sides, from_end[:, :, None]], 2).astype(np.float64)
    rows_first = height_first ^ is_turned
    order = np.lexsort((sizes[:, 1], sizes[:, 0], sizes[:, 0] > sizes[:, 1], rows_first, is_turned))
    groups = _groups(sizes[order].tolist(), is_turned[order].tolist(), rows_first[order].tolist(), preprocess.crop)
    return Plan(order, groups, axes[order])


def _groups(
    sizes: list[tuple[int, int]], is_turned: list[bool], rows_first: list[bool], crop: tuple[int, int]
) -> list[Group]:
    groups: list[Group] = []
    start = longest_rows = longest_columns = 0
    for place, (height, width) in enumerate(sizes):
        longest_rows, longest_columns = max(longest_rows, height), max(longest_columns, width)
        weights = max(crop) * (longest_rows + longest_columns) * _WEIGHTS_COPIES
        most = _GROUP_FLOATS // (3 * longest_rows * longest_columns + weights)
        kind = is_turned[place], rows_first[place]
        if place > start and (
            place - start >= min(_GROUP_IMAGES, most) or kind != (is_turned[start], rows_first[start])
        ):
            groups.append(Group(start, place, is_turned[start], rows_first[start]))
            start, longest_rows, longest_columns = place, height, width
    if sizes:
        groups.append(Group(start, len(sizes), is_turned[start], rows_first[start]))
    return groups


def resize_group(images: list[Tensor], axes: Tensor, group: Group, preprocess: Preprocess) -> Tensor:
    """uint8 RGB images [3, H, W] of a group as uint8 [N, H', W', 3]. `axes` are the plan's, on their device."""
    height, width = reversed(preprocess.crop) if group.is_turned else preprocess.crop
    num_rows, num_columns = (max(image.shape[side] for image in images) for side in (1, 2))
    # The colours of a row side by side, so that one layout is right for both products.
    pixels = torch.zeros((len(images), num_rows, 3, num_columns), device=axes.device)
    start = 0
    # Images of one size lie side by side in the order of a plan, and are copied at once.
    for (_, rows_here, columns_here), alike in itertools.groupby(images, lambda image: image.shape):
        stacked = torch.stack(list(alike))
        end = start + len(stacked)
        pixels[start:end, :rows_here, :, :columns_here] = stacked.transpose(1, 2)
        start = end
    rows, columns = axes.unbind(1)
    down = _weights(rows, height, num_rows, preprocess.interpolation)
    across = _weights(columns, width, num_columns, preprocess.interpolation).transpose(1, 2)
    # One side, then the other, each rounded, in Pillow's order: a network sees the difference.
    if group.rows_first:
        between = _rounded(torch.bmm(down, pixels.flatten(2)))
        resized = torch.bmm(between.view(len(images), height * 3, num_columns), across)
    else:
        between = _rounded(torch.bmm(pixels.view(len(images), num_rows * 3, num_columns), across))
        resized = torch.bmm(down, between.view(len(images), num_rows, 3 * width))
    resized = _rounded(resized).to(torch.uint8).view(len(images), height, 3, width)
    return resized.permute(0, 3, 1, 2) if group.is_turned else resized.permute(0, 1, 3, 2)


def _weights(axes: Tensor, num_seen: int, longest: int, interpolation: str) -> Tensor:
    """float32 [N, num_seen, longest]: what each pixel of a crop takes of each pixel of one side, of `axes` [N, 4].

    Source: `precompute_coeffs` of Pillow's Resample.c, and `normalize_coeffs_8bpc` of Pillow-SIMD's.
    """
    size, new, first, from_end = (axis[:, None] for axis in axes.unbind(1))
    seen = first + torch.arange(num_seen, device=axes.device)
    centre = (seen + 0.5) * (size / new)
    at = torch.arange(longest, device=axes.device) + 0.5
    at = torch.where(from_end > 0, size - at, at)
    # Positions grow to many thousands: of float32's 24 bits, too few would be left for what is behind the point.
    whole = centre.floor()
    distance = (at.float()[:, None, :] - whole.float()[:, :, None]).sub_((centre - whole).float()[:, :, None])
    distance.abs_().div_((size / new).clamp(min=1.0).float()[:, :, None])
    weights = _KERNELS[interpolation](distance)
    weights *= ((at > 0) & (at < size))[:, None, :]
    # What of the crop is beyond the image has no weights, and is black.
    sums = torch.where((seen >= 0) & (seen < new), weights.sum(2), torch.inf)
    weights.div_(sums[:, :, None])
    # Rounded to 16 bits, as the CPU's resizer does: so both round the same halves up.
    scale = torch.exp2(torch.floor(torch.log2(32767.5 / weights.amax((1, 2), keepdim=True))))
    return weights.mul_(scale).round_().div_(scale)


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp_(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Catmull and Rom's, as Pillow has it: a = -0.5."""
    near = ((1.5 * distance - 2.5) * distance).mul_(distance).add_(1)
    far = ((-0.5 * distance + 2.5) * distance - 4).mul_(distance).add_(2)
    return torch.where(distance < 1, near, far).mul_(distance < 2)


_KERNELS = {"bilinear": _bilinear, "bicubic": _bicubic}


def _rounded(values: Tensor) -> Tensor:
    """As whole numbers of 0 to 255: bicubic overshoots, and Pillow rounds halves up."""
    return values.add_(0.5).clamp_(0, 255).floor_()
