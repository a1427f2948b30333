"""torchvision's backbones by name: the table of the docs, second names, and the preprocessing of their weights."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from shard_embedder.pipeline.backbones import build_backbone, library_of
from shard_embedder.pipeline.backbones.torchvision_models import (
    ALIASES,
    BACKBONES,
    find,
    output_shape,
    preprocess_for,
    versions,
)
from shard_embedder.pipeline.core.errors import BackboneError, WeightsError
from tests.backbones.models import ALL, images
from tests.backbones.test_shapes import TABLE

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_second_name_is_the_same_backbone() -> None:
    assert {alias: find(alias) for alias in ALIASES} == {second: first for first, second, *_ in TABLE if second}
    x = images(1, 40, 40)
    with torch.no_grad():
        assert torch.equal(build_backbone("resnet_18", "random:3")(x), build_backbone("resnet18", "random:3")(x))


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
