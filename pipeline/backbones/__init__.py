"""Backbones by their names: torchvision's, and timm's as `timm/NAME`.

A backbone gives either pooled features [N, C], which is what feeds the classifier in its library's own
`forward`, or the feature map [N, C, H, W] before pooling. Which library it is, is decided here and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pipeline.backbones.weights_spec import Weights
from pipeline.core.errors import BackboneError
from pipeline.decoding.preprocess import Preprocess

if TYPE_CHECKING:
    from pipeline.backbones.base import Backbone

_TIMM = "timm/"


class Library(Protocol):
    """What is asked of a library of backbones: the functions of this module."""

    def find(self, name: str) -> str: ...  # noqa: D102
    def load_weights(self, name: str, spec: str) -> Weights: ...  # noqa: D102
    def preprocess_for(self, name: str, weights: str, preprocess: str = ...) -> Preprocess: ...  # noqa: D102
    def output_shape(  # noqa: D102
        self, name: str, features: str, size: tuple[int, int], weights: Weights | None = ...
    ) -> tuple[int, ...]: ...
    def build_backbone(  # noqa: D102
        self, name: str, weights: str | Weights = ..., features: str = ..., image_size: tuple[int, int] | None = ...
    ) -> Backbone: ...
    def versions(self) -> dict[str, str]: ...  # noqa: D102


def _library(name: str) -> Library:
    if not name.startswith(_TIMM):
        # Imports torch, which whoever only asks for weights by name need not wait for.
        from pipeline.backbones import torchvision_models  # noqa: PLC0415

        return torchvision_models
    try:
        # timm takes seconds to import, and is not installed everywhere.
        from pipeline.backbones import timm_models  # noqa: PLC0415
    except ImportError as error:
        raise BackboneError(
            f"backbone {name!r} needs timm, which is not here ({error}): pip install 'shard-embedder[timm]'"
        ) from error
    return timm_models


def find(name: str) -> str:
    """The backbone's own name: `name` itself or what it is an alias of.

    Raises:
        BackboneError: unknown, with the nearest known names listed; or of a library that is not installed.
    """
    return _library(name).find(name)


def load_weights(backbone: str, spec: str) -> Weights:
    """Weights for a backbone from `DEFAULT`, a name or tag of its library, a path, a URL or `random[:SEED]`.

    Raises:
        BackboneError: unknown name.
        WeightsError: weights that cannot be had or do not fit; missing and unexpected keys are named.
    """
    return _library(backbone).load_weights(backbone, spec)


def preprocess_for(backbone: str, weights: str, preprocess: str = "DEFAULT") -> Preprocess:
    """Preprocessing of weights: their own, and for a file or random weights those of `preprocess`.

    Raises:
        BackboneError: unknown name.
        WeightsError: no such preprocessing, or one other than that of the named weights.
    """
    return _library(backbone).preprocess_for(backbone, weights, preprocess)


def output_shape(name: str, features: str, size: tuple[int, int], weights: Weights | None = None) -> tuple[int, ...]:
    """Shape of one image's features, (C,) or (C, H, W), for images of `size` (height, width).

    Nothing is computed and no memory taken. `weights` matter only where they fix the image size, as those
    of torchvision's vision transformers do; without them it is the one that torchvision builds for, 224x224.

    Raises:
        BackboneError: unknown name, no feature map, or a size that the architecture does not take.
        WeightsError: weights that do not fit.
    """
    return _library(name).output_shape(name, features, size, weights)


def build_backbone(
    name: str,
    weights: str | Weights = "DEFAULT",
    features: str = "pooled",
    image_size: tuple[int, int] | None = None,
) -> Backbone:
    """Build a backbone with its weights in fp32, as a plain module in eval mode.

    The module owns its parameters: training it does not change `weights`. With weights from a file or of
    torchvision, GoogLeNet and Inception transform their input as torchvision's pretrained ones do.

    Args:
        name: torchvision's name, `resnet50_stride1`, an alias of these, or `timm/NAME[.TAG]`.
        weights: what `load_weights` takes, or what it gave.
        features: `pooled` for [N, C], `map` for [N, C, H, W].
        image_size: (height, width) of the images that it is to take, where timm builds it for one size; None for
            that of its weights. torchvision's take any size, or that of their weights.

    Raises:
        BackboneError: unknown name or features, or an architecture without a feature map.
        WeightsError: weights that cannot be had or do not fit; missing and unexpected keys are named.
    """
    return _library(name).build_backbone(name, weights, features, image_size)


def versions(backbone: str) -> dict[str, str]:
    """Versions of what computes the features."""
    return _library(backbone).versions()
