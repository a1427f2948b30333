"""The engine and the precision that a job takes are ones that keep the promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sample_members, write_shards, write_tar
from torchvision.models import squeezenet1_1

from pipeline.config import parse
from pipeline.engine import Engine, choose_engine
from pipeline.prepare import Job, prepare
from pipeline.samples import Pending


def job_for(input: Path, **settings: Any) -> Job:
    return prepare(parse({"input": [str(input)], "output": str(input / "out"), **settings}))


def chosen(job: Job, candidates: tuple[str, ...], device: str = "cpu", **changes: Any) -> Engine:
    return choose_engine(job, Pending(*job.shards[0])._replace(**changes), device, candidates)


def test_a_backbone_that_bf16_hardly_moves_takes_it(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=1)
    job = job_for(shards, backbone="resnet18", weights="random:1", image_size="64")
    assert chosen(job, ("bf16",)).precision == "bf16"


def test_a_device_without_a_fast_reduced_precision_takes_fp32(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=1)
    job = job_for(shards, backbone="resnet18", weights="random:1", image_size="64")
    assert chosen(job, ()).precision == "fp32"


def test_a_shard_without_an_image_that_decodes_takes_fp32(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.jpg", b"no image"), ("b.txt", b"text")])
    job = job_for(tmp_path, backbone="resnet18", weights="random:1", image_size="64")
    assert chosen(job, ("bf16", "fp16")).precision == "fp32"


def test_stored_parts_do_not_hide_the_images_to_measure_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", sample_members("a", 1))
    job = job_for(tmp_path, backbone="resnet18", weights="random:1", image_size="64")
    assert chosen(job, ("bf16",), stored_parts=(0,)).precision == "bf16"


def test_trained_weights_that_bf16_moves_too_far_take_the_next_precision(test_data: Path, tmp_path: Path) -> None:
    (weights,) = (test_data / "weights").glob("mobilenet_v2-*.pth")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").symlink_to(test_data / "data" / "grocery" / "grocery-val-000000.tar")
    job = job_for(tmp_path / "in", backbone="mobilenet_v2", weights=str(weights))
    assert chosen(job, ("bf16", "fp16")).precision == "fp16"
    assert chosen(job, ("bf16",)).precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_values_that_overflow_the_precision_do_not_pass(tmp_path: Path, precision: str) -> None:
    factor = 1e6 if precision == "fp16" else 1e38
    job = scaled_job(tmp_path, {"features.0.weight": factor})
    assert chosen(job, (precision,)).precision == "fp32"


def test_a_graph_that_gives_other_vectors_is_not_taken(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    same = {"features.0.weight": 1.0}
    assert chosen(scaled_job(tmp_path / "same", same), ("bf16",)).name.startswith("openvino ")
    # Values too small for a normal float32 in between, which OpenVINO takes for zero and torch does not.
    small = {"features.0.weight": 1e-39, "features.0.bias": 1e-39, "features.3.squeeze.weight": 1e39}
    engine = chosen(scaled_job(tmp_path / "small", small), ("bf16",))
    assert engine.name == f"torch {torch.__version__}"
    assert engine.note == "OpenVINO is 1 of the length from eager torch for squeezenet1_1"


def scaled_job(folder: Path, factors: dict[str, float]) -> Job:
    """A job of a small backbone, some of whose weights are multiplied."""
    shards = write_shards(folder / "in", num_shards=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = squeezenet1_1(weights=None).state_dict()
    for name, factor in factors.items():
        state[name] = (state[name].double() * factor).float()
    torch.save(state, folder / "scaled.pth")
    return job_for(shards, backbone="squeezenet1_1", weights=str(folder / "scaled.pth"), image_size="64")
