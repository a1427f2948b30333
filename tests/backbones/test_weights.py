"""Weights by name, path and URL: what fits loads, what does not says why, and nothing is executed."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as save_safetensors
from torch import nn
from torchvision import models

from shard_embedder.pipeline.backbones import build_backbone, load_weights
from shard_embedder.pipeline.backbones.weights import state_sha256
from shard_embedder.pipeline.core.errors import SettingsError, WeightsError
from shard_embedder.pipeline.core.storage import locate
from tests.backbones.weights_files import NAME, Touch, assert_loads, filled_state, saved, torchvision_state, write
from tests.conftest import ROOT


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".PTH"])
def test_a_file_of_torch_loads(tmp_path: Path, suffix: str) -> None:
    state = torchvision_state()
    assert_loads(NAME, write(tmp_path / f"w{suffix}", state), state)


def test_a_safetensors_file_loads(tmp_path: Path) -> None:
    state = torchvision_state()
    assert_loads(NAME, write(tmp_path / "w.safetensors", save_safetensors(state)), state)


def test_a_file_in_torchs_old_format_loads(tmp_path: Path) -> None:
    state = torchvision_state()
    old = saved(state, _use_new_zipfile_serialization=False)
    assert_loads(NAME, write(tmp_path / "w.pth", old), state)


def test_a_path_relative_to_the_working_directory_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "w.pth", torchvision_state())
    assert load_weights(NAME, "w.pth").name == load_weights(NAME, "./w.pth").name == "w.pth"


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_load_from_s3(s3_url: str, name: str) -> None:
    state = torchvision_state()
    data = saved(state) if name.endswith("pth") else save_safetensors(state)
    fs, path = locate(f"{s3_url}/{name}")
    fs.pipe_file(path, data)
    weights = load_weights(NAME, f"{s3_url}/{name}")
    assert weights.name == name
    assert weights.sha256 == hashlib.sha256(data).hexdigest()
    assert_loads(NAME, f"{s3_url}/{name}", state)


def test_a_missing_object_on_s3_is_not_found(s3_url: str) -> None:
    with pytest.raises(WeightsError, match=r"w\.pth not found"):
        load_weights(NAME, f"{s3_url}/w.pth")


def test_the_sha256_of_a_file_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", torchvision_state())
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert load_weights(NAME, path).sha256 == printed.split()[0]


def test_a_file_without_its_classifier_is_fine(tmp_path: Path) -> None:
    state = torchvision_state()
    features = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    assert len(features) < len(state)
    assert_loads(NAME, write(tmp_path / "w.pth", features), state)


def test_a_file_with_a_classifier_of_other_classes_is_fine(tmp_path: Path) -> None:
    state = torchvision_state(num_classes=7)
    assert_loads(NAME, write(tmp_path / "w.pth", state), state)


def test_a_file_without_half_the_backbone_names_the_missing_keys(tmp_path: Path) -> None:
    state = torchvision_state()
    keys = [key for key in state if key.startswith("features.")]
    half = {key: state[key] for key in keys[: len(keys) // 2]}
    path = write(tmp_path / "w.pth", half)
    with pytest.raises(WeightsError) as caught:
        load_weights(NAME, path)
    text = str(caught.value)
    assert f"weights w.pth do not fit {NAME}: {len(keys) - len(keys) // 2} missing: {keys[len(keys) // 2]}" in text
    assert "unexpected" not in text


def test_unexpected_keys_and_other_shapes_are_named(tmp_path: Path) -> None:
    state = torchvision_state()
    state["features.99.weight"] = torch.zeros(3)
    state["features.0.bias"] = torch.zeros(5)
    state["features.0.weight"] = state["features.0.weight"].to(torch.int8)
    with pytest.raises(WeightsError) as caught:
        load_weights(NAME, write(tmp_path / "w.pth", state))
    assert "1 unexpected: features.99.weight" in str(caught.value)
    assert "1 of another shape: features.0.bias 5 instead of 64" in str(caught.value)
    assert "1 of another type: features.0.weight torch.int8" in str(caught.value)
    assert "missing" not in str(caught.value)


def test_weights_of_another_backbone_do_not_fit_and_the_message_stays_short(tmp_path: Path) -> None:
    path = write(tmp_path / "w.pth", torchvision_state("mobilenet_v2"))
    with pytest.raises(WeightsError, match=r"missing: .* and \d+ more; \d+ unexpected") as caught:
        load_weights("resnet18", path)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_a_training_checkpoint_loads(tmp_path: Path, wrapper: str) -> None:
    state = torchvision_state()
    checkpoint = {wrapper: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    assert_loads(NAME, write(tmp_path / "w.pth", checkpoint), state)


def test_the_state_dict_of_a_data_parallel_model_loads(tmp_path: Path) -> None:
    model = models.get_model(NAME, weights=None)
    path = write(tmp_path / "w.pth", {"state_dict": nn.DataParallel(model).state_dict()})
    assert_loads(NAME, path, model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    state = torchvision_state()
    stored = {key: value.to(dtype) for key, value in state.items()}
    path = write(tmp_path / "w.pth", stored)
    assert_loads(NAME, path, {key: value.to(torch.float32) for key, value in stored.items()})


@pytest.mark.slow
def test_a_densenet_file_with_the_old_key_names_of_torchvisions_downloads_loads(tmp_path: Path) -> None:
    state = filled_state("densenet121")
    old = {
        re.sub(r"(denselayer\d+)\.(norm|conv)([12])\.", r"\1.\2.\3.", key): value
        for key, value in state.items()
        if not key.endswith("num_batches_tracked")
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    path = write(tmp_path / "w.pth", old)
    assert_loads("densenet121", path, state)


@pytest.mark.parametrize("name", ["mnasnet0_5", "mnasnet1_0"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_an_mnasnet_file_loads_with_and_without_its_version(tmp_path: Path, name: str, suffix: str) -> None:
    state = {key: value.contiguous() for key, value in filled_state(name).items()}
    path = tmp_path / f"w.{suffix}"
    assert_loads(name, write(path, state if suffix == "pth" else save_safetensors(state)), state)


@pytest.mark.parametrize("name", ["googlenet", pytest.param("inception_v3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("auxiliary", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_auxiliary_classifiers_in_a_file_do_not_matter(tmp_path: Path, name: str, auxiliary: bool) -> None:
    state = filled_state(name, aux_logits=auxiliary)
    assert any(key.lower().startswith("aux") for key in state) == auxiliary
    assert_loads(name, write(tmp_path / "w.pth", state), state)


@pytest.mark.parametrize(
    "name",
    [
        "regnet_y_400mf",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("swin_t", "vit_b_32", "maxvit_t", "convnext_tiny")),
    ],
)
def test_files_of_every_kind_of_architecture_load(tmp_path: Path, name: str) -> None:
    state = filled_state(name)
    assert_loads(name, write(tmp_path / "w.pth", state), state)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    evil = {**torchvision_state(), "extra": Touch(canary)}
    contents = [saved(evil), saved(evil, _use_new_zipfile_serialization=False), pickle.dumps(evil)]
    for content in contents:
        with pytest.raises(WeightsError, match="not a state dict that loads without code"):
            load_weights(NAME, write(tmp_path / "w.pth", content))
    assert not canary.exists()
    # It is a real one: plain unpickling runs it.
    pickle.loads(contents[2])
    assert canary.exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nn.Linear(2, 2), "it asks for torch.nn.modules.linear.Linear"),
        ({"model": {}, "args": argparse.Namespace(lr=1)}, "it asks for argparse.Namespace"),
        ([torch.zeros(1)], "must be a state dict of tensors, got list"),
        ({"a": torch.zeros(1), "b": 3}, "must be a state dict of tensors, got int as 'b'"),
        ({"a": torch.zeros(1, device="meta")}, "must hold dense tensors, got one without values as 'a'"),
        ({"a": torch.eye(2).to_sparse()}, "must hold dense tensors, got torch.sparse_coo as 'a'"),
        (b"", "EOFError"),
        (b"<html>not found</html>", "not a state dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
def test_what_is_no_state_dict_says_what_it_is(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load_weights(NAME, write(tmp_path / "w.pth", content))
    assert reason in str(caught.value)
    # torch's advice to load it all the same is not passed on.
    assert "add_safe_globals" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def damaged(data: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        damage = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damage[rng.randrange(len(damage))] = rng.randrange(256)
        yield bytes(damage[: rng.randrange(len(damage))] if rng.random() < 0.2 else damage)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_damaged_file_is_refused_or_loads_but_never_anything_else(tmp_path: Path) -> None:
    content = {"features.0.weight": torch.zeros(2)}
    files = {
        "new.pth": saved(content),
        "old.pth": saved(content, _use_new_zipfile_serialization=False),
        "w.safetensors": save_safetensors(content),
    }
    refused = 0
    for name, data in files.items():
        for damage in damaged(data, 200):
            with pytest.raises(WeightsError):  # what loads does not fit
                load_weights(NAME, write(tmp_path / name, damage))
            refused += 1
    assert refused == 600


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"weights .*/nowhere.pth not found"):
        load_weights(NAME, str(tmp_path / "nowhere.pth"))


def test_a_folder_is_not_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_weights(NAME, str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_credentials_in_a_url_are_shown_nowhere() -> None:
    with pytest.raises(SettingsError, match="must not carry credentials") as caught:
        load_weights(NAME, "s3://AKIAKEY:hunter2@bucket/w.pth")
    assert "hunter2" not in str(caught.value)


def test_a_presigned_url_is_refused_and_its_signature_not_shown() -> None:
    with pytest.raises(SettingsError, match="must not carry credentials") as caught:
        load_weights(NAME, "https://host.invalid/w.safetensors?X-Signature=hunter2")
    assert "hunter2" not in str(caught.value)


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(WeightsError) as caught:
        load_weights("resnet50", "IMAGENET1K_V9")
    for text in ("DEFAULT, IMAGENET1K_V1, IMAGENET1K_V2", "random[:SEED]", ".safetensors", "'IMAGENET1K_V9'"):
        assert text in str(caught.value)


def test_the_text_of_weights_does_not_hold_their_values(tmp_path: Path) -> None:
    weights = load_weights(NAME, write(tmp_path / "w.pth", torchvision_state()))
    assert len(repr(weights)) < 200


def test_state_sha256_sees_names_values_types_and_shapes() -> None:
    states = [
        {"a": torch.zeros(4)},
        {"b": torch.zeros(4)},
        {"a": torch.ones(4)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4), "b": torch.zeros(())},
    ]
    assert len({state_sha256(state) for state in states}) == len(states)
    first, second = torch.rand(2, 3), torch.rand(3)
    assert state_sha256({"a": first, "b": second}) == state_sha256({"b": second, "a": first.T.contiguous().T})


@pytest.mark.parametrize(
    ("name", "pattern", "channels"),
    [("mobilenet_v2", "mobilenet_v2-*.pth", 1280), ("squeezenet1_1", "squeezenet1_1-*.pth", 512)],
)
def test_real_weights_of_other_projects_load(test_data: Path, name: str, pattern: str, channels: int) -> None:
    (path,) = (test_data / "weights").glob(pattern)
    backbone = build_backbone(name, str(path))
    state = torch.load(path, weights_only=True)
    assert backbone.num_features == channels
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_header_that_claims_terabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="header too large"):
        load_weights(NAME, write(tmp_path / "w.safetensors", struct.pack("<Q", 2**42) + b"{}"))


def test_whoever_only_names_weights_does_not_wait_for_torch() -> None:
    script = (
        "import sys, shard_embedder.pipeline.backbones, shard_embedder.pipeline.backbones.weights_spec; "
        "print(sorted({'torch', 'torchvision', 'timm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
