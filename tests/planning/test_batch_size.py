"""The batch size: measured where the work will be done, kept by the output, and beaten by whoever names one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from shard_embedder.jobs.support.console import Console
from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import StoredDataError
from shard_embedder.pipeline.embedding.embedder import Source
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, TorchRunner, build_network
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.names import RUN_FILE
from shard_embedder.pipeline.planning import engine
from shard_embedder.pipeline.planning.batch_size import (
    LARGEST,
    SMALLEST,
    best,
    is_flat,
    ladder,
    measure,
    of_part,
)
from shard_embedder.pipeline.planning.engine import Trial
from shard_embedder.pipeline.planning.job import Job, prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.probe import choose_by_trial
from shard_embedder.pipeline.planning.resources import Resources, plan_resources
from shard_embedder.pipeline.planning.stored_source import StoredSource
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from tests.conftest import write_shards

SETTINGS = {"backbone": "squeezenet1_1", "weights": "random:3", "image_size": "32", "precision": "fp32"}
CROP = (32, 32)


def test_the_smallest_of_the_good_ones_is_taken() -> None:
    assert best({16: 100.0, 32: 180.0, 64: 196.0, 128: 200.0}) == 64
    assert best({16: 100.0, 32: 102.0, 64: 90.0}) == 16
    assert best({16: 100.0}) == 16


def test_two_sizes_that_bring_nothing_are_enough() -> None:
    assert not is_flat([100.0])
    assert not is_flat([100.0, 90.0])
    assert is_flat([100.0, 101.0, 102.9])
    assert not is_flat([100.0, 101.0, 104.0])
    assert is_flat([100.0, 200.0, 190.0, 205.0])
    assert not is_flat([100.0, 200.0, 190.0])


@pytest.mark.parametrize(
    ("part_rows", "crop", "device", "largest"),
    [
        (1024, (224, 224), "cuda", LARGEST),
        (100_000, (64, 64), "cuda", LARGEST),
        (1000, (224, 224), "cuda", 1024),
        (100, (224, 224), "cuda", 128),
        (3, (224, 224), "cuda", SMALLEST),
        (1024, (518, 518), "cuda", 256),
        (1024, (224, 224), "cpu", 128),
        (1024, (4096, 4096), "cpu", SMALLEST),
    ],
)
def test_sizes_end_with_the_part_or_the_memory(
    part_rows: int, crop: tuple[int, int], device: str, largest: int
) -> None:
    sizes = ladder(part_rows, crop, device)
    assert sizes == [2**power for power in range(4, largest.bit_length())]


def test_few_sizes_are_tried_where_each_is_compiled() -> None:
    assert ladder(1024, (224, 224), "cuda", compiled=True) == [64, 256, 1024]
    assert ladder(3, (224, 224), "cuda", compiled=True) == [SMALLEST]


def runner(room: int = 10_000) -> tuple[TorchRunner, list[int]]:
    """A real one on the CPU whose memory has room for so many images, and the batches that it was given."""
    preprocess = preprocess_for("squeezenet1_1", "random").with_size(CROP)
    network = build_network(
        Network(backbone="squeezenet1_1", preprocess=preprocess), load_weights("squeezenet1_1", "random:0")
    )
    batches: list[int] = []

    def device_memory(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        batches.append(len(inputs[0]))
        if batches[-1] > room:
            raise torch.OutOfMemoryError(f"no room for {batches[-1]} images")

    network.register_forward_pre_hook(device_memory)
    return TorchRunner(network, CROP, Placement(batch_size=4)), batches


@pytest.mark.usefixtures("one_thread")
def test_what_does_not_fit_into_memory_is_not_taken() -> None:
    tried, batches = runner(room=40)
    rates = measure(tried, [16, 32, 64, 128], 1024, CROP, limit_s=600.0, step_s=0.0)
    assert set(rates) <= {16, 32}
    assert 16 in rates
    assert max(batches) <= 64
    assert measure(runner(room=1)[0], [16, 32], 1024, CROP, limit_s=600.0) == {}


def test_padding_where_a_part_ends_counts() -> None:
    assert of_part(128, 0.5, 128) == 256.0
    assert of_part(128, 0.5, 129) == 129.0
    assert of_part(128, 0.5, 32) == 64.0


def test_nothing_is_begun_for_which_the_time_is_too_short() -> None:
    tried, batches = runner()
    assert measure(tried, [16, 32, 64], 1024, CROP, limit_s=0.0) == {}
    assert batches == [1, 1]


def job_for(folder: Path, **settings: Any) -> Job:
    """A job without OpenVINO in the place of torch."""
    given = {"input": [str(folder / "in")], "output": str(folder / "out"), "part_rows": 32, "device": "cpu"}
    return prepare_job(parse({**given, **SETTINGS, "batch_size": "auto", **settings}))


def chosen(
    job: Job, source: Source | None = None, wait_s: float = 300.0, **changes: Any
) -> tuple[Job, Resources, list[str]]:
    job = job.with_engine("torch", "fp32")
    source = StoredSource.put(SharedWeights.of(job.weights)) if source is None else source
    resources = replace(plan_resources(job.config), **changes)
    return choose_by_trial(job, Trial(job, []), source, resources, None, lambda why: None, wait_s)


def embed(job: Job) -> tuple[dict[str, Any], list[Resources]]:
    """A run, with its report and what was told of its resources."""
    told: list[Resources] = []

    def on_resources(job: Job, resources: Resources) -> None:
        told.append(resources)

    plan = make_plan(job.shards, job.config.output)
    return run(job, plan, Watcher(on_resources, lambda *_: None, lambda tally: None), OnRay()), told


def shown(job: Job, resources: Resources, capsys: pytest.CaptureFixture[str]) -> str:
    """What a person is told of the batches."""
    capsys.readouterr()
    Console().resources(job, resources)
    return capsys.readouterr().out.splitlines()[1]


@pytest.mark.usefixtures("ray_session")
def test_an_output_goes_on_with_the_size_that_was_measured_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # torch computes where OpenVINO has no wheel.
    monkeypatch.setattr(engine, "openvino_runner", None)
    write_shards(tmp_path / "in", num_shards=1, samples_each=5)
    report, (resources,) = embed(job_for(tmp_path))
    assert report["balanced"]
    rates = dict(resources.batch_rates)
    assert set(rates) <= {16, 32}
    assert resources.batch_size == report["batch_size"] == best(rates)
    assert list(report["batch_rates"]) == [str(size) for size in rates]
    assert shown(job_for(tmp_path), resources, capsys).startswith(
        f"batches   of {resources.batch_size} images, by measuring: 16 {rates[16]:.0f}/s"
    )
    run_file = (tmp_path / "out" / RUN_FILE).read_bytes()
    assert json.loads(run_file)["batch_size"] == {"cpu": resources.batch_size}

    part = pq.read_metadata(next((tmp_path / "out" / "embeddings").iterdir())).metadata
    assert json.loads(part[b"embed.batch_size"]) == {"cpu": resources.batch_size}

    # Another size than this machine would find, whatever it finds.
    changed = run_file.replace(f'"cpu": {resources.batch_size}'.encode(), b'"cpu": 24')
    (tmp_path / "out" / RUN_FILE).write_bytes(changed)
    job, resources, notes = chosen(job_for(tmp_path))
    assert (resources.batch_size, resources.batch_rates, notes) == (24, (), [])
    assert job.fingerprint.batch_size == {"cpu": 24}
    assert shown(job, resources, capsys) == "batches   of 24 images, as the output was begun"

    # Who names a size has it, and the output's fingerprint is the same.
    job, resources, _ = chosen(job_for(tmp_path, batch_size=7))
    assert (resources.batch_size, job.fingerprint.batch_size) == (7, {"cpu": 7})
    made = read_fingerprint(str(tmp_path / "out"))
    assert made is not None
    assert job.fingerprint.digest == made.digest
    # And who asks for none has the device's own.
    job, resources, _ = chosen(job_for(tmp_path, batch_size=None))
    assert (resources.batch_size, job.fingerprint.batch_size) == (None, {})

    (tmp_path / "out" / RUN_FILE).write_bytes(changed.replace(b'"cpu": 24', b'"cpu": "many"'))
    with pytest.raises(
        StoredDataError, match=r"run\.json cannot be used: .*batch_size must be whole numbers of at least 1"
    ):
        chosen(job_for(tmp_path))
    (tmp_path / "out" / RUN_FILE).write_bytes(changed.replace(b'"cpu": 24', b'"other": 24'))
    # Begun without one, by an older version or without `auto`: nothing is measured for half of an output.
    _, resources, notes = chosen(job_for(tmp_path))
    assert (resources.batch_size, resources.batch_rates, notes) == (None, (), [])


@pytest.mark.usefixtures("ray_session")
def test_a_size_that_cannot_be_measured_holds_nobody_up(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    after, without, notes = chosen(job_for(tmp_path), wait_s=1.0, actor_resource="no-such-node")
    assert notes == ["the batch size was not measured: no answer within 1 s"]
    assert (without.batch_size, without.batch_rates) == (None, ())
    assert after.fingerprint.batch_size == {}
    # A backbone that does not load will not in an actor either, which then tells more.
    broken = SharedWeights("lost.pth", "0" * 64, None, {"weight": np.zeros(3)})
    _, _, (note,) = chosen(job_for(tmp_path), broken)
    assert note.startswith("the batch size was not measured: ")


@pytest.mark.usefixtures("ray_session")
def test_an_engine_with_a_size_of_its_own_is_not_measured(tmp_path: Path) -> None:
    openvino = pytest.importorskip(
        "shard_embedder.pipeline.embedding.openvino_runner", reason="OpenVINO has no wheel for this machine"
    )
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    graph = openvino.SharedGraph(b"", np.zeros(0, np.uint8))
    _, resources, notes = chosen(job_for(tmp_path), graph)
    assert (resources.batch_size, resources.batch_rates, notes) == (None, (), [])
