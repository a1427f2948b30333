"""What a backbone is, whichever library its architecture comes from, and what building one takes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.backbones.weights_spec import Weights
from pipeline.core.errors import BackboneError

FEATURES = ("pooled", "map")


class Backbone(nn.Module):
    """A backbone: images [N, 3, H, W] to features [N, C], or to feature maps [N, C, H', W'].

    `num_features` and `out_channels` are both C.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.out_channels = num_features

    def forward(self, images: Tensor) -> Tensor:
        """Features of `images`, one row an image."""
        raise NotImplementedError


def check_features(features: str) -> None:
    """Raises `BackboneError` where there are no such features."""
    if features not in FEATURES:
        raise BackboneError(f"features must be pooled or map, got {features!r}")


def shapes_of(weights: Weights) -> Weights:
    """`weights` without values: enough to see whether they fit, in no time and memory."""
    assert weights.state is not None
    return replace(weights, state={key: value.to("meta") for key, value in weights.state.items()})


def run_without_values(backbone: nn.Module, size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of one image's features, of a backbone on the meta device, for images of `size` (height, width)."""
    with torch.no_grad():
        return tuple(backbone(torch.zeros(1, 3, *size, device="meta")).shape[1:])


def by(sizes: tuple[int, ...]) -> str:
    """Sizes for a message: 224x224."""
    return "x".join(map(str, sizes))
