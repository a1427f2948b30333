"""torchvision classifiers without their classifier: the table of backbones, and how one is built.

A backbone gives either pooled features [N, C], which is what feeds the classifier in torchvision's own
`forward`, or the feature map [N, C, H, W] before pooling. Its parameters keep torchvision's names.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn
from torchvision import models
from torchvision.models import (
    AlexNet,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    GoogLeNet,
    Inception3,
    MaxVit,
    MNASNet,
    MobileNetV2,
    MobileNetV3,
    RegNet,
    ResNet,
    ShuffleNetV2,
    SqueezeNet,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.vgg import VGG

from pipeline.decode import Preprocess
from pipeline.errors import BackboneError, WeightsError
from pipeline.weights import (
    Weights,
    load_state,
    named_weights,
    preprocess_of,
    random_seed,
    state_sha256,
)


@dataclass(frozen=True)
class Entry:
    """One backbone: torchvision's architecture, and what is changed in it after it is built."""

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


@dataclass(frozen=True)
class Anatomy:
    """Where a torchvision architecture keeps things.

    `stages` are the children that, one after the other, make the feature map, `pool` those that pool it
    (global average pooling where empty) and `head` the classifier.
    """

    head: str
    stages: tuple[str, ...]
    pool: tuple[str, ...] = ()


_RELU = "relu()"  # a step that torchvision's `forward` does without a module
_RESNET_STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
_INCEPTION_STAGES = (
    "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3",
    "maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d",
    "Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c",
)  # fmt: skip
_GOOGLENET_STAGES = (
    "conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3",
    "inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4",
    "inception5a", "inception5b",
)  # fmt: skip

ANATOMY: dict[type[nn.Module], Anatomy] = {
    AlexNet: Anatomy("classifier", ("features",), ("avgpool",)),
    ConvNeXt: Anatomy("classifier", ("features",), ("avgpool",)),
    DenseNet: Anatomy("classifier", ("features", _RELU)),
    EfficientNet: Anatomy("classifier", ("features",), ("avgpool",)),
    GoogLeNet: Anatomy("fc", _GOOGLENET_STAGES, ("avgpool",)),
    Inception3: Anatomy("fc", _INCEPTION_STAGES, ("avgpool",)),
    MaxVit: Anatomy("classifier", ("stem", "blocks")),
    MNASNet: Anatomy("classifier", ("layers",)),
    MobileNetV2: Anatomy("classifier", ("features",)),
    MobileNetV3: Anatomy("classifier", ("features",), ("avgpool",)),
    RegNet: Anatomy("fc", ("stem", "trunk_output"), ("avgpool",)),
    ResNet: Anatomy("fc", _RESNET_STAGES, ("avgpool",)),
    ShuffleNetV2: Anatomy("fc", ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")),
    SqueezeNet: Anatomy("classifier", ("features",)),
    SwinTransformer: Anatomy("head", ("features", "norm", "permute"), ("avgpool",)),
    VGG: Anatomy("classifier", ("features",), ("avgpool",)),
    VisionTransformer: Anatomy("heads", ()),
}
# torchvision sets `transform_input` with pretrained weights of these, which were ported from TensorFlow.
_REPEATS_INPUT_TRANSFORM = (GoogLeNet, Inception3)


# torchvision asks that these be told whether to draw their initial weights.
_SLOW_INITIALISATION = ("googlenet", "inception_v3")


class Backbone(nn.Sequential):
    """A backbone: images [N, 3, H, W] to features [N, C], or to feature maps [N, C, H', W'].

    `num_features` and `out_channels` are both C. Children and parameters carry torchvision's names.
    """

    def __init__(self, children: OrderedDict[str, nn.Module], num_features: int) -> None:
        super().__init__(children)
        self.num_features = num_features
        self.out_channels = num_features


class _TransformInput(nn.Module):
    """Input of Inception and GoogLeNet in TensorFlow's range, as torchvision's `_transform_input` makes it."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.new_tensor([0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5])[:, None, None]
        shift = x.new_tensor([(0.485 - 0.5) / 0.5, (0.456 - 0.5) / 0.5, (0.406 - 0.5) / 0.5])[:, None, None]
        return x * scale + shift


def find(name: str) -> str:
    """The backbone's own name: `name` itself or what it is an alias of.

    Raises:
        BackboneError: unknown; the nearest known names are listed.
    """
    name = ALIASES.get(name, name)
    if name in BACKBONES:
        return name
    near = difflib.get_close_matches(name, [*BACKBONES, *ALIASES], n=5, cutoff=0.4)
    hint = f"the nearest known ones are {', '.join(near)}" if near else "no known one is near"
    raise BackboneError(f"unknown backbone {name!r}; {hint}; all are in torchvision.models.list_models()")


def load_weights(backbone: str, spec: str) -> Weights:
    """Weights for a backbone from `DEFAULT`, a torchvision name, a path, a URL or `random[:SEED]`.

    Raises:
        BackboneError, WeightsError
    """
    architecture = BACKBONES[find(backbone)].architecture
    seed = random_seed(spec)
    if seed is not None:
        state = _classifier(architecture, Weights(spec, "", seed=seed)).state_dict()
        return Weights(f"random:{seed}", state_sha256(state), seed=seed)
    state, name, sha256 = load_state(architecture, spec)
    return Weights(name, sha256, state)


def preprocess_for(backbone: str, weights: str, preprocess: str = "DEFAULT") -> Preprocess:
    """Preprocessing of weights: their own, and for a file or random weights those of `preprocess`."""
    architecture = BACKBONES[find(backbone)].architecture
    entries = models.get_model_weights(architecture).__members__
    return preprocess_of(named_weights(architecture, weights if weights in entries else preprocess))


def output_shape(name: str, features: str, size: tuple[int, int]) -> tuple[int, ...]:
    """Shape of one image's features, (C,) or (C, H, W), for images of `size` (height, width); no weights needed.

    Raises:
        BackboneError: unknown name, no feature map, or a size that the architecture does not take.
    """
    entry = BACKBONES[find(name)]
    with torch.device("meta"):
        model = _empty_classifier(entry.architecture)
        if entry.modify is not None:
            entry.modify(model)
        backbone = _without_head(model.eval(), entry.architecture, features, pretrained=False)
        try:
            with torch.no_grad():
                return tuple(backbone(torch.zeros(1, 3, *size)).shape[1:])
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise BackboneError(f"{name} does not take images of {size[0]}x{size[1]}: {reason}") from error


def build_backbone(name: str, weights: str | Weights = "DEFAULT", features: str = "pooled") -> Backbone:
    """Build a backbone with its weights, as a plain module in eval mode.

    Args:
        name: torchvision's name, `resnet50_stride1`, or an alias of these.
        weights: what `load_weights` takes, or what it gave.
        features: `pooled` for [N, C], `map` for [N, C, H, W].

    Raises:
        BackboneError: unknown name, or an architecture without a feature map.
        WeightsError: weights that cannot be had or do not fit; missing and unexpected keys are named.
    """
    entry = BACKBONES[find(name)]
    if isinstance(weights, str):
        weights = load_weights(name, weights)
    model = _classifier(entry.architecture, weights)
    if entry.modify is not None:
        entry.modify(model)
    return _without_head(model, entry.architecture, features, pretrained=weights.state is not None)


def _classifier(architecture: str, weights: Weights) -> nn.Module:
    """torchvision's own model with `weights`; random ones are `torch.manual_seed` and its own initialisation."""
    if weights.state is None:
        options = {"init_weights": True} if architecture in _SLOW_INITIALISATION else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(weights.seed or 0)
            model: nn.Module = models.get_model_builder(architecture)(weights=None, **options)
            return model.eval()
    with torch.device("meta"):
        model = _empty_classifier(architecture)
    _load(model, architecture, weights)
    return model.eval()


def _empty_classifier(architecture: str) -> nn.Module:
    options = {"init_weights": False} if architecture in _SLOW_INITIALISATION else {}
    model: nn.Module = models.get_model_builder(architecture)(weights=None, **options)
    return model


def _load(model: nn.Module, architecture: str, weights: Weights) -> None:
    """Fill `model` with a state dict, which may lack the classifier and nothing else."""
    assert weights.state is not None
    head = ANATOMY[type(model)].head
    optional = (f"{head}.", "AuxLogits.", "aux1.", "aux2.", "aux.")
    needed = {key: value for key, value in weights.state.items() if not key.startswith(optional)}
    expected = model.state_dict()
    missing = [
        key
        for key in expected
        if key not in needed and not key.startswith(optional) and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in needed if key not in expected]
    wrong = [
        f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in needed.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
    if any(keys for _, keys in problems):
        text = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems if keys)
        raise WeightsError(f"weights {weights.name} do not fit {architecture}: {text}")
    for key, value in expected.items():
        if key.endswith("num_batches_tracked") and key not in needed:
            needed[key] = torch.zeros_like(value, device="cpu")
    model.load_state_dict(needed, strict=False, assign=True)


def _some(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _without_head(model: nn.Module, architecture: str, features: str, *, pretrained: bool) -> Backbone:
    anatomy = ANATOMY[type(model)]
    children: OrderedDict[str, nn.Module] = OrderedDict()
    if isinstance(model, VisionTransformer):
        if features == "map":
            raise BackboneError(
                f"{architecture} has no feature map: its tokens are not pooled; use --features pooled"
            )
        setattr(model, anatomy.head, nn.Identity())
        children["vit"] = model
        return Backbone(children, model.hidden_dim)
    if pretrained and isinstance(model, _REPEATS_INPUT_TRANSFORM):
        children["transform_input"] = _TransformInput()
    for stage in anatomy.stages:
        children["final_relu" if stage == _RELU else stage] = nn.ReLU() if stage == _RELU else _child(model, stage)
    num_channels = _num_channels(children)
    if features == "map":
        return Backbone(children, num_channels)
    for stage in anatomy.pool:
        children[stage] = getattr(model, stage)
    if not anatomy.pool:
        children["avgpool"] = nn.AdaptiveAvgPool2d(1)
    children["flatten"] = nn.Flatten(1)
    # AlexNet and VGG pool to a grid, and their classifier is fed all of it.
    grid = children["avgpool"].output_size
    height, width = grid if isinstance(grid, tuple) else (1, 1)
    return Backbone(children, num_channels * height * width)


def _child(model: nn.Module, name: str) -> nn.Module:
    child = getattr(model, name)
    return nn.Sequential(*child) if isinstance(child, nn.ModuleList) else child


def _num_channels(stages: OrderedDict[str, nn.Module]) -> int:
    """C of the feature map that `stages` make."""
    trunk = nn.Sequential(stages)
    state = {key: value.to("meta") for key, value in trunk.state_dict().items()}
    with torch.no_grad():
        feature_map = torch.func.functional_call(trunk, state, (torch.zeros(1, 3, 224, 224, device="meta"),))
    return int(feature_map.shape[1])


def versions() -> dict[str, str]:
    """Versions of what computes the features."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}
