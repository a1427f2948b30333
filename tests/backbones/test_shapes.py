"""The shape of a backbone's features for an image size, found without values, and the sizes that it does not take."""

from __future__ import annotations

import gc

import pytest
from torch import Tensor, nn

from shard_embedder.pipeline.backbones.base import run_without_values
from shard_embedder.pipeline.backbones.torchvision_models import build_backbone, output_shape, preprocess_for
from shard_embedder.pipeline.core.errors import BackboneError
from tests.backbones.models import ALL, SMALLEST

# The table of docs/backbones.md: name, second name, C, side of the feature map at 224.
TABLE = [
    ("resnet18", "resnet_18", 512, 7),
    ("resnet34", "resnet_34", 512, 7),
    ("resnet50", "resnet_50", 2048, 7),
    ("resnet101", "resnet_101", 2048, 7),
    ("resnet152", "resnet_152", 2048, 7),
    ("resnet50_stride1", "resnet_50_modified_stride_1", 2048, 14),
    ("resnext101_32x8d", None, 2048, 7),
]
NAMES = [(name, channels, side) for first, second, channels, side in TABLE for name in (first, second) if name]
# By their papers: name and C.
HUGE = {"regnet_y_128gf": 7392, "regnet_y_32gf": 3712, "vit_h_14": 1280, "vit_l_16": 1024, "vit_l_32": 1024}
# Half a second each, for larger ones.
CHECKED = {*SMALLEST, "resnet_18", "resnet50_stride1"}


def marks(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in CHECKED else [pytest.mark.slow]


@pytest.mark.parametrize(("name", "channels", "side"), [pytest.param(*row, marks=marks(row[0])) for row in NAMES])
def test_the_table_of_backbones_holds(name: str, channels: int, side: int) -> None:
    assert output_shape(name, "pooled", (224, 224)) == (channels,)
    assert output_shape(name, "map", (224, 224)) == (channels, side, side)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "channels"), HUGE.items())
def test_shapes_of_huge_architectures_are_those_of_their_papers(name: str, channels: int) -> None:
    assert output_shape(name, "pooled", (224, 224)) == (channels,)
    if not name.startswith("vit"):
        assert output_shape(name, "map", (224, 224)) == (channels, 7, 7)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks(name)) for name in sorted({*ALL} - {*HUGE} - {"vit_b_16", "vit_b_32"})],
)
def test_every_architecture_but_vision_transformers_has_a_feature_map(name: str) -> None:
    channels, height, width = output_shape(name, "map", (224, 224))
    assert height == width >= 5
    # VGG and AlexNet feed their classifier a grid of 7x7 and 6x6.
    grid = {"alexnet": 36}.get(name, 49 if name.startswith("vgg") else 1)
    backbone = build_backbone(name, None, "pooled", None)
    assert run_without_values(backbone.to("meta"), (224, 224)) == (channels * grid,)
    # For the size of the weights nothing is run.
    assert output_shape(name, "pooled", preprocess_for(name, "DEFAULT").crop) == (channels * grid,)


@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t"])
@pytest.mark.parametrize("size", [(244, 244), (224, 256), (64, 64)])
def test_a_fixed_size_architecture_says_which_size_it_takes(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(BackboneError) as caught:
        output_shape(name, "pooled", size)
    assert f"{name} does not take images of {size[0]}x{size[1]}" in str(caught.value)
    assert "224x224" in str(caught.value)


def test_images_too_small_for_an_architecture_are_refused() -> None:
    with pytest.raises(BackboneError, match="alexnet does not take images of 16x16; its weights are for 224"):
        output_shape("alexnet", "pooled", (16, 16))
    assert output_shape("resnet18", "map", (16, 16)) == (512, 1, 1)


def test_shapes_of_a_huge_model_take_no_memory() -> None:
    before = {id(tensor) for tensor in _live_tensors()}
    assert output_shape("vit_h_14", "pooled", (224, 224)) == (1280,)
    assert sum(t.numel() for t in _live_tensors() if id(t) not in before) < 10**6


def _live_tensors() -> list[Tensor]:
    return [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and one.device.type != "meta"]
