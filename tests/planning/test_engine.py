"""The engine and the precision that a job takes are ones that keep the promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import squeezenet1_1

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import PrecisionError
from shard_embedder.pipeline.embedding.network import Placement
from shard_embedder.pipeline.planning.cpu import cpu_has_bf16
from shard_embedder.pipeline.planning.engine import Engine, _spread, choose_engine, choose_meanwhile
from shard_embedder.pipeline.planning.job import Job, prepare_job
from shard_embedder.pipeline.shards.find import Pending
from tests.conftest import sample_members, write_shards, write_tar
from tests.processor import openvino_computes


def job_for(input: Path, **settings: Any) -> Job:
    return prepare_job(parse({"input": [str(input)], "output": str(input / "out"), **settings}))


def chosen(job: Job, candidates: tuple[str, ...], by_torch: bool = False, **changes: Any) -> Engine:
    """The choice on this machine, or on one without OpenVINO."""
    pending = [Pending(*shard)._replace(**changes) for shard in job.shards]
    return choose_engine(job, pending, "cpu", candidates, "asked for torch" if by_torch else None)


def tried(job: Job, precision: str, **changes: Any) -> Engine:
    """The choice after a trial of `precision`, by OpenVINO if it supports that on this processor, else by torch."""
    return chosen(job, (precision,), by_torch=not openvino_computes(precision), **changes)


@pytest.mark.slow
def test_a_backbone_that_bf16_hardly_moves_takes_it(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=1)
    job = job_for(shards, backbone="squeezenet1_1", weights="random:1", image_size="64")
    assert tried(job, "bf16").precision == "bf16"


def test_a_device_without_a_fast_reduced_precision_takes_fp32(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, num_shards=1)
    job = job_for(shards, backbone="squeezenet1_1", weights="random:1", image_size="64")
    assert chosen(job, ()).precision == "fp32"


@pytest.mark.slow
def test_a_shard_without_an_image_that_decodes_takes_fp32(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", [("a.jpg", b"no image"), ("b.txt", b"text")])
    job = job_for(tmp_path, backbone="squeezenet1_1", weights="random:1", image_size="64")
    engine = chosen(job, ("bf16", "fp16"))
    assert engine.precision == "fp32"
    assert engine.note is not None
    assert engine.note.startswith("no image could be decoded at the front of 1 of the shards")
    assert chosen(job, ()).note is None


def test_a_first_shard_without_an_image_says_nothing_of_the_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("a.jpg", b"no image")])
    write_tar(tmp_path / "c.tar", sample_members("a", 1))
    engine = tried(job_for(tmp_path, backbone="squeezenet1_1", weights="random:1", image_size="64"), "bf16")
    note = None if openvino_computes("bf16") else "asked for torch"
    assert (engine.precision, engine.note) == ("bf16", note)


def test_images_are_of_shards_all_over_the_input(tmp_path: Path) -> None:
    shards = [Pending(str(number), "", 0, "") for number in range(1000)]
    names = [int(shard.name) for shard in _spread(shards, 8)]
    assert names == [0, 142, 285, 428, 570, 713, 856, 999]
    assert _spread(shards[:8], 8) == shards[:8]


def test_stored_parts_do_not_hide_the_images_to_measure_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", sample_members("a", 1))
    job = job_for(tmp_path, backbone="squeezenet1_1", weights="random:1", image_size="64")
    assert tried(job, "bf16", stored_parts=(0,)).precision == "bf16"


@pytest.mark.slow
def test_trained_weights_that_bf16_moves_too_far_take_the_next_precision(test_data: Path, tmp_path: Path) -> None:
    (weights,) = (test_data / "weights").glob("mobilenet_v2-*.pth")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").symlink_to(test_data / "data" / "grocery" / "grocery-val-000000.tar")
    job = job_for(tmp_path / "in", backbone="mobilenet_v2", weights=str(weights), image_size="128")
    assert chosen(job, ("bf16", "fp16"), by_torch=True).precision == "fp16"
    assert chosen(job, ("bf16",), by_torch=True).precision == "fp32"
    assert chosen(job, ("bf16",)).precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_values_that_overflow_the_precision_do_not_pass(tmp_path: Path, precision: str) -> None:
    factor = 1e6 if precision == "fp16" else 1e38
    job = scaled_job(tmp_path, {"features.0.weight": factor})
    assert chosen(job, (precision,)).precision == "fp32"
    assert chosen(job, (precision,), by_torch=True).precision == "fp32"


def test_a_precision_that_openvino_does_not_have_on_this_processor_is_computed_by_torch(tmp_path: Path) -> None:
    assert openvino_computes("fp32")
    shards = write_shards(tmp_path / "in", num_shards=1)
    settings = {"backbone": "squeezenet1_1", "weights": "random:1", "image_size": "64"}
    job = job_for(shards, precision="fp16", **settings)
    engine = chosen(job, ("bf16",))
    assert engine.precision == "fp16"
    if openvino_computes("fp16"):
        assert engine.name.startswith("openvino ")
        return
    assert engine.name == f"torch {torch.__version__}"
    assert engine.note == "OpenVINO computes no fp16 on this processor"
    graph = chosen(job_for(shards, **settings), ()).source
    with pytest.raises(PrecisionError, match=r"precision must be one that the processor of \S+ has, got fp16"):
        graph.runner(job.network, Placement(precision="fp16", num_threads=1))


@pytest.mark.slow
def test_a_graph_that_gives_other_vectors_is_not_taken(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    same = {"features.0.weight": 1.0}
    assert chosen(scaled_job(tmp_path / "same", same), ("bf16",)).name.startswith("openvino ")
    # Values too small for a normal float32 in between, which OpenVINO takes for zero and torch does not.
    small = {"features.0.weight": 1e-39, "features.0.bias": 1e-39, "features.3.squeeze.weight": 1e39}
    engine = chosen(scaled_job(tmp_path / "small", small), ("bf16",))
    assert engine.name == f"torch {torch.__version__}"
    assert engine.note == "OpenVINO is 1 of the length from eager torch for squeezenet1_1"


@pytest.mark.slow
def test_an_engine_that_was_begun_meanwhile_is_the_one_that_is_chosen_when_asked(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    shards = write_shards(tmp_path / "in", num_shards=1)
    job = job_for(shards, backbone="resnet_18", weights="random:1", image_size="64", device="cpu")
    pending = [Pending(*job.shards[0])]
    candidates = ("bf16",) if cpu_has_bf16() else ()
    with choose_meanwhile(job, pending) as choose:
        foreseen = choose(job, pending, "cpu", candidates, None)
        assert foreseen is choose(job, pending, "cpu", candidates, None)
        made = choose_engine(job, pending, "cpu", candidates)
        assert (foreseen.name, foreseen.precision) == (made.name, made.precision)
        assert np.array_equal(foreseen.source.constants, made.source.constants)
        on_gpu = choose(job, pending, "cuda", None, None)
        assert (on_gpu.name, on_gpu.precision) == (f"torch {torch.__version__}", "auto")


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
