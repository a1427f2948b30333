"""torchvision's classifiers without their head: the table of backbones, and how one is built.

A backbone gives either pooled features [N, C], which is what feeds the classifier in torchvision's own
`forward`, or the feature map [N, C, H, W] before pooling. Its parameters keep torchvision's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.models import VisionTransformer

from shard_embedder.pipeline.backbones.base import (
    DEFAULT,
    Backbone,
    FeatureMaps,
    channels_of,
    check_features,
    near_names,
    own_preprocessing,
    run_without_values,
    seeded,
    unknown_backbone,
    wrong_size,
)
from shard_embedder.pipeline.backbones.torchvision_anatomy import (
    ANATOMY,
    TRANSFORMS_INPUT,
    LayerMaps,
    TokenBackbone,
    without_head,
)
from shard_embedder.pipeline.backbones.weights import (
    StateDict,
    check_fit,
    load_file,
    published,
    random_weights,
    weights_from,
    without_values,
)
from shard_embedder.pipeline.backbones.weights_spec import Weights, is_file, random_seed
from shard_embedder.pipeline.core.errors import WeightsError
from shard_embedder.pipeline.decoding.preprocess import Preprocess


@dataclass(frozen=True)
class Entry:
    """One backbone: torchvision's architecture, and a change to make in it."""

    architecture: str
    modify: Callable[[nn.Module], None] | None = None


def _last_stride_1(model: nn.Module) -> None:
    """Last stage of a bottleneck ResNet with stride 1: a feature map of twice the height and width.

    Source: Luo et al., "Bag of Tricks and A Strong Baseline for Deep Person Re-identification", 2019.
    """
    for name in ("layer4.0.conv2", "layer4.0.downsample.0"):
        convolution = model.get_submodule(name)
        assert isinstance(convolution, nn.Conv2d)
        convolution.stride = (1, 1)


BACKBONES: dict[str, Entry] = {name: Entry(name) for name in models.list_models(module=models)} | {
    "resnet50_stride1": Entry("resnet50", _last_stride_1),
}

ALIASES = {
    "resnet_18": "resnet18",
    "resnet_34": "resnet34",
    "resnet_50": "resnet50",
    "resnet_101": "resnet101",
    "resnet_152": "resnet152",
    "resnet_50_modified_stride_1": "resnet50_stride1",
}


# The builders of these want to be told whether to draw initial weights.
_ASKS_INITIALISATION = ("googlenet", "inception_v3")
_INITIALISERS = {nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_, Tensor.normal_}
_POSITIONS = "encoder.pos_embedding"  # of a vision transformer
# torchvision's files of DenseNet are older than its names: `norm.1` there is `norm1` in the model.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


class _WithoutValues(TorchFunctionMode):
    """Within it, modules get parameters with a shape and neither memory nor values.

    With `torch.device("meta")`, other tensors would have no values either: those by which RegNet's builder computes
    its widths, and buffers that no state dict has.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in _INITIALISERS:
            tensor = args[0] if args else kwargs["tensor"]
            # To draw nothing takes torch as long as to build all the rest.
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def find(name: str) -> str:
    """The backbone's own name: `name` itself or what it is an alias of.

    Raises:
        BackboneError: unknown; the nearest known names are listed.
    """
    name = ALIASES.get(name, name)
    if name in BACKBONES:
        return name
    raise unknown_backbone(
        name,
        near_names(name, [*BACKBONES, *ALIASES]),
        "torchvision.models.list_models(module=torchvision.models); those of timm are timm/NAME",
    )


def load_weights(name: str, spec: str) -> Weights:
    """Load the weights of a backbone, as `pipeline.backbones.load_weights` says."""
    architecture = BACKBONES[find(name)].architecture
    seed = random_seed(spec)
    if seed is not None:
        return _drawn(architecture, seed)
    if is_file(spec):
        weights = load_file(spec)
    else:
        entry = _named_weights(architecture, spec)
        weights = weights_from(str(entry), published(entry.url, str(entry), "torchvision"), str(entry))
    _classifier(architecture, without_values(weights))  # raises where they do not fit
    return weights


@cache
def _drawn(architecture: str, seed: int) -> Weights:
    """What random weights are called: to draw and to hash them takes longer than many a run of a few images."""
    return random_weights(seed, _classifier(architecture, Weights("", "", seed=seed)))


def _named_weights(architecture: str, name: str) -> models.WeightsEnum:
    """A member of torchvision's weights of an architecture, `DEFAULT` included.

    Raises:
        WeightsError: no such name; the known ones are listed.
    """
    known = models.get_model_weights(architecture)
    if name not in known.__members__:
        raise WeightsError(
            f"weights of {architecture} must be one of {_names(known)}, random[:SEED], or the path or URL of a "
            f".pth, .pt or .safetensors file, got {name!r}"
        )
    return known[name]


def _names(known: type[models.WeightsEnum]) -> str:
    return ", ".join([DEFAULT, *(entry.name for entry in known)])


def preprocess_for(name: str, weights: str, preprocess: str = DEFAULT) -> Preprocess:
    """The preprocessing of named weights; for a file or random weights, that of the weights `preprocess`.

    Raises:
        BackboneError: unknown name.
        WeightsError: unknown `preprocess`, or one that differs from the named weights' own.
    """
    architecture = BACKBONES[find(name)].architecture
    known = models.get_model_weights(architecture)
    if preprocess not in known.__members__:
        raise WeightsError(f"preprocess of {architecture} must be one of {_names(known)}, got {preprocess!r}")
    asked = _preprocess(known[preprocess])
    own = _preprocess(known[weights]) if weights in known.__members__ else asked
    if preprocess != DEFAULT and asked != own:
        raise own_preprocessing(weights, preprocess)
    return own


def _preprocess(weights: models.WeightsEnum) -> Preprocess:
    """What `weights.transforms()` does to a PIL image, as numbers. Raises `WeightsError` for an unknown preset."""
    preset = weights.transforms()
    try:
        crop = preset.crop_size
        return Preprocess(
            resize=preset.resize_size[0],
            crop=(crop[0], crop[-1]),
            interpolation=preset.interpolation.value,
            mean=tuple(preset.mean),
            std=tuple(preset.std),
        )
    except AttributeError as error:
        raise WeightsError(f"{weights} has an unknown preprocessing: {type(preset).__name__}") from error


def output_shape(name: str, features: str, size: tuple[int, int], weights: Weights | None = None) -> tuple[int, ...]:
    """Shape of one image's features, (C,) or (C, H', W'), for images of `size` (height, width).

    It takes no memory and computes nothing. `weights` matter only for vision transformers, whose weights fix the
    image size; without weights it is torchvision's 224x224.

    Raises:
        BackboneError: unknown name, no feature map, or a size that the architecture does not take.
        WeightsError: weights that do not fit.
    """
    if weights is None or weights.state is None:
        return _shape_without_weights(name, features, size)
    return _shape(build_backbone(name, without_values(weights), features, size), name, features, size)


@cache
def _shape_without_weights(name: str, features: str, size: tuple[int, int]) -> tuple[int, ...]:
    return _shape(build_backbone(name, None, features, size), name, features, size)


def _shape(backbone: Backbone, name: str, features: str, size: tuple[int, int]) -> tuple[int, ...]:
    own = preprocess_for(name, DEFAULT).crop
    if isinstance(backbone, TokenBackbone):
        own = (backbone.image_size, backbone.image_size)
    # To run without values, torch imports its compiler, for 2 s of processor time.
    if features == "pooled" and size == own:
        return (backbone.num_features,)
    backbone = backbone.to("meta")
    try:
        return run_without_values(backbone, size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise wrong_size(name, size, own, error) from error


def build_backbone(name: str, weights: Weights | None, features: str, image_size: tuple[int, int] | None) -> Backbone:
    """Build a backbone as `pipeline.backbones.build_backbone` says; without values if `weights` are None.

    `image_size` changes nothing here.
    """
    check_features(features)
    return without_head(_whole(name, weights), name, features).eval()


def build_feature_maps(
    name: str, weights: Weights, layers: tuple[str, ...], image_size: tuple[int, int] | None
) -> FeatureMaps:
    """Several feature maps, by the names that `torchvision.models.feature_extraction` gives to layers.

    Raises:
        BackboneError: unknown name or layer, or a layer that does not give a feature map.
        WeightsError: weights that do not fit.
    """
    shapes = without_values(weights) if weights.state is not None else None
    meta = LayerMaps(name, _whole(name, shapes).to("meta"), dict.fromkeys(layers, 0))
    channels = channels_of(name, meta, image_size or preprocess_for(name, DEFAULT).crop)
    return LayerMaps(name, _whole(name, weights), channels).eval()


def list_names() -> list[str]:
    """The names of all backbones, without aliases."""
    return list(BACKBONES)


def versions() -> dict[str, str]:
    """Versions of what computes the features."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


def _whole(name: str, weights: Weights | None) -> nn.Module:
    """torchvision's own classifier with these weights, of which the backbone is a part."""
    entry = BACKBONES[find(name)]
    model = _classifier(entry.architecture, weights)
    if entry.modify is not None:
        entry.modify(model)
    if isinstance(model, TRANSFORMS_INPUT):
        model.transform_input = weights is not None and weights.state is not None
    return model.eval()


def _classifier(architecture: str, weights: Weights | None) -> nn.Module:
    """torchvision's own model with `weights`; without values if they are None.

    Random weights are torchvision's own initialisation after `torch.manual_seed`.
    """
    seed = None if weights is None else weights.seed
    draws = {"init_weights": seed is not None} if architecture in _ASKS_INITIALISATION else {}
    with seeded(seed or 0), nullcontext() if seed is not None else _WithoutValues():
        model: nn.Module = models.get_model_builder(architecture)(weights=None, **draws)
    if weights is not None and weights.state is not None:
        _load(model, architecture, weights.name, weights.state)
    return model


def _load(model: nn.Module, architecture: str, name: str, state: StateDict) -> None:
    """Fill `model` with copies of a state dict, which may lack the classifier and nothing else."""
    anatomy = ANATOMY[type(model)]
    optional = tuple(f"{child}." for child in (anatomy.head, *anatomy.training_only))
    given = {_OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items() if not key.startswith(optional)}
    if isinstance(model, VisionTransformer):
        _fit_image_size(model, given)
    expected = model.state_dict()
    check_fit(expected, given, name, architecture, optional)
    # Into `expected`, which carries the versions that MNASNet asks for when it loads.
    for key, value in given.items():
        expected[key] = value.detach().to(expected[key].dtype, copy=True)
    model.load_state_dict(expected, assign=True)


def _fit_image_size(model: VisionTransformer, state: StateDict) -> None:
    """Give a vision transformer the image size that the position embedding in `state` was trained for."""
    embedding = state.get(_POSITIONS)
    if embedding is None or embedding.dim() != 3:
        return
    num_patches = embedding.shape[1] - 1  # one position is the class token's
    side = math.isqrt(max(0, num_patches))
    if side**2 == num_patches:
        model.image_size = side * model.patch_size
        model.encoder.pos_embedding = nn.Parameter(
            torch.empty(1, embedding.shape[1], model.hidden_dim, device="meta")
        )
