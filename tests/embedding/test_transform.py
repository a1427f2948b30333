"""What library users give a backbone is what a job gives it: the same images, the same features."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import models

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.weights import Weights
from shard_embedder.pipeline.core.errors import InputError, SampleError, WeightsError
from tests.conftest import encode, photo
from tests.embedding.test_parity import ENGINES, assorted, ours, source

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        pytest.param("efficientnet_b0", marks=pytest.mark.slow),
        pytest.param("timm/test_vit", marks=pytest.mark.slow),
    ],
)
def test_a_backbone_gives_what_the_jobs_embedder_gives(name: str, engine: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    images = assorted()
    backbone = build_backbone(name, "random:0")
    with torch.no_grad():
        found = backbone(backbone.transform(images)).numpy()
    wanted = ours(name, images, source(engine, name, Weights("random:0", "", seed=0)), "fp32")
    assert np.ptp(wanted, axis=0).max() > 0
    assert (np.linalg.norm(found - wanted, axis=1) <= 1e-5 * np.linalg.norm(wanted, axis=1)).all()


def test_an_image_is_the_same_however_it_is_given(tmp_path: Path) -> None:
    transform = build_backbone("squeezenet1_1", "random").transform
    for number, data in enumerate(assorted()):
        path = tmp_path / f"{number}.image"
        path.write_bytes(data)
        wanted = transform(data)
        assert wanted.shape == (3, 224, 224)
        assert wanted.dtype == torch.float32
        array = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
        given = [path, str(path), Image.open(io.BytesIO(data)), array]
        for image in given:
            assert torch.equal(transform(image), wanted), (number, type(image))
        together = transform([*given, data])
        assert together.shape == (5, 3, 224, 224)
        assert torch.equal(together[4], wanted)
        assert torch.equal(transform(tuple(given)), together[:4])
    assert transform([]).shape == (0, 3, 224, 224)


def test_it_is_torchvisions_own_preprocessing() -> None:
    weights = models.ResNet50_Weights.IMAGENET1K_V1
    image = photo(1, (500, 375))
    found = build_backbone("resnet50", "random", preprocess=weights.name).transform(image)
    wanted = weights.transforms()(image)
    # A few of the resized values are a neighbour of Pillow's.
    assert (found - wanted).abs().max() < 2 / 255 / 0.22
    assert (found - wanted).abs().mean() < 1e-3


def test_weights_image_size_and_preprocessing_decide_what_it_does(tmp_path: Path) -> None:
    assert build_backbone("squeezenet1_1", "random").transform.preprocess.resize == 256
    torch.save(models.squeezenet1_1().state_dict(), tmp_path / "w.pth")
    for weights in (str(tmp_path / "w.pth"), load_weights("squeezenet1_1", str(tmp_path / "w.pth"))):
        preprocess = build_backbone("squeezenet1_1", weights, image_size=(64, 96)).transform.preprocess
        assert (preprocess.crop, preprocess.resize) == ((64, 96), round(96 * 256 / 224))
    resizes = [
        build_backbone("resnet50", "random", preprocess=name).transform.preprocess.resize
        for name in ("DEFAULT", "IMAGENET1K_V1")
    ]
    assert resizes == [232, 256]
    with pytest.raises(WeightsError, match="preprocess of resnet18 must be one of DEFAULT, IMAGENET1K_V1, got 'FOO'"):
        _ = build_backbone("resnet18", "random", preprocess="FOO").transform


def test_what_is_no_image_has_the_jobs_own_errors(tmp_path: Path) -> None:
    transform = build_backbone("squeezenet1_1", "random").transform
    with pytest.raises(SampleError, match="not an image of a known format"):
        transform(b"<html>")
    with pytest.raises(SampleError, match="broken image"):
        transform([encode(photo(1))[:500]])
    with pytest.raises(InputError, match=r"image .*nowhere.jpg not found"):
        transform(tmp_path / "nowhere.jpg")
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4), np.uint8), np.zeros((3, 8, 8), np.uint8)):
        with pytest.raises(InputError, match=r"must be uint8 of shape \[H, W, 3\], got (uint8|float32) of shape \["):
            transform(array)
    with pytest.raises(InputError, match="got int"):
        transform(3)  # type: ignore[arg-type]


def test_it_goes_where_its_backbone_goes() -> None:
    backbone = build_backbone("squeezenet1_1", "random:1")
    wanted = backbone.transform(photo(1))
    for twin in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        assert torch.equal(twin.transform(photo(1)), wanted)


def test_weights_of_a_name_that_timm_does_not_know_are_built_and_have_no_transform() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    weights = Weights("mine", "", timm.create_model("test_resnet").state_dict())
    backbone = build_backbone("timm/test_resnet", weights)
    with pytest.raises(WeightsError, match="weights of timm/test_resnet must be one of DEFAULT, r160_in1k"):
        _ = backbone.transform
    assert build_backbone("timm/test_resnet", "random").transform(photo(1)).shape == (3, 160, 160)
