"""torchvision classifiers without their classifier: the table of backbones, and how one is built.

A backbone gives either pooled features [N, C], which is what feeds the classifier in torchvision's own
`forward`, or the feature map [N, C, H, W] before pooling. Its parameters keep torchvision's names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
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

from pipeline.backbones.base import (
    DEFAULT,
    Backbone,
    check_features,
    near_names,
    own_preprocessing,
    run_without_values,
    seeded,
    unknown_backbone,
    wrong_size,
)
from pipeline.backbones.weights import (
    StateDict,
    check_fit,
    load_file,
    published,
    random_weights,
    weights_from,
    without_values,
)
from pipeline.backbones.weights_spec import Weights, is_file, random_seed
from pipeline.core.errors import BackboneError, WeightsError
from pipeline.decoding.preprocess import Preprocess


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

    `head` is the classifier, `stages` are the children that, one after the other, make the feature map,
    and `training_only` those that only training uses. What pools is `avgpool` where there is one, and else
    global average pooling.
    """

    head: str
    stages: tuple[str, ...]
    training_only: tuple[str, ...] = ()


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
    AlexNet: Anatomy("classifier", ("features",)),
    ConvNeXt: Anatomy("classifier", ("features",)),
    DenseNet: Anatomy("classifier", ("features", _RELU)),
    EfficientNet: Anatomy("classifier", ("features",)),
    GoogLeNet: Anatomy("fc", _GOOGLENET_STAGES, ("aux1", "aux2")),
    Inception3: Anatomy("fc", _INCEPTION_STAGES, ("AuxLogits",)),
    MaxVit: Anatomy("classifier", ("stem", "blocks")),
    MNASNet: Anatomy("classifier", ("layers",)),
    MobileNetV2: Anatomy("classifier", ("features",)),
    MobileNetV3: Anatomy("classifier", ("features",)),
    RegNet: Anatomy("fc", ("stem", "trunk_output")),
    ResNet: Anatomy("fc", _RESNET_STAGES),
    ShuffleNetV2: Anatomy("fc", ("conv1", "maxpool", "stage2", "stage3", "stage4", "conv5")),
    SqueezeNet: Anatomy("classifier", ("features",)),
    SwinTransformer: Anatomy("head", ("features", "norm", "permute")),
    VGG: Anatomy("classifier", ("features",)),
    VisionTransformer: Anatomy("heads", ()),
}
# With pretrained weights torchvision sets `transform_input` of these, which were ported from TensorFlow.
_TRANSFORMS_INPUT = (GoogLeNet, Inception3)
# torchvision asks that these be told whether to draw their initial weights.
_ASKS_INITIALISATION = ("googlenet", "inception_v3")
_POSITIONS = "encoder.pos_embedding"  # of a vision transformer
# torchvision's files of DenseNet are older than its names: `norm.1` there is `norm1` in the model.
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")


class _Stages(Backbone):
    """Children that run in order; their parameters carry torchvision's names."""

    def __init__(self, children: dict[str, nn.Module], num_features: int) -> None:
        super().__init__(num_features)
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, images: Tensor) -> Tensor:
        for child in self.children():
            images = child(images)
        return images


class _VitBackbone(_Stages):
    """A vision transformer; its features are the class token after the encoder.

    Source: `torchvision.models.VisionTransformer.forward`, which has no module for these steps.
    """

    def __init__(self, model: VisionTransformer) -> None:
        super().__init__({"conv_proj": model.conv_proj, "encoder": model.encoder}, model.hidden_dim)
        self.conv_proj: nn.Module
        self.encoder: nn.Module
        self.class_token: nn.Parameter = model.class_token
        self.image_size: int = model.image_size

    def forward(self, images: Tensor) -> Tensor:
        side = self.image_size
        if images.shape[-2:] != (side, side):
            raise ValueError(f"its position embedding is for images of {side}x{side}")
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        tokens: Tensor = self.encoder(torch.cat([class_token, patches], dim=1))
        return tokens[:, 0]


class _TransformInput(nn.Module):
    """Input of Inception and GoogLeNet in TensorFlow's range, as torchvision's `_transform_input` makes it."""

    def __init__(self) -> None:
        super().__init__()
        scale = torch.tensor([0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5])[:, None, None]
        shift = torch.tensor([(0.485 - 0.5) / 0.5, (0.456 - 0.5) / 0.5, (0.406 - 0.5) / 0.5])[:, None, None]
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _WithoutValues(TorchFunctionMode):
    """Within it, modules get parameters of the right shape without memory or values.

    Not `torch.device("meta")`, under which RegNet's builder, which computes its widths with tensors, and
    buffers that are in no state dict would have no values either.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
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
        return random_weights(seed, _classifier(architecture, Weights(spec, "", seed=seed)))
    if is_file(spec):
        weights = load_file(spec)
    else:
        entry = _named_weights(architecture, spec)
        weights = weights_from(str(entry), published(entry.url, str(entry), "torchvision"), str(entry))
    _classifier(architecture, without_values(weights))  # raises where they do not fit
    return weights


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
    """Preprocessing of named weights: their own. For a file or random weights it is that of the weights `preprocess`.

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
    """What `weights.transforms()` does to a PIL image, as numbers. Raises `WeightsError` for other presets."""
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

    Nothing is computed and no memory is taken. `weights` matter only where they fix the image size, as those of
    vision transformers do; without them it is 224x224, for which torchvision builds these.

    Raises:
        BackboneError: unknown name, no feature map, or a size that the architecture does not take.
        WeightsError: weights that do not fit.
    """
    shapes = None if weights is None or weights.state is None else without_values(weights)
    backbone = _backbone(name, features, shapes).to("meta")
    try:
        return run_without_values(backbone, size)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise wrong_size(name, size, preprocess_for(name, DEFAULT).crop, error) from error


def build_backbone(
    name: str,
    weights: str | Weights = DEFAULT,
    features: str = "pooled",
    image_size: tuple[int, int] | None = None,
) -> Backbone:
    """Build a backbone as `pipeline.backbones.build_backbone` says. `image_size` changes nothing here."""
    return _backbone(name, features, load_weights(name, weights) if isinstance(weights, str) else weights)


def versions() -> dict[str, str]:
    """Versions of what computes the features."""
    return {"torch": torch.__version__, "torchvision": torchvision.__version__}


def _backbone(name: str, features: str, weights: Weights | None) -> Backbone:
    check_features(features)
    entry = BACKBONES[find(name)]
    model = _classifier(entry.architecture, weights)
    if entry.modify is not None:
        entry.modify(model)
    pretrained = weights is not None and weights.state is not None
    return _without_head(model, entry.architecture, features, pretrained=pretrained).eval()


def _classifier(architecture: str, weights: Weights | None) -> nn.Module:
    """torchvision's own model with `weights`, or without values where they are None.

    Random weights are `torch.manual_seed` and torchvision's own initialisation. The global random state stays what
    it was.
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
    """Have a vision transformer take the images that the position embedding in `state` was trained for."""
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


def _without_head(model: nn.Module, architecture: str, features: str, *, pretrained: bool) -> Backbone:
    anatomy = ANATOMY[type(model)]
    if isinstance(model, VisionTransformer):
        if features == "map":
            raise BackboneError(
                f"{architecture} has no feature map: its features are a token, not a pooled map; use pooled features"
            )
        return _VitBackbone(model)
    children: dict[str, nn.Module] = {}
    if pretrained and isinstance(model, _TRANSFORMS_INPUT):
        children["transform_input"] = _TransformInput()
    for stage in anatomy.stages:
        children["final_relu" if stage == _RELU else stage] = nn.ReLU() if stage == _RELU else _child(model, stage)
    num_features = _num_inputs(getattr(model, anatomy.head))
    pool = getattr(model, "avgpool", None) or nn.AdaptiveAvgPool2d(1)
    if features == "map":
        # AlexNet and VGG pool to a grid, and their classifier is fed all of it.
        height, width = pool.output_size if isinstance(pool.output_size, tuple) else (1, 1)
        return _Stages(children, num_features // (height * width))
    return _Stages({**children, "avgpool": pool, "flatten": nn.Flatten(1)}, num_features)


def _child(model: nn.Module, name: str) -> nn.Module:
    child = getattr(model, name)
    return nn.Sequential(*child) if isinstance(child, nn.ModuleList) else child


def _num_inputs(head: nn.Module) -> int:
    """How many features a classifier is fed."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise AssertionError("a classifier has a linear or convolutional layer")
