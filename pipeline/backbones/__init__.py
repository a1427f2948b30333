"""Backbones by name: torchvision's classifiers, and timm's models as `timm/NAME`, without their classifier.

This room knows architectures and their weights. It does not know devices, precision or what is stored.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, overload

from shard_embedder.pipeline.backbones import compiler
from shard_embedder.pipeline.backbones.weights_spec import Weights, random_seed, spec_of
from shard_embedder.pipeline.core.errors import BackboneError
from shard_embedder.pipeline.decoding.preprocess import Preprocess

if TYPE_CHECKING:
    from shard_embedder.pipeline.backbones.base import Backbone, FeatureMaps

_TIMM = "timm/"


def library_of(name: str) -> ModuleType:
    """The module of the library that has the backbone `name`: `torchvision_models` or `timm_models`.

    Both have the same functions: `find`, `load_weights`, `preprocess_for`, `output_shape`, `build_backbone`,
    `build_feature_maps`, `list_names` and `versions`. Their docstrings are in `torchvision_models`; `timm_models`
    says where it differs.

    Raises:
        BackboneError: the library is not installed.
    """
    # Both import torch, which takes seconds, and a worker that only unpickles a job does not need it.
    if not name.startswith(_TIMM):
        with compiler.imported_when_used():
            from shard_embedder.pipeline.backbones import torchvision_models  # noqa: PLC0415

        return torchvision_models
    try:
        from shard_embedder.pipeline.backbones import timm_models  # noqa: PLC0415
    except ImportError as error:
        raise BackboneError(f"backbone {name!r} needs timm, which is not here ({error}): pip install timm") from error
    return timm_models


@overload
def build_backbone(
    name: str,
    weights: str | Weights = ...,
    features: str = ...,
    image_size: tuple[int, int] | None = ...,
    preprocess: str = ...,
) -> Backbone: ...
@overload
def build_backbone(
    name: str,
    weights: str | Weights = ...,
    *,
    features: tuple[str, ...] | list[str],
    image_size: tuple[int, int] | None = ...,
    preprocess: str = ...,
) -> FeatureMaps: ...
def build_backbone(
    name: str,
    weights: str | Weights = "DEFAULT",
    features: str | tuple[str, ...] | list[str] = "pooled",
    image_size: tuple[int, int] | None = None,
    preprocess: str = "DEFAULT",
) -> Backbone | FeatureMaps:
    """Build a backbone with its weights in fp32: a plain `nn.Module` in eval mode, [N, 3, H, W] to features.

        backbone = build_backbone("resnet50", weights="IMAGENET1K_V2")
        images = backbone.transform(["a.jpg", "b.png"])   # [2, 3, 224, 224], as a job makes them
        features = backbone(images)                       # [2, 2048]

    The module owns its parameters, which keep their library's names: training it does not change `weights`.
    GoogLeNet and Inception transform their input as torchvision's pretrained ones do, unless the weights are random.

    Args:
        name: a classifier of `torchvision.models`, `resnet50_stride1`, an alias of these, or `timm/NAME[.TAG]`.
        weights: what `load_weights` takes, or what it returned.
        features: `pooled` for [N, C], the input of the library's own classifier; `map` for [N, C, H', W'], the
            feature map before pooling; or layers, for a dict of each one's map. Layers have the names of
            `torchvision.models.feature_extraction.get_graph_node_names` ("layer2"), or of the modules in
            `feature_info` of timm's model.
        image_size: (height, width) that `transform` gives, and that models of timm of one size are built for; None
            for the size of the weights.
        preprocess: the named weights whose preprocessing `transform` uses, where `weights` are a file or random.

    Raises:
        BackboneError: unknown name, features or layer, or an architecture without a feature map.
        WeightsError: weights that cannot be loaded or do not fit; missing and unexpected keys are named.
    """
    library = library_of(name)
    backbone: Backbone | FeatureMaps
    if not features:
        raise BackboneError(f"features must be pooled, map, or one layer or more, got {features!r}")
    spec = weights if isinstance(weights, str) else spec_of(weights.name)
    if isinstance(weights, str):
        seed = random_seed(weights)
        # To name random weights by their sha256 would be to draw them twice.
        weights = load_weights(name, weights) if seed is None else Weights(weights, "", seed=seed)
    if isinstance(features, str):
        backbone = library.build_backbone(name, weights, features, image_size)
    else:
        backbone = library.build_feature_maps(name, weights, tuple(features), image_size)
    backbone.find_preprocess = partial(_preprocess, name, spec, preprocess, image_size)
    return backbone


def _preprocess(name: str, weights: str, preprocess: str, image_size: tuple[int, int] | None) -> Preprocess:
    own: Preprocess = library_of(name).preprocess_for(name, weights, preprocess)
    return own if image_size is None else own.with_size(image_size)


def list_backbones() -> list[str]:
    """The names that `build_backbone` takes: torchvision's, and timm's where it is installed."""
    prefixes = ("", _TIMM) if find_spec("timm") is not None else ("",)
    return [name for prefix in prefixes for name in library_of(prefix).list_names()]


def load_weights(name: str, spec: str) -> Weights:
    """Load the weights of a backbone.

    Args:
        name: the backbone's name.
        spec: `DEFAULT`, a name of torchvision's weights (`IMAGENET1K_V2`) or a tag of timm's, a path or URL of a
            .pth, .pt or .safetensors file, or `random[:SEED]`.

    Raises:
        BackboneError: unknown name.
        WeightsError: weights that cannot be loaded or do not fit; missing and unexpected keys are named.
    """
    weights: Weights = library_of(name).load_weights(name, spec)
    return weights
