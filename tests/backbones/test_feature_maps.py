"""Several maps of one backbone by the names of its layers, and the list of all names."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork

from shard_embedder.pipeline.backbones import build_backbone, library_of, list_backbones
from shard_embedder.pipeline.backbones.weights import Weights
from shard_embedder.pipeline.core.errors import BackboneError
from tests.backbones.models import (
    fed_to_classifier,
    filled_model,
    images,
    own_values,
    torchvision_model,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def seen_at(module: nn.Module, layers: tuple[str, ...], x: Tensor) -> dict[str, Tensor]:
    """What modules give while `module` computes."""
    seen: dict[str, Tensor] = {}
    for layer in layers:
        module.get_submodule(layer).register_forward_hook(
            lambda _, __, output, layer=layer: seen.update({layer: output})
        )
    fed_to_classifier(module, x)
    return seen


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ("layer2", "layer3")),
        ("resnet18", ("layer4", "layer1")),
        ("mobilenet_v2", ("features.3", "features.18")),
        pytest.param("densenet121", ("features.denseblock2", "features.transition1.pool"), marks=pytest.mark.slow),
        ("squeezenet1_1", ("features.2",)),
    ],
)
def test_maps_are_what_the_layers_of_torchvisions_model_give(name: str, layers: tuple[str, ...]) -> None:
    model = own_values(filled_model(name))
    backbone = build_backbone(name, weights_of(model), features=layers)
    x = images(2, 96, 64)
    with torch.no_grad():
        found = backbone(x)
    wanted = seen_at(model, layers, x)
    assert list(found) == list(backbone.out_channels) == list(layers)
    for layer, features in found.items():
        assert torch.equal(features, wanted[layer])
        assert features.shape[:2] == (2, backbone.out_channels[layer])
    assert not backbone.training


@pytest.mark.slow
def test_maps_of_swin_have_channels_first() -> None:
    model = own_values(filled_model("swin_t"))
    layers = ("features.1", "features.3", "norm", "permute")
    backbone = build_backbone("swin_t", weights_of(model), features=list(layers))
    x = images(1, 64, 64)
    with torch.no_grad():
        found = backbone(x)
        wanted = create_feature_extractor(model, list(layers))(x)
    assert backbone.out_channels == {"features.1": 96, "features.3": 192, "norm": 768, "permute": 768}
    for layer, features in found.items():
        assert features.shape[1] == backbone.out_channels[layer]
        assert torch.equal(features, wanted[layer] if layer == "permute" else wanted[layer].permute(0, 3, 1, 2))


@pytest.mark.parametrize("is_random", [True, False])
def test_googlenet_transforms_its_input_where_its_weights_are_pretrained(is_random: bool) -> None:
    model: Any = torchvision_model("googlenet") if is_random else own_values(filled_model("googlenet"))
    model.transform_input = not is_random
    weights = "random:0" if is_random else weights_of(model)
    x = images(1, 64, 64)
    with torch.no_grad():
        found = build_backbone("googlenet", weights, features=("inception4a",))(x)
    assert torch.equal(found["inception4a"], seen_at(model, ("inception4a",), x)["inception4a"])


def test_the_last_stage_of_stride_1_is_larger() -> None:
    weights = weights_of(filled_model("resnet50"))
    maps = build_backbone("resnet50_stride1", weights, features=("layer3", "layer4"))(images(1, 64, 64))
    assert maps["layer3"].shape[2:] == maps["layer4"].shape[2:] == (4, 4)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("test_resnet", ("layer3", "layer2")),
        ("test_convnext", ("stages.1", "stages.3")),
        ("test_mambaout", ("stages.2",)),
        ("test_vit", ("blocks.2", "blocks.5")),
    ],
)
def test_maps_of_timm_are_those_of_its_own_intermediates(name: str, layers: tuple[str, ...]) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = timm.create_model(name).eval()
    backbone = build_backbone(f"timm/{name}", Weights("test", "", model.state_dict()), features=layers)
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, (_, intermediates) = backbone(x), model.forward_intermediates(x, output_fmt="NCHW")
    modules = [info["module"] for info in model.feature_info]
    assert list(found) == list(layers)
    for layer, features in found.items():
        assert torch.equal(features, intermediates[modules.index(layer)])
        assert features.shape[1] == backbone.out_channels[layer]


def test_a_feature_pyramid_stands_on_it_and_its_transform_is_the_backbones() -> None:
    backbone = build_backbone("resnet18", "random", features=("layer2", "layer3", "layer4"), image_size=(64, 96))
    pyramid = FeaturePyramidNetwork(list(backbone.out_channels.values()), 16)
    x = backbone.transform([torch.zeros(80, 70, 3, dtype=torch.uint8).numpy()])
    assert x.shape == (1, 3, 64, 96)
    loss = sum(level.mean() for level in pyramid(backbone.train()(x)).values())
    loss.backward()
    assert backbone.get_parameter("extractor.layer1.0.conv1.weight").grad is not None
    backbone.eval()
    with torch.no_grad():
        wanted = backbone(x)["layer3"]
        for twin in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
            assert torch.equal(twin(x)["layer3"], wanted)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("resnet18", ("layer2", "layr3"), "unknown layer 'layr3' of resnet18; the nearest known ones are layer3"),
        pytest.param(
            "vit_b_32", ("encoder",), r"layer 'encoder' of vit_b_32 must give a feature map .*, got \[N, 50, 768\]",
            marks=pytest.mark.slow,
        ),
        ("resnet18", (), "features must be pooled, map, or one layer or more, got"),
        ("resnet1", ("layer2",), "unknown backbone 'resnet1'"),
        ("timm/test_resnet", ("layer9",), "unknown layer 'layer9' of timm/test_resnet; .* are layer4"),
        ("timm/crossvit_tiny_240", ("blocks.0",), "timm/crossvit_tiny_240 has no feature maps by layer in timm"),
    ],
)  # fmt: skip
def test_a_layer_that_is_not_there_or_gives_no_map_is_refused(
    name: str, layers: tuple[str, ...], message: str
) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    with pytest.raises(BackboneError, match=message):
        build_backbone(name, "random", features=layers)


def test_every_listed_name_is_a_backbone() -> None:
    names = list_backbones()
    assert {*models.list_models(module=models), "resnet50_stride1"} <= {*names}
    assert len(names) == len({*names})
    for name in names:
        assert library_of(name).find(name) == name
