"""The engine and the precision that a job takes are ones that keep the promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.models import squeezenet1_1

from pipeline.core.config import parse
from pipeline.core.errors import PrecisionError, WeightsError
from pipeline.planning.cache import Cache
from pipeline.planning.cpu import cpu_has_bf16
from pipeline.planning.engine import Engine, _spread, choose_engine, foreseen_engine
from pipeline.planning.job import Job, prepare
from pipeline.shards.find import Pending
from tests.conftest import sample_members, write_shards, write_tar


def job_for(input: Path, cache: Cache | None = None, **settings: Any) -> Job:
    return prepare(parse({"input": [str(input)], "output": str(input / "out"), **settings}), cache)


def chosen(job: Job, candidates: tuple[str, ...], device: str = "cpu", **changes: Any) -> Engine:
    pending = [Pending(*shard)._replace(**changes) for shard in job.shards]
    return choose_engine(job, pending, device, candidates)


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
    engine = chosen(job, ("bf16", "fp16"))
    assert engine.precision == "fp32"
    assert engine.note is not None
    assert engine.note.startswith("no image could be decoded at the front of 1 of the shards")
    assert chosen(job, ()).note is None


def test_a_first_shard_without_an_image_says_nothing_of_the_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    write_tar(tmp_path / "b.tar", [("a.jpg", b"no image")])
    write_tar(tmp_path / "c.tar", sample_members("a", 1))
    engine = chosen(job_for(tmp_path, backbone="resnet18", weights="random:1", image_size="64"), ("bf16",))
    assert (engine.precision, engine.note) == ("bf16", None)


def test_images_are_of_shards_all_over_the_input(tmp_path: Path) -> None:
    shards = [Pending(str(number), "", 0, "") for number in range(1000)]
    names = [int(shard.name) for shard in _spread(shards, 8)]
    assert names == [0, 142, 285, 428, 570, 713, 856, 999]
    assert _spread(shards[:8], 8) == shards[:8]


def test_stored_parts_do_not_hide_the_images_to_measure_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", sample_members("a", 1))
    job = job_for(tmp_path, backbone="resnet18", weights="random:1", image_size="64")
    assert chosen(job, ("bf16",), stored_parts=(0,)).precision == "bf16"


def test_trained_weights_that_bf16_moves_too_far_take_the_next_precision(test_data: Path, tmp_path: Path) -> None:
    (weights,) = (test_data / "weights").glob("mobilenet_v2-*.pth")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "s.tar").symlink_to(test_data / "data" / "grocery" / "grocery-val-000000.tar")
    job = job_for(tmp_path / "in", backbone="mobilenet_v2", weights=str(weights))
    assert chosen(job, ("bf16", "fp16"), device="cuda").precision == "fp16"
    assert chosen(job, ("bf16",), device="cuda").precision == "fp32"
    assert chosen(job, ("bf16",)).precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_values_that_overflow_the_precision_do_not_pass(tmp_path: Path, precision: str) -> None:
    factor = 1e6 if precision == "fp16" else 1e38
    job = scaled_job(tmp_path, {"features.0.weight": factor})
    assert chosen(job, (precision,)).precision == "fp32"
    assert chosen(job, (precision,), device="cuda").precision == "fp32"


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_precision_that_openvino_does_not_have_on_this_processor_is_computed_by_torch(
    tmp_path: Path, is_kept: bool
) -> None:
    runner = pytest.importorskip(
        "pipeline.embedding.openvino_runner", reason="OpenVINO has no wheel for this machine"
    )
    shards, cache = write_shards(tmp_path / "in", num_shards=1), Cache(tmp_path / "cache")
    settings = {"backbone": "resnet18", "weights": "random:1", "image_size": "64"}
    if is_kept:
        chosen(job_for(shards, cache, **settings), ())
    job = job_for(shards, cache, precision="fp16", **settings)
    assert (job.kept is not None and job.kept.entry is not None) == is_kept
    engine = chosen(job, ("bf16",))
    assert engine.precision == "fp16"
    assert runner.computes("fp32")
    if runner.computes("fp16"):
        assert engine.name.startswith("openvino ")
        return
    assert engine.name == f"torch {torch.__version__}"
    assert engine.note == "OpenVINO computes no fp16 on this processor"
    graph = chosen(job_for(shards, cache, **settings), ()).source
    loading = {
        "backbone": "resnet18", "features": "pooled", "preprocess": job.preprocess, "normalize": False,
        "device": "cpu", "batch_size": None, "num_threads": 1,
    }  # fmt: skip
    with pytest.raises(PrecisionError, match=r"precision must be one that the processor of \S+ has, got fp16"):
        graph.runner(precision="fp16", **loading)


def test_a_graph_that_gives_other_vectors_is_not_taken(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    same = {"features.0.weight": 1.0}
    assert chosen(scaled_job(tmp_path / "same", same), ("bf16",)).name.startswith("openvino ")
    # Values too small for a normal float32 in between, which OpenVINO takes for zero and torch does not.
    small = {"features.0.weight": 1e-39, "features.0.bias": 1e-39, "features.3.squeeze.weight": 1e39}
    engine = chosen(scaled_job(tmp_path / "small", small), ("bf16",))
    assert engine.name == f"torch {torch.__version__}"
    assert engine.note == "OpenVINO is 1 of the length from eager torch for squeezenet1_1"


def test_a_kept_graph_is_the_one_that_was_made_and_decides_alike(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    shards, cache = write_shards(tmp_path / "in", num_shards=1), Cache(tmp_path / "cache")
    settings = {"backbone": "resnet_18", "weights": "random:1", "image_size": "64"}
    cold = job_for(shards, cache, **settings)
    made = chosen(cold, ("bf16",))
    assert len(list(cache.folder.iterdir())) == 2  # the graph, and which precision was taken
    warm = job_for(shards, cache, **settings)
    assert warm.kept != cold.kept
    assert replace(warm, kept=None, run="") == replace(cold, kept=None, run="")
    kept = chosen(warm, ("bf16",))
    assert (kept.name, kept.precision, kept.source.graph) == (made.name, made.precision, made.source.graph)
    assert np.array_equal(kept.source.constants, made.source.constants)
    pending = [Pending(*warm.shards[0])]
    with foreseen_engine(warm, pending) as choose:
        foreseen = choose(warm, pending, "cpu", ("bf16",) if cpu_has_bf16() else ())
        assert foreseen.source.graph == made.source.graph
        on_gpu = choose(warm, pending, "cuda", ())
        assert on_gpu.name == f"torch {torch.__version__}"


def test_a_precision_is_remembered_for_the_same_images_and_candidates_alone(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    cache, settings = Cache(tmp_path / "cache"), {"backbone": "resnet18", "weights": "random:1", "image_size": "64"}
    shards, others = write_shards(tmp_path / "in", num_shards=1), tmp_path / "others"
    write_tar(others / "s.tar", sample_members("other", 3))
    assert chosen(job_for(shards, cache, **settings), ("bf16",)).precision == "bf16"
    entry = min(cache.folder.iterdir(), key=lambda path: path.stat().st_size)
    # An answer that no trial gives here: where it comes back it was remembered.
    cache.keep(entry.stem, {"precision": "fp32"}, {})
    assert chosen(job_for(shards, cache, **settings), ("bf16",)).precision == "fp32"
    assert chosen(job_for(shards, cache, **settings), ("bf16", "fp16")).precision == "bf16"
    assert chosen(job_for(others, cache, **settings), ("bf16",)).precision == "bf16"
    assert chosen(job_for(shards, cache, **{**settings, "weights": "random:2"}), ("bf16",)).precision == "bf16"
    assert chosen(job_for(shards, cache, precision="bf16", **settings), ("bf16",)).precision == "bf16"
    cache.keep(entry.stem, {"precision": "int8"}, {})
    assert chosen(job_for(shards, cache, **settings), ("bf16",)).precision == "bf16"


def test_a_graph_that_is_damaged_after_the_job_was_prepared_is_made_anew(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    cache, weights = Cache(tmp_path / "cache"), tmp_path / "same" / "scaled.pth"
    made = chosen(scaled_job(tmp_path / "same", {"features.0.weight": 1.0}, cache), ())
    warm = scaled_job(tmp_path / "same", {"features.0.weight": 1.0}, cache)
    assert not warm.weights.is_loaded
    # On a GPU it is the weights that are needed: they are loaded now.
    assert chosen(warm, (), device="cuda").source.get().state is not None
    (entry,) = cache.folder.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    anew = chosen(warm, ())
    # Names of nodes are numbered on in a process; what they compute with is the same.
    assert anew.name == made.name
    assert np.array_equal(anew.source.constants, made.source.constants)
    entry.unlink()
    torch.save({**torch.load(weights), "features.0.bias": torch.ones(64)}, weights)
    with pytest.raises(
        WeightsError, match=r"scaled.pth changed while the run began: their sha256 was \w{12}, and is"
    ):
        chosen(warm, ())


def test_a_graph_that_was_tried_on_noise_is_not_kept(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", b"no image")])
    cache = Cache(tmp_path / "cache")
    chosen(job_for(tmp_path / "in", cache, backbone="resnet18", weights="random:1", image_size="64"), ())
    assert not cache.folder.exists()


def test_a_graph_that_gives_other_vectors_is_not_kept(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    small = {"features.0.weight": 1e-39, "features.0.bias": 1e-39, "features.3.squeeze.weight": 1e39}
    assert chosen(scaled_job(tmp_path / "small", small, cache), ()).name == f"torch {torch.__version__}"
    assert not cache.folder.exists()


def scaled_job(folder: Path, factors: dict[str, float], cache: Cache | None = None) -> Job:
    """A job of a small backbone, some of whose weights are multiplied."""
    shards = write_shards(folder / "in", num_shards=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = squeezenet1_1(weights=None).state_dict()
    for name, factor in factors.items():
        state[name] = (state[name].double() * factor).float()
    torch.save(state, folder / "scaled.pth")
    return job_for(shards, cache, backbone="squeezenet1_1", weights=str(folder / "scaled.pth"), image_size="64")
