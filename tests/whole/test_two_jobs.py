"""Jobs that start on one cluster at the same moment, before any of them has taken room there."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray

from benchmarks.sleep import SleepSource, Start
from shard_embedder.jobs.support.connection import connect
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.engine import Engine
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.run.on_ray import OnRay, watched
from shard_embedder.pipeline.run.passes import Watcher, run
from tests.conftest import ray_here, write_shards
from tests.outputs import job_for, rows

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # Ray Data's advice: the input is small, and the actors are there to hold their room.
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors:UserWarning"),
]
# Of each job. If each actor reserved what it counts for, 0.3 CPU, those of two jobs would leave none of the two CPUs
# to a read task, which takes 0.25.
_ACTORS = 3
# Where none can read, Ray Data ends a flow after an hour.
_WAIT_S = 200


class _Actor:
    """Of another job."""

    def is_placed(self) -> bool:
        return True


def test_actors_leave_room_to_read_beside_those_of_another_job_that_found_the_same_room(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2)
    job = job_for(tmp_path / "in", tmp_path / "out", actors=str(_ACTORS), device="cpu")
    job = replace(job.with_engine("sleep", "fp32"), shape=(4,))
    pending, resources = make_plan(job.shards, job.config.output).pending, plan_resources(job.config)
    # One that reserves as much as those of the job.
    other = ray.remote(_Actor).options(num_cpus=_ACTORS * resources.reserved_cpus).remote()
    assert ray.get(other.is_placed.remote())
    deadline = time.monotonic() + _WAIT_S

    def check() -> None:
        assert time.monotonic() < deadline, "the flow stands still"

    try:
        assert len(list(watched(make_flow(pending, job, SleepSource(64.0, time.time()), resources), check))) == 2
    finally:
        ray.kill(other)
    assert len(rows(tmp_path / "out")) == 14


def embed(input: Path, output: Path, met: Path) -> dict[str, Any]:
    """The report of a job of this process, which takes its room when another process has found the same room."""
    config = parse({
        "input": [str(input)], "output": str(output), "backbone": "squeezenet1_1", "weights": "random:0",
        "image_size": "64", "precision": "fp32", "device": "cpu", "actors": str(_ACTORS), "node_wait_s": _WAIT_S,
    })  # fmt: skip
    job = replace(prepare_job(config), shape=(4,))

    def choose(*_: Any) -> Engine:
        Start(met, 2).wait()
        return Engine("sleep", "fp32", SleepSource(64.0, time.time()))

    def nothing(*_: Any) -> None:
        pass

    def on_wait(why: str) -> None:
        assert "for a part to be stored" not in why, why

    return run(job, make_plan(job.shards, config.output), Watcher(nothing, nothing, nothing, on_wait), OnRay(choose))


def test_jobs_of_one_moment_all_embed_their_input(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2)
    met = tmp_path / "met"
    met.mkdir()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=connect) as pool:
        with mock.patch.dict(os.environ, ray_here()):
            other = pool.submit(embed, tmp_path / "in", tmp_path / "other", met)
        assert embed(tmp_path / "in", tmp_path / "one", met)["balanced"]
        assert other.result(_WAIT_S)["balanced"]
    assert len(rows(tmp_path / "one")) == len(rows(tmp_path / "other")) == 14
