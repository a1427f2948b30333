"""What a backbone is, and what torchvision's and timm's are built with alike."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shard_embedder.pipeline.backbones.transform import Transform
from shard_embedder.pipeline.core.config import FEATURES
from shard_embedder.pipeline.core.errors import BackboneError, WeightsError
from shard_embedder.pipeline.decoding.preprocess import Preprocess

DEFAULT = "DEFAULT"


class ImageModule(nn.Module):
    """A module that takes images as its weights ask for them: `module(module.transform(["a.jpg", "b.png"]))`."""

    # Set by `pipeline.backbones.build_backbone`. Only `transform` calls it: jobs do not support the preprocessing of
    # some timm weights, which are backbones all the same.
    find_preprocess: Callable[[], Preprocess]

    @cached_property
    def transform(self) -> Transform:
        """Prepares images as a job does for these weights. Raises `WeightsError` if jobs do not support theirs."""
        return Transform(self.find_preprocess())


class Backbone(ImageModule):
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


class FeatureMaps(ImageModule):
    """Several maps of one backbone, as detection needs them: images [N, 3, H, W] to {layer: [N, C, H', W']}.

    `out_channels` has the C of each layer, in the order in which they were asked for.
    """

    def __init__(self, out_channels: dict[str, int]) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The map of each layer, in the order of `out_channels`."""
        raise NotImplementedError


def channels_of(name: str, backbone: FeatureMaps, size: tuple[int, int]) -> dict[str, int]:
    """The C of each map [N, C, H, W] of a backbone on the meta device, for images of `size` (height, width).

    Raises:
        BackboneError: a layer gives something else.
    """
    maps = _forward_without_values(backbone, size)
    for layer, value in maps.items():
        if value.dim() != 4:
            shape = ", ".join(map(str, value.shape[1:]))
            raise BackboneError(f"layer {layer!r} of {name} must give a feature map [N, C, H, W], got [N, {shape}]")
    return {layer: value.shape[1] for layer, value in maps.items()}


def unknown_layer(name: str, layers: tuple[str, ...], nodes: Iterable[str]) -> BackboneError:
    """The error for the first of `layers` that is neither one of the `nodes` nor a module around one."""
    known = dict.fromkeys(
        node[:end] for node in nodes for end in range(1, len(node) + 1) if end == len(node) or node[end] == "."
    )
    layer = next(layer for layer in layers if layer not in known)
    near = near_names(layer, known) or list(known)[:8]
    return BackboneError(f"unknown layer {layer!r} of {name}; the nearest known ones are {', '.join(near)}")


def check_features(features: str) -> None:
    """Raise `BackboneError` for unknown features."""
    if features not in FEATURES:
        raise BackboneError(f"features must be pooled or map, got {features!r}")


def near_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that a mistyped one may mean, the nearest first."""
    return difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.4)


def unknown_backbone(name: str, near: list[str], all_known: str) -> BackboneError:
    """The error for an unknown name; `all_known` says where all names are."""
    hint = f"the nearest known ones are {', '.join(near)}" if near else "no known one is near"
    return BackboneError(f"unknown backbone {name!r}; {hint}; all are in {all_known}")


def own_preprocessing(weights: str, preprocess: str) -> WeightsError:
    """The error for a `preprocess` that differs from the preprocessing of named weights."""
    return WeightsError(
        f"weights {weights} bring their own preprocessing: preprocess is for a file or random weights, "
        f"got {preprocess!r}"
    )


def wrong_size(name: str, size: tuple[int, int], own: tuple[int, int], error: Exception) -> BackboneError:
    """The error for an image size (height, width) that an architecture does not take; its weights take `own`."""
    return BackboneError(
        f"{name} does not take images of {by(size)}; its weights are for {by(own)} ({first_line(error)})"
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw as after `torch.manual_seed(seed)`, and restore the global random state."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the GPUs as well, and nothing restores these.
        torch.default_generator.manual_seed(seed)
        yield


class _NormsKeepShapes(TorchFunctionMode):
    """Norms give what they are given: without values, torch spends most of a network's time on them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.batch_norm, nn.functional.layer_norm):
            return args[0]
        return func(*args, **(kwargs or {}))


def _forward_without_values(backbone: nn.Module, size: tuple[int, int]) -> Any:
    """What a backbone on the meta device gives for one image of `size` (height, width)."""
    with torch.no_grad(), _NormsKeepShapes():
        return backbone(torch.zeros(1, 3, *size, device="meta"))


def run_without_values(backbone: nn.Module, size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of one image's features, from a backbone on the meta device and images of `size` (height, width)."""
    return tuple(_forward_without_values(backbone, size).shape[1:])


def by(sizes: tuple[int, ...]) -> str:
    """Sizes for a message: 224x224."""
    return "x".join(map(str, sizes))


def first_line(error: Exception) -> str:
    """The first line of an error, without the advice that follows."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
