"""timm's models as backbones: timm's own vectors, preprocessing and names, value for value."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save as save_safetensors

from shard_embedder.pipeline import backbones
from shard_embedder.pipeline.backbones import build_backbone, library_of, load_weights
from shard_embedder.pipeline.backbones.weights import Weights
from shard_embedder.pipeline.core.errors import BackboneError, WeightsError
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.resize import resize_crop
from shard_embedder.pipeline.embedding.network import Network
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.embedding.torch_runner import build_network
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import encode, photo, write_shards
from tests.embedding.test_parity import CENTRED, ENGINES, assert_parity, assorted, cosine, ours, source
from tests.outputs import embed

timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")

from shard_embedder.pipeline.backbones.timm_models import find, output_shape, preprocess_for, versions  # noqa: E402  needs timm
from tests.backbones.timm_files import redrawn  # noqa: E402  needs timm

pytestmark = pytest.mark.usefixtures("one_thread")

# Small ones of timm's own tests: a ResNet, a ConvNeXt, a plain vision transformer, one that pools by attention
# as SigLIP does, and one with registers and layer scale as DINOv2 has.
SMALL = ["test_resnet", "test_convnext", "test_vit", "test_vit3", "test_vit2"]


def features_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = model.forward_head(model.forward_features(x), pre_logits=True)
    return features


def reference(model: Any, images: list[bytes]) -> Any:
    """Embeddings [N, C] by timm alone, on PIL images."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = []
    for data in images:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        rows.append(features_of(model, transform(image)[None])[0].double().numpy())
    return np.stack(rows)


def saved(model: Any, folder: Path) -> str:
    """The path of a file in timm's own format, classifier included."""
    path = folder / "weights.safetensors"
    path.write_bytes(save_safetensors({key: value.contiguous() for key, value in model.state_dict().items()}))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name == "test_vit3" else [pytest.mark.slow]) for name in SMALL]
)
def test_timms_own_vectors_come_out_of_a_weights_file(architecture: str, tmp_path: Path) -> None:
    backbone, images = f"timm/{architecture}", assorted()
    model = redrawn(architecture)
    wanted = reference(model, images)
    weights = load_weights(backbone, saved(model, tmp_path))
    for engine in ENGINES:
        assert_parity(ours(backbone, images, source(engine, backbone, weights), "fp32"), wanted, "fp32")


@pytest.mark.slow
def test_the_measure_can_fail(tmp_path: Path) -> None:
    """Other parameters, another pooling or another preprocessing show in the centred cosine."""
    images = assorted()
    model = redrawn("test_vit3")
    wanted = reference(model, images)
    centre = wanted.mean(0)

    def lowest(weights: Weights) -> float:
        got = ours("timm/test_vit3", images, source("torch", "timm/test_vit3", weights), "fp32")
        return float(cosine(got - centre, wanted - centre).min())

    path = saved(model, tmp_path)
    assert lowest(load_weights("timm/test_vit3", path)) > CENTRED["fp32"]
    model.blocks[8].mlp.fc2.weight.data.mul_(-1.0)
    assert lowest(load_weights("timm/test_vit3", saved(model, tmp_path))) < CENTRED["fp32"]
    assert lowest(load_weights("timm/test_vit3", "random:1")) < 0.5
    rotated = [encode(photo(3, (640, 300)).rotate(180)) if index == 2 else data for index, data in enumerate(images)]
    got = ours(
        "timm/test_vit3", rotated, source("torch", "timm/test_vit3", load_weights("timm/test_vit3", path)), "fp32"
    )
    assert cosine(got - centre, wanted - centre)[2] < CENTRED["fp32"]


def published_preprocessings() -> dict[tuple[Any, ...], str]:
    """One name of timm for each way to resize and crop that it publishes weights for."""
    found: dict[tuple[Any, ...], str] = {}
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name)
        if config.input_size[1] <= 512:
            found.setdefault(
                (config.crop_mode, config.crop_pct, config.interpolation, config.input_size[1] <= 300), name
            )
    return found


def test_pixels_are_those_of_timms_own_transform() -> None:
    modes = set()
    for (mode, *_), name in published_preprocessings().items():
        if mode == "border":
            continue
        modes.add(mode)
        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        transform = timm.data.create_transform(**data, normalize=False)
        ours = preprocess_for(f"timm/{name}", "DEFAULT")
        for size in [(300, 201), (150, 333)]:
            image = photo(1, size)
            wanted = transform(image).permute(1, 2, 0).numpy().astype(int)
            got = resize_crop(np.asarray(image), ours).astype(int)
            assert got.shape == wanted.shape
            # Resizing and cropping in one step rounds a few values otherwise.
            levels = np.abs(got - wanted)
            assert levels.max() <= 2, (name, size)
            assert (levels == 2).mean() < 1e-3, (name, size)
            assert (levels > 0).mean() < 0.05, (name, size)
    assert modes == {"center", "squash"}


def test_every_published_preprocessing_is_understood_or_refused_by_name() -> None:
    refused = set()
    for name in timm.list_pretrained():
        data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        if data["crop_mode"] == "border":
            refused.add(name)
            with pytest.raises(WeightsError, match="not supported: crop_mode 'border'"):
                preprocess_for(f"timm/{name}", "DEFAULT")
            continue
        ours = preprocess_for(f"timm/{name}", "DEFAULT")
        assert (3, *ours.crop) == tuple(data["input_size"])
        assert (ours.interpolation, ours.mode) == (data["interpolation"], data["crop_mode"])
        assert (ours.mean, ours.std) == (tuple(data["mean"]), tuple(data["std"]))
    assert refused


def test_a_stretched_image_is_seen_whole_and_another_size_keeps_it_so() -> None:
    squash = preprocess_for("timm/eva02_base_patch14_448", "random")
    assert (squash.mode, squash.resize, squash.crop) == ("squash", 448, (448, 448))
    pixels = np.zeros((40, 200, 3), np.uint8)
    pixels[:, :100] = 255
    small = resize_crop(pixels, squash.with_size((20, 30)))
    assert small.shape == (20, 30, 3)
    assert (small[:, :12] == 255).all()
    assert (small[:, 18:] == 0).all()


def test_a_preprocessing_is_the_same_after_json() -> None:
    center = preprocess_for("resnet50", "DEFAULT")
    squash = preprocess_for("timm/eva02_base_patch14_448", "random")
    assert (center.mode, squash.mode) == ("center", "squash")
    for preprocess in (center, squash):
        assert Preprocess.from_json(json.loads(json.dumps(preprocess.to_json()))) == preprocess


def test_random_weights_are_manual_seed_and_timms_builder() -> None:
    before = torch.get_rng_state()
    backbone = build_backbone("timm/test_vit", "random:7")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = timm.create_model("test_vit", num_classes=0).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(backbone(x), features_of(model, x))
    weights = load_weights("timm/test_vit", "random:7")
    assert (weights.name, weights.seed, weights.state) == ("random:7", 7, None)
    assert weights.sha256 != load_weights("timm/test_vit", "random:8").sha256


@pytest.mark.parametrize(
    ("name", "is_nhwc", "shape"),
    [("test_convnext", False, (64, 5, 5)), ("test_mambaout", True, (64, 5, 5)), ("test_resnet", False, (96, 5, 5))],
)
def test_a_feature_map_is_that_of_forward_features_with_channels_first(
    name: str, is_nhwc: bool, shape: tuple[int, ...]
) -> None:
    weights = Weights("test", "", redrawn(name).state_dict())
    backbone = build_backbone(f"timm/{name}", weights, "map")
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        wanted = redrawn(name).forward_features(x)
        got = backbone(x)
    assert torch.allclose(got, wanted.permute(0, 3, 1, 2) if is_nhwc else wanted)
    assert tuple(got.shape[1:]) == output_shape(f"timm/{name}", "map", (160, 160), weights) == shape
    assert backbone.num_features == backbone.out_channels == shape[0]


@pytest.mark.parametrize("name", ["timm/test_vit", pytest.param("timm/crossvit_tiny_240", marks=pytest.mark.slow)])
def test_tokens_are_no_feature_map(name: str) -> None:
    for call in (lambda: output_shape(name, "map", (240, 240)), lambda: build_backbone(name, "random", "map")):
        with pytest.raises(BackboneError, match=f"{name} has no .*map"):
            call()


def test_an_encoder_without_pooling_has_no_pooled_features() -> None:
    with pytest.raises(BackboneError, match="timm/gemma4_vit_167m_enc has no pooled features"):
        output_shape("timm/gemma4_vit_167m_enc", "pooled", (768, 768))


def test_features_must_be_pooled_or_map() -> None:
    with pytest.raises(BackboneError, match="features must be pooled or map, got 'logits'"):
        build_backbone("timm/test_resnet", "random", "logits")


def test_a_model_of_one_size_is_built_for_the_size_asked_for_and_brings_its_weights_to_it() -> None:
    weights = Weights("test", "", redrawn("test_vit3").state_dict())
    x = torch.randn(2, 3, 96, 128)
    overlay = {"state_dict": weights.state, "custom_load": False}
    with torch.random.fork_rng(devices=[]):
        timms = timm.create_model(
            "test_vit3", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(96, 128)
        ).eval()
    with torch.no_grad():
        got = build_backbone("timm/test_vit3", weights, image_size=(96, 128))(x)
    assert torch.allclose(got, features_of(timms, x), atol=1e-6)
    assert output_shape("timm/test_vit3", "pooled", (96, 128), weights) == (96,)
    preprocess = preprocess_for("timm/test_vit3", "random").with_size((96, 128))
    pixels = torch.zeros(1, 96, 128, 3, dtype=torch.uint8)
    assert build_network(Network(backbone="timm/test_vit3", preprocess=preprocess), weights)(pixels).shape == (1, 96)


@pytest.mark.parametrize(("name", "size"), [("test_vit3", (8, 8)), ("swin_tiny_patch4_window7_224", (3, 3))])
def test_a_size_that_an_architecture_does_not_take_is_refused(name: str, size: tuple[int, int]) -> None:
    with pytest.raises(BackboneError, match=f"timm/{name} does not take images of {size[0]}x{size[1]}; its weights"):
        output_shape(f"timm/{name}", "pooled", size)


def test_weights_that_do_not_fit_are_refused_and_the_classifier_is_not_asked_for(tmp_path: Path) -> None:
    model = redrawn("test_convnext")
    state = model.state_dict()
    headless = {key: value for key, value in state.items() if not key.startswith("head.fc")}
    x = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        got = build_backbone("timm/test_convnext", Weights("file", "", headless))(x)
    assert torch.allclose(got, features_of(model, x), atol=1e-6)
    key = "stages.1.blocks.0.conv_dw.weight"
    for changed, message in [
        ({one: value for one, value in state.items() if one != key}, f"1 missing: {key}"),
        (state | {"extra.weight": torch.zeros(1)}, "1 unexpected: extra.weight"),
        (state | {key: torch.zeros(5)}, f"1 of another shape: {key} 5 instead of"),
    ]:
        path = tmp_path / "changed.pth"
        torch.save(changed, path)
        with pytest.raises(WeightsError, match=f"weights changed.pth do not fit timm/test_convnext: {message}"):
            load_weights("timm/test_convnext", str(path))


@pytest.mark.parametrize(
    "name",
    [
        "efficientvit_m0",
        "test_efficientnet_evos",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("iformer_t", "caformer_s18")),
    ],
)
def test_a_classifier_of_many_layers_is_dropped(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert output_shape(f"timm/{name}", "pooled", (224, 224), Weights("file", "", state))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("timm/convnxt_tiny", "timm/convnext_tiny"),
        ("timm/ViT_Base_Patch16_224", "timm/vit_base_patch16_224"),
        ("timm/vit_base_patch16_224_in21k", "are timm/vit_base_patch16_224.augreg_in21k;"),
        ("timm/???", "no known one is near"),
        ("timm/", "no known one is near"),
        ("timm/timm/resnet18", "timm/resnet18"),
    ],
)
def test_an_unknown_name_lists_a_few_near_ones(name: str, near: str) -> None:
    with pytest.raises(BackboneError, match="unknown backbone") as caught:
        find(name)
    assert repr(name) in str(caught.value)
    assert near in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_tag_stands_in_the_name_or_is_the_weights() -> None:
    tagged = "timm/vit_base_patch16_224.augreg_in21k"
    assert find(tagged) == tagged
    assert preprocess_for(tagged, "DEFAULT") == preprocess_for("timm/vit_base_patch16_224", "augreg_in21k")
    assert preprocess_for(tagged, "augreg_in21k").mean == (0.5, 0.5, 0.5)
    assert preprocess_for("timm/vit_base_patch16_224.mae", "random").mean == (0.485, 0.456, 0.406)
    assert preprocess_for("timm/vit_base_patch16_224", "file.pth", "mae").mean == (0.485, 0.456, 0.406)
    for name, weights in [("timm/resnet18.nope", "DEFAULT"), ("timm/resnet18", "nope")]:
        with pytest.raises(
            WeightsError, match=r"weights of timm/resnet18 must be one of DEFAULT, a1_in1k.* got 'nope'"
        ):
            preprocess_for(name, weights)
    with pytest.raises(WeightsError, match="says in its name which weights: these must be DEFAULT, got 'mae'"):
        preprocess_for(tagged, "mae")
    with pytest.raises(WeightsError, match="bring their own preprocessing"):
        preprocess_for("timm/vit_base_patch16_224", "augreg_in21k", "mae")


def test_weights_that_timm_does_not_have_are_told() -> None:
    with pytest.raises(WeightsError, match="timm has no weights of timm/test_mambaout to download"):
        load_weights("timm/test_mambaout", "DEFAULT")


def test_without_timm_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "shard_embedder.pipeline.backbones.timm_models")
    monkeypatch.delattr(backbones, "timm_models")
    assert library_of("resnet18").find("resnet18") == "resnet18"
    for call in (library_of, build_backbone, lambda name: load_weights(name, "random")):
        with pytest.raises(BackboneError, match=r"'timm/test_vit' needs timm.*pip install timm"):
            call("timm/test_vit")


def test_versions_name_timm() -> None:
    assert versions() == {"torch": torch.__version__, "timm": timm.__version__}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("timm/test_vit3.r160_in1k", "64"),
        pytest.param("timm/eva02_tiny_patch14_336.mim_in22k_ft_in1k", "56", marks=pytest.mark.slow),
    ],
)
def test_an_output_is_verified_recomputed_and_searched_as_any_other(backbone: str, size: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=4)
    path = saved(redrawn(backbone.removeprefix("timm/").partition(".")[0]), tmp_path)
    output = str(tmp_path / "out")
    embed(shards, output, backbone=backbone, weights=path, image_size=size)
    made = read_fingerprint(output)
    assert made is not None
    assert made.settings.backbone == backbone
    assert made.settings.weights_sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert made.versions["timm"] == timm.__version__
    verdict = verify(output, [str(shards)], Recompute(None, weights=path, required=True))
    assert not verdict.findings
    assert verdict.recomputed == 8
    image = tmp_path / "query.jpg"
    image.write_bytes(encode(photo(3)))
    (query,) = QueryEmbedder(made, path, device="cpu")([image])
    stored = {row["image_id"]: row["embedding"] for row in pq.read_table(f"{output}/embeddings").to_pylist()}
    assert np.allclose(stored["000-0003"], query.embedding, rtol=1e-4, atol=1e-5)
