"""Backbones: torchvision's classifiers without their classifier, value for value."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.torchvision_models import BACKBONES, output_shape
from shard_embedder.pipeline.core.errors import BackboneError, WeightsError
from tests.backbones.models import (
    ALL,
    FILLED,
    HEADS,
    SIDES,
    SMALLEST,
    Operations,
    assert_same,
    fed_to_classifier,
    filled_model,
    images,
    model_without_values,
    torchvision_model,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


NAMED = [
    "resnet18",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet50_stride1", "resnet152")),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_one_image_of_any_size_gives_pooled_features_and_a_map(name: str) -> None:
    weights = weights_of(filled_model(BACKBONES[name].architecture))
    pooled = build_backbone(name, weights, "pooled")
    mapped = build_backbone(name, weights_of(pooled), "map")
    for height, width in [(64, 64), (97, 65)]:
        x = images(1, height, width)
        with torch.no_grad():
            features, feature_map = pooled(x), mapped(x)
        assert features.shape == (1, pooled.num_features)
        assert feature_map.shape[:2] == (1, mapped.num_features)
        assert_same(features, feature_map.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMED, pytest.param("resnext101_32x8d", marks=pytest.mark.slow)])
def test_the_shapes_of_one_image_of_any_size_are_those_that_are_told(name: str) -> None:
    weights = weights_of(model_without_values(BACKBONES[name].architecture))
    pooled, mapped = (build_backbone(name, weights, features).to("meta") for features in ("pooled", "map"))
    # The other resnets differ from the smallest in their number of blocks.
    more = [(244, 244), (320, 256)] if name == "resnet18" else []
    for height, width in [(224, 224), (97, 161), *more]:
        with torch.no_grad():
            features, feature_map = (one(torch.zeros(1, 3, height, width, device="meta")) for one in (pooled, mapped))
        assert features.shape == (1, pooled.num_features)
        assert feature_map.shape[:2] == (1, mapped.num_features)
        assert tuple(features.shape[1:]) == output_shape(name, "pooled", (height, width))
        assert tuple(feature_map.shape[1:]) == output_shape(name, "map", (height, width))


def test_stride_1_keeps_the_weights_of_resnet50_and_changes_only_the_last_stage() -> None:
    plain, modified = build_backbone("resnet50", "random:5"), build_backbone("resnet50_stride1", "random:5")
    for key, value in plain.state_dict().items():
        assert torch.equal(modified.state_dict()[key], value)
    strides = {
        name: (module.stride, modified.get_submodule(name).stride)
        for name, module in plain.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    changed = {name: pair for name, pair in strides.items() if pair[0] != pair[1]}
    assert changed == {
        "layer4.0.conv2": ((2, 2), (1, 1)),
        "layer4.0.downsample.0": ((2, 2), (1, 1)),
    }


def test_stride_1_computes_what_torchvision_does_with_the_stride_changed() -> None:
    model: Any = filled_model("resnet50")
    weights = weights_of(model)
    model.layer4[0].conv2.stride = (1, 1)
    model.layer4[0].downsample[0].stride = (1, 1)
    x = images()
    with torch.no_grad():
        assert_same(build_backbone("resnet50_stride1", weights)(x), fed_to_classifier(model, x))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SMALLEST else [pytest.mark.slow]) for name in sorted(FILLED)],
)
def test_pooled_features_are_what_torchvision_feeds_its_classifier(name: str) -> None:
    model = filled_model(name)
    if hasattr(model, "transform_input"):
        model.transform_input = True  # as torchvision sets it with pretrained weights
    backbone = build_backbone(name, weights_of(model))
    x = images(2, SIDES.get(name, 64), SIDES.get(name, 64))
    with torch.no_grad():
        features = backbone(x)
    assert_same(features, fed_to_classifier(model, x))
    assert backbone.num_features == backbone.out_channels == features.shape[1]
    assert output_shape(name, "pooled", (x.shape[2], x.shape[3])) == features.shape[1:]
    head = tuple(f"{child}." for child in (*HEADS, "aux1", "aux2", "AuxLogits"))
    assert list(backbone.state_dict()) == [key for key in model.state_dict() if not key.startswith(head)]
    assert not any(module.training for module in backbone.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*ALL} - FILLED))
def test_the_others_compute_what_torchvision_does_up_to_its_classifier(name: str) -> None:
    """Without values: the same operations, in the same order, on the same parameters and results."""
    model = model_without_values(name)
    backbone = build_backbone(name, weights_of(model)).to("meta")
    x = torch.zeros(2, 3, 224, 224, device="meta")
    results: dict[str, Any] = {}
    wanted, computed = Operations(model, x, results), Operations(backbone, x, results)
    with wanted:
        fed = fed_to_classifier(model, x)
    with torch.no_grad(), computed:
        features = backbone(x)
    assert features.shape == fed.shape
    count = wanted.said.index(Operations.CLASSIFIER)
    assert count > 20
    assert computed.said[:count] == wanted.said[:count]
    assert {operation.partition("(")[0] for operation in computed.said[count:]} <= {"aten.view.default"}
    head = tuple(f"{child}." for child in HEADS)
    assert list(backbone.state_dict()) == [key for key in model.state_dict() if not key.startswith(head)]
    assert backbone.num_features == backbone.out_channels == features.shape[1]
    assert output_shape(name, "pooled", (224, 224)) == features.shape[1:]
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("alexnet", 256),
        ("densenet121", 1024),
        pytest.param("maxvit_t", 512, marks=pytest.mark.slow),
        ("squeezenet1_1", 512),
    ],
)
def test_num_features_of_a_map_is_its_number_of_channels(name: str, channels: int) -> None:
    backbone = build_backbone(name, weights_of(filled_model(name)), "map")
    side = SIDES.get(name, 64)
    with torch.no_grad():
        feature_map = backbone(images(1, side, side))
    assert feature_map.dim() == 4
    assert feature_map.shape[1] == backbone.num_features == backbone.out_channels == channels
    assert feature_map.shape[1:] == output_shape(name, "map", (side, side))


def test_a_densenet_map_ends_in_the_relu_that_torchvision_applies_before_pooling() -> None:
    with torch.no_grad():
        assert build_backbone("densenet121", weights_of(filled_model("densenet121")), "map")(images()).min() == 0


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
def test_random_weights_leave_the_input_as_torchvision_does_without_weights(name: str) -> None:
    model, backbone = torchvision_model(name, seed=7), build_backbone(name, "random:7")
    wanted = model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in backbone.state_dict().items())
    x = images(2, 80, 80)
    with torch.no_grad():
        assert_same(backbone(x), fed_to_classifier(model, x))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mnasnet0_5", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_random_weights_are_manual_seed_and_torchvisions_builder(name: str) -> None:
    wanted = torchvision_model(name, 11).state_dict()
    state = build_backbone(name, "random:11").state_dict()
    assert state
    for key, value in state.items():
        assert torch.equal(value, wanted[key])
    assert not torch.equal(
        next(iter(build_backbone(name, "random:12").state_dict().values())), next(iter(state.values()))
    )


def test_building_leaves_every_random_generator_as_it_was() -> None:
    weights = weights_of(filled_model("swin_t"))
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    build_backbone("shufflenet_v2_x0_5", "random:4")
    build_backbone("swin_t", weights)
    output_shape("swin_t", "map", (224, 224))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_weights_by_seed_are_named_by_the_sha256_of_their_parameters() -> None:
    weights = load_weights("squeezenet1_1", "random:3")
    assert (weights.name, weights.seed, weights.state, len(weights.sha256)) == ("random:3", 3, None, 64)
    assert load_weights("squeezenet1_1", "random:3") is weights, "they are drawn and hashed once"
    assert load_weights("squeezenet1_1", "random").name == "random:0"
    assert load_weights("squeezenet1_1", "random:4").sha256 != weights.sha256
    # A change of stride does not change parameters.
    assert load_weights("resnet50_stride1", "random").sha256 == load_weights("resnet50", "random").sha256


@pytest.mark.parametrize("spec", ["random:-1", "random:x", "random:", "random:1.5", f"random:{2**64}"])
def test_a_seed_that_is_no_seed_is_refused(spec: str) -> None:
    with pytest.raises(WeightsError, match=r"whole number from 0 to 2\*\*64 - 1, got 'random:"):
        load_weights("resnet18", spec)


def test_the_largest_seed_works() -> None:
    assert load_weights("squeezenet1_1", f"random:{2**64 - 1}").seed == 2**64 - 1


def test_a_backbone_trains_and_the_weights_it_was_built_from_stay() -> None:
    weights = weights_of(filled_model("resnet18"))
    assert weights.state is not None
    first = weights.state["conv1.weight"].clone()
    backbone = build_backbone("resnet18", weights)
    model = nn.Sequential(backbone, nn.Linear(backbone.num_features, 2)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(images(4)), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    assert not torch.equal(backbone.state_dict()["conv1.weight"], first)
    assert torch.equal(weights.state["conv1.weight"], first)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        pytest.param("resnet18", "pooled", marks=pytest.mark.slow),
        ("squeezenet1_1", "map"),
        pytest.param("vit_b_32", "pooled", marks=pytest.mark.slow),
        pytest.param("googlenet", "pooled", marks=pytest.mark.slow),
    ],
)
def test_a_backbone_exports_with_any_batch_and_gives_the_same(name: str, features: str) -> None:
    side = SIDES.get(name, 64)
    backbone = build_backbone(name, weights_of(filled_model(name)), features)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(backbone, (images(2, side, side),), dynamic_shapes=({0: batch},)).module()
    for count in (2, 3):
        x = images(count, side, side, seed=count)
        with torch.no_grad():
            assert_same(exported(x), backbone(x))


SMALL_AND_LARGER = ["resnet18", "squeezenet1_1", pytest.param("vit_b_32", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", SMALL_AND_LARGER)
def test_a_backbone_is_a_layer_that_pickles_copies_and_moves_like_any_module(name: str) -> None:
    side = SIDES.get(name, 64)
    backbone = build_backbone(name, weights_of(filled_model(name)))
    x = images(1, side, side)
    with torch.no_grad():
        wanted = backbone(x)
        # Half as large, which pickling needs four times.
        backbone, x = backbone.to(torch.bfloat16), x.to(torch.bfloat16)
        half = backbone(x)
        assert half.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(half.float(), wanted).item() > 0.99
        for twin_of in (lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy):
            twin = twin_of(backbone)
            assert torch.equal(twin(x), half)
            assert (twin.num_features, twin.out_channels) == (backbone.num_features, backbone.out_channels)
            del twin


@pytest.mark.parametrize("name", [*SMALL_AND_LARGER, pytest.param("maxvit_t", marks=pytest.mark.slow)])
def test_its_state_dict_goes_back_into_torchvisions_model(name: str) -> None:
    backbone = build_backbone(name, weights_of(filled_model(name)))
    fresh = model_without_values(name)
    missing, unexpected = fresh.load_state_dict(backbone.state_dict(), strict=False, assign=True)
    assert not unexpected
    assert all(key.startswith(HEADS) for key in missing)


def test_features_must_be_pooled_or_map() -> None:
    for call in (
        lambda: build_backbone("resnet18", "random", "logits"),
        lambda: output_shape("resnet18", "logits", (224, 224)),
    ):
        with pytest.raises(BackboneError, match="features must be pooled or map, got 'logits'"):
            call()


def test_a_vision_transformer_has_no_feature_map() -> None:
    with pytest.raises(BackboneError, match="vit_b_32 has no feature map"):
        build_backbone("vit_b_32", weights_of(model_without_values("vit_b_32")), "map")


@pytest.mark.slow
def test_a_vision_transformer_takes_the_image_size_of_its_weights() -> None:
    model = filled_model("vit_b_32", image_size=96)
    weights = weights_of(model)
    x = images(2, 96, 96)
    with torch.no_grad():
        assert_same(build_backbone("vit_b_32", weights)(x), fed_to_classifier(model, x))
    assert output_shape("vit_b_32", "pooled", (96, 96), weights) == (768,)
    with pytest.raises(BackboneError, match="position embedding is for images of 96x96"):
        output_shape("vit_b_32", "pooled", (224, 224), weights)
