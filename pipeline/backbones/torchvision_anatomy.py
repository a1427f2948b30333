"""Takes torchvision's classifiers apart: what each architecture keeps where, and backbones of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
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
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vgg import VGG

from shard_embedder.pipeline.backbones.base import Backbone, FeatureMaps, unknown_layer
from shard_embedder.pipeline.core.errors import BackboneError


@dataclass(frozen=True)
class Anatomy:
    """Where a torchvision architecture keeps things.

    `head` is the classifier. `stages` are the children that make the feature map, in order. `training_only` are
    children that only training uses. The children `nhwc` give maps with the channels last. `avgpool` pools, or global
    average pooling if there is none.
    """

    head: str
    stages: tuple[str, ...]
    training_only: tuple[str, ...] = ()
    nhwc: tuple[str, ...] = ()


_RELU = "relu()"  # a step of torchvision's `forward` that is no module
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
    SwinTransformer: Anatomy("head", ("features", "norm", "permute"), nhwc=("features", "norm")),
    VGG: Anatomy("classifier", ("features",)),
    VisionTransformer: Anatomy("heads", ()),
}
# With pretrained weights torchvision sets `transform_input` of these, which were ported from TensorFlow.
TRANSFORMS_INPUT = (GoogLeNet, Inception3)


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


class TokenBackbone(_Stages):
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
        """[N, C] of images [N, 3, H, W]. Raises `ValueError` for a size that the weights are not for."""
        side = self.image_size
        if images.shape[-2:] != (side, side):
            raise ValueError(f"its position embedding is for images of {side}x{side}")
        patches = self.conv_proj(images).flatten(2).permute(0, 2, 1)
        class_token = self.class_token.expand(images.shape[0], -1, -1)
        tokens: Tensor = self.encoder(torch.cat([class_token, patches], dim=1))
        return tokens[:, 0]


class LayerMaps(FeatureMaps):
    """Layers of a classifier by `torchvision.models.feature_extraction`. Later layers are not computed."""

    def __init__(self, name: str, model: nn.Module, out_channels: dict[str, int]) -> None:
        super().__init__(out_channels)
        try:
            extractor = create_feature_extractor(model.eval(), list(out_channels), suppress_diff_warning=True)
        except ValueError as error:
            _, nodes = get_graph_node_names(model, suppress_diff_warning=True)
            raise unknown_layer(name, tuple(out_channels), nodes) from error
        # Copies of torchvision's own class are back in training mode.
        self.extractor = fx.GraphModule(extractor, extractor.graph)
        self._nhwc = ANATOMY[type(model)].nhwc

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The map of each layer, in the order of `out_channels`."""
        maps: dict[str, Tensor] = self.extractor(images)
        return {layer: self._with_channels_first(layer, maps[layer]) for layer in self.out_channels}

    def _with_channels_first(self, layer: str, features: Tensor) -> Tensor:
        is_nhwc = layer.partition(".")[0] in self._nhwc and features.dim() == 4
        return features.permute(0, 3, 1, 2) if is_nhwc else features


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


def without_head(model: nn.Module, name: str, features: str) -> Backbone:
    """The backbone `name` of a classifier: its stages, and what pools them unless `features` are `map`.

    Raises:
        BackboneError: the architecture has no feature map.
    """
    anatomy = ANATOMY[type(model)]
    if isinstance(model, VisionTransformer):
        if features == "map":
            raise BackboneError(
                f"{name} has no feature map: its features are a token, not a pooled map; use pooled features"
            )
        return TokenBackbone(model)
    children: dict[str, nn.Module] = {}
    if getattr(model, "transform_input", False):
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
