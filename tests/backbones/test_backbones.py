"""Backbones: torchvision's classifiers without their classifier, value for value."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from shard_embedder.pipeline.backbones import build_backbone, library_of, load_weights
from shard_embedder.pipeline.backbones.torchvision_models import (
    ALIASES,
    BACKBONES,
    find,
    output_shape,
    preprocess_for,
    versions,
)
from shard_embedder.pipeline.backbones.weights import Weights
from shard_embedder.pipeline.core.errors import BackboneError, WeightsError

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

# torchvision's classifier of each architecture, found by asking its models and not our table.
HEADS = ("classifier", "fc", "heads", "head")
# Too large to be filled with values in a test: of these, shapes alone are checked, without memory. The
# values of each one's class are checked on its smaller members. Name and C.
HUGE = {"regnet_y_128gf": 7392, "regnet_y_32gf": 3712, "vit_h_14": 1280, "vit_l_16": 1024, "vit_l_32": 1024}
# Seconds each: left to the whole test run.
LARGE = {
    "convnext_base", "convnext_large", "efficientnet_b6", "efficientnet_b7", "efficientnet_v2_l", "efficientnet_v2_m",
    "resnet152", "regnet_x_16gf", "regnet_x_32gf", "regnet_y_16gf",
    "resnext101_64x4d", "swin_b", "swin_v2_b", "vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn",
    "vgg19", "wide_resnet101_2",
}  # fmt: skip
ALL = sorted(models.list_models(module=models))
SIDES = {"maxvit_t": 224, "vit_b_16": 224, "vit_b_32": 224, "inception_v3": 80}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small inputs, and a machine shared with other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(count: int = 2, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    """Normalised images that differ from each other."""
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def torchvision_model(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """torchvision's own model with random weights; the global random state is not ours to change."""
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True, **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = models.get_model(name, weights=None, **options)
    return model.eval()


def classifier_of(model: nn.Module) -> nn.Module:
    return next(getattr(model, name) for name in HEADS if hasattr(model, name))


def fed_to_classifier(model: nn.Module, x: Tensor) -> Tensor:
    """What torchvision's own `forward` feeds its classifier, pooled where it is a map."""
    seen: list[Tensor] = []
    hook = classifier_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0].mean((2, 3)) if seen[0].dim() == 4 else seen[0]


def assert_same(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the size of `wanted`: random networks give 1e-15 as well as 1e6."""
    assert got.shape == wanted.shape
    assert wanted.std() > 0
    assert (got - wanted).norm() <= tolerance * wanted.norm()


def weights_of(model: nn.Module) -> Weights:
    return Weights("test", "", model.state_dict())


@pytest.mark.parametrize(("name", "channels", "side"), NAMES)
def test_the_table_of_backbones_holds(name: str, channels: int, side: int) -> None:
    assert output_shape(name, "pooled", (224, 224)) == (channels,)
    assert output_shape(name, "map", (224, 224)) == (channels, side, side)


def test_a_second_name_is_the_same_backbone() -> None:
    assert {alias: find(alias) for alias in ALIASES} == {second: first for first, second, *_ in TABLE if second}
    x = images(1, 40, 40)
    with torch.no_grad():
        assert torch.equal(build_backbone("resnet_18", "random:3")(x), build_backbone("resnet18", "random:3")(x))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50_stride1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet34", "resnet152", "resnext101_32x8d")),
    ],
)
def test_one_image_of_any_size_gives_pooled_features_and_a_map(name: str) -> None:
    weights = weights_of(torchvision_model(BACKBONES[name].architecture))
    pooled, mapped = build_backbone(name, weights, "pooled"), build_backbone(name, weights, "map")
    for height, width in [(224, 224), (244, 244), (320, 256), (97, 161)]:
        x = images(1, height, width)
        with torch.no_grad():
            features, feature_map = pooled(x), mapped(x)
        assert features.shape == (1, pooled.num_features)
        assert feature_map.shape[:2] == (1, mapped.num_features)
        assert tuple(features.shape[1:]) == output_shape(name, "pooled", (height, width))
        assert tuple(feature_map.shape[1:]) == output_shape(name, "map", (height, width))
        assert_same(features, feature_map.mean((2, 3)))


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
    model = torchvision_model("resnet50", 5)
    model.layer4[0].conv2.stride = (1, 1)
    model.layer4[0].downsample[0].stride = (1, 1)
    x = images()
    with torch.no_grad():
        assert_same(build_backbone("resnet50_stride1", "random:5")(x), fed_to_classifier(model, x))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in ALL if name not in HUGE],
)
def test_pooled_features_are_what_torchvision_feeds_its_classifier(name: str) -> None:
    model = torchvision_model(name)
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


@pytest.mark.parametrize(("name", "channels"), HUGE.items())
def test_shapes_of_huge_architectures_are_those_of_their_papers(name: str, channels: int) -> None:
    assert output_shape(name, "pooled", (224, 224)) == (channels,)
    if not name.startswith("vit"):
        assert output_shape(name, "map", (224, 224)) == (channels, 7, 7)


@pytest.mark.parametrize(
    ("name", "channels"), [("alexnet", 256), ("densenet121", 1024), ("maxvit_t", 512), ("squeezenet1_1", 512)]
)
def test_num_features_of_a_map_is_its_number_of_channels(name: str, channels: int) -> None:
    backbone = build_backbone(name, weights_of(torchvision_model(name)), "map")
    side = SIDES.get(name, 64)
    with torch.no_grad():
        feature_map = backbone(images(1, side, side))
    assert feature_map.dim() == 4
    assert feature_map.shape[1] == backbone.num_features == backbone.out_channels == channels
    assert feature_map.shape[1:] == output_shape(name, "map", (side, side))


@pytest.mark.parametrize("name", sorted({*ALL} - {*HUGE} - {"vit_b_16", "vit_b_32"}))
def test_every_architecture_but_vision_transformers_has_a_feature_map(name: str) -> None:
    channels, height, width = output_shape(name, "map", (224, 224))
    assert height == width >= 5
    # VGG and AlexNet feed their classifier a grid of 7x7 and 6x6.
    grid = {"alexnet": 36}.get(name, 49 if name.startswith("vgg") else 1)
    assert output_shape(name, "pooled", (224, 224)) == (channels * grid,)


def test_a_densenet_map_ends_in_the_relu_that_torchvision_applies_before_pooling() -> None:
    with torch.no_grad():
        assert build_backbone("densenet121", "random", "map")(images()).min() == 0


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_random_weights_leave_the_input_as_torchvision_does_without_weights(name: str) -> None:
    model = torchvision_model(name, seed=7)
    x = images(2, 80, 80)
    with torch.no_grad():
        assert_same(build_backbone(name, "random:7")(x), fed_to_classifier(model, x))


@pytest.mark.parametrize(
    "name", ["resnet18", "densenet121", "mnasnet0_5", "googlenet", "regnet_y_400mf", "shufflenet_v2_x0_5"]
)
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
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    model = torchvision_model("swin_t")
    build_backbone("swin_t", "random:4")
    build_backbone("swin_t", weights_of(model))
    output_shape("swin_t", "map", (224, 224))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_weights_by_seed_are_named_by_the_sha256_of_their_parameters() -> None:
    weights = load_weights("resnet18", "random:3")
    assert (weights.name, weights.seed, weights.state, len(weights.sha256)) == ("random:3", 3, None, 64)
    assert load_weights("resnet18", "random:3") == weights
    assert load_weights("resnet18", "random").name == "random:0"
    assert load_weights("resnet18", "random:4").sha256 != weights.sha256
    # A change of stride does not change parameters.
    assert load_weights("resnet50_stride1", "random").sha256 == load_weights("resnet50", "random").sha256


@pytest.mark.parametrize("spec", ["random:-1", "random:x", "random:", "random:1.5", f"random:{2**64}"])
def test_a_seed_that_is_no_seed_is_refused(spec: str) -> None:
    with pytest.raises(WeightsError, match=r"whole number from 0 to 2\*\*64 - 1, got 'random:"):
        load_weights("resnet18", spec)


def test_the_largest_seed_works() -> None:
    assert load_weights("squeezenet1_1", f"random:{2**64 - 1}").seed == 2**64 - 1


def test_a_backbone_trains_and_the_weights_it_was_built_from_stay() -> None:
    weights = weights_of(torchvision_model("resnet18"))
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
    [("resnet18", "pooled"), ("resnet50_stride1", "map"), ("vit_b_32", "pooled"), ("googlenet", "pooled")],
)
def test_a_backbone_exports_with_any_batch_and_gives_the_same(name: str, features: str) -> None:
    side = SIDES.get(name, 64)
    model = torchvision_model(BACKBONES[name].architecture)
    backbone = build_backbone(name, weights_of(model), features)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(backbone, (images(2, side, side),), dynamic_shapes=({0: batch},)).module()
    for count in (2, 3):
        x = images(count, side, side, seed=count)
        with torch.no_grad():
            assert_same(exported(x), backbone(x))


def test_a_backbone_is_a_layer_that_pickles_copies_and_moves_like_any_module() -> None:
    for name in ("resnet18", "vit_b_32", "squeezenet1_1"):
        side = SIDES.get(name, 64)
        backbone = build_backbone(name, weights_of(torchvision_model(name)))
        x = images(1, side, side)
        with torch.no_grad():
            wanted = backbone(x)
            for twin in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
                assert torch.equal(twin(x), wanted)
                assert (twin.num_features, twin.out_channels) == (backbone.num_features, backbone.out_channels)
            half = copy.deepcopy(backbone).to(torch.bfloat16)(x.to(torch.bfloat16))
        assert half.dtype == torch.bfloat16
        assert nn.functional.cosine_similarity(half.float(), wanted).item() > 0.99


def test_its_state_dict_goes_back_into_torchvisions_model() -> None:
    for name in ("resnet18", "vit_b_32", "maxvit_t"):
        backbone = build_backbone(name, weights_of(torchvision_model(name)))
        fresh = torchvision_model(name, seed=1)
        missing, unexpected = fresh.load_state_dict(backbone.state_dict(), strict=False)
        assert not unexpected
        assert all(key.startswith(HEADS) for key in missing)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("resnet5", "resnet50"),
        ("ResNet50", "resnet50"),
        ("resnet-18", "resnet18"),
        ("efficientnet", "efficientnet_b"),
    ],
)
def test_an_unknown_name_lists_the_nearest_known_ones(name: str, near: str) -> None:
    for call in (find, build_backbone, lambda name: output_shape(name, "pooled", (224, 224))):
        with pytest.raises(BackboneError, match="unknown backbone") as caught:
            call(name)
        assert repr(name) in str(caught.value)
        assert near in str(caught.value)


def test_a_name_near_to_none_says_so() -> None:
    with pytest.raises(BackboneError, match="no known one is near"):
        find("???")


def test_models_of_other_tasks_are_no_backbones() -> None:
    assert set(BACKBONES) == {*ALL, "resnet50_stride1"}
    with pytest.raises(BackboneError, match="unknown"):
        find("maskrcnn_resnet50_fpn")


def test_features_must_be_pooled_or_map() -> None:
    for call in (
        lambda: build_backbone("resnet18", "random", "logits"),
        lambda: output_shape("resnet18", "logits", (224, 224)),
    ):
        with pytest.raises(BackboneError, match="features must be pooled or map, got 'logits'"):
            call()


def test_a_vision_transformer_has_no_feature_map() -> None:
    with pytest.raises(BackboneError, match="vit_b_32 has no feature map"):
        build_backbone("vit_b_32", weights_of(torchvision_model("vit_b_32")), "map")


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


def test_a_vision_transformer_takes_the_image_size_of_its_weights() -> None:
    model = torchvision_model("vit_b_32", image_size=96)
    weights = weights_of(model)
    x = images(2, 96, 96)
    with torch.no_grad():
        assert_same(build_backbone("vit_b_32", weights)(x), fed_to_classifier(model, x))
    assert output_shape("vit_b_32", "pooled", (96, 96), weights) == (768,)
    with pytest.raises(BackboneError, match="position embedding is for images of 96x96"):
        output_shape("vit_b_32", "pooled", (224, 224), weights)


def test_shapes_of_a_huge_model_take_no_memory() -> None:
    before = {id(tensor) for tensor in _live_tensors()}
    assert output_shape("vit_h_14", "pooled", (224, 224)) == (1280,)
    assert sum(t.numel() for t in _live_tensors() if id(t) not in before) < 10**6


def _live_tensors() -> list[Tensor]:
    import gc

    return [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter) and one.device.type != "meta"]


def test_preprocessing_is_that_of_the_weights() -> None:
    first, second = (preprocess_for("resnet50", name) for name in ("IMAGENET1K_V1", "IMAGENET1K_V2"))
    assert (first.resize, first.crop, first.interpolation) == (256, (224, 224), "bilinear")
    assert (second.resize, second.crop) == (232, (224, 224))
    assert first.mean == (0.485, 0.456, 0.406)
    assert first.std == (0.229, 0.224, 0.225)
    assert preprocess_for("resnet50_stride1", "DEFAULT") == preprocess_for("resnet50", "DEFAULT") == second
    assert preprocess_for("resnet50", "random:1") == preprocess_for("resnet50", "some/file.pth") == second
    assert preprocess_for("resnet50", "some/file.pth", "IMAGENET1K_V1") == first
    assert preprocess_for("vit_h_14", "DEFAULT").crop == (518, 518)
    assert preprocess_for("efficientnet_b0", "DEFAULT").interpolation == "bicubic"


@pytest.mark.parametrize("name", ALL)
def test_every_published_preprocessing_is_understood(name: str) -> None:
    for weights in models.get_model_weights(name):
        preset, ours = weights.transforms(), preprocess_for(name, weights.name)
        assert [ours.resize] == preset.resize_size
        assert {*ours.crop} == {*preset.crop_size}
        assert (ours.interpolation, list(ours.mean), list(ours.std)) == (
            preset.interpolation.value,
            list(preset.mean),
            list(preset.std),
        )


def test_named_weights_and_another_preprocessing_are_refused() -> None:
    with pytest.raises(WeightsError, match="bring their own preprocessing"):
        preprocess_for("resnet50", "IMAGENET1K_V2", "IMAGENET1K_V1")
    with pytest.raises(WeightsError, match="must be one of DEFAULT, IMAGENET1K_V1"):
        preprocess_for("resnet18", "random", "IMAGENET1K_V9")


def test_versions_name_what_computes() -> None:
    assert library_of("resnet18").versions is versions
    assert versions()["torch"] == torch.__version__
    assert set(versions()) == {"torch", "torchvision"}


def test_a_preprocessing_that_is_none_is_named_with_those_that_are() -> None:
    message = "preprocess of resnet18 must be one of DEFAULT, IMAGENET1K_V1, got 'FOO'"
    for weights in ("random:0", "IMAGENET1K_V1"):
        with pytest.raises(WeightsError, match=f"^{message}$"):
            preprocess_for("resnet18", weights, "FOO")
