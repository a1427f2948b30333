"""Jobs that start on one cluster at the same moment, before any of them has taken room there."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import ray

from benchmarks.sleep import SleepSource
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.run.on_ray import watched
from tests.conftest import write_shards
from tests.outputs import job_for, rows

pytestmark = [
    pytest.mark.usefixtures("ray_session"),
    # Ray Data's advice: the input is small, and the actors are there to hold their room.
    pytest.mark.filterwarnings("ignore:The minimum number of concurrent actors:UserWarning"),
]
# Of each job. If each actor reserved what it counts for, 0.3 CPU, those of two jobs would fill the two CPUs.
_ACTORS = 4
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
    make = ray.remote(_Actor).options(num_cpus=resources.reserved_cpus)
    others: list[Any] = [make.remote() for _ in range(_ACTORS)]
    assert all(ray.get([actor.is_placed.remote() for actor in others]))
    deadline = time.monotonic() + _WAIT_S

    def check() -> None:
        assert time.monotonic() < deadline, "the flow stands still"

    try:
        assert len(list(watched(make_flow(pending, job, SleepSource(64.0, time.time()), resources), check))) == 2
    finally:
        for actor in others:
            ray.kill(actor)
    assert len(rows(tmp_path / "out")) == 14


@pytest.mark.slow
def test_jobs_of_one_moment_all_embed_their_input(
    run_process: Callable[..., CompletedProcess[str]], tmp_path: Path
) -> None:
    write_shards(tmp_path / "in", num_shards=2)
    address = ray.get_runtime_context().gcs_address

    def job(name: str) -> CompletedProcess[str]:
        return run_process(
            "embed.py", "--input", "in", "--output", name, "--backbone", "squeezenet1_1", "--weights", "random:0",
            "--image-size", "64", "--device", "cpu", "--actors", _ACTORS, "--node-wait-s", _WAIT_S,
            RAY_ADDRESS=address,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(job, ("one", "two"))
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert len(rows(tmp_path / "one")) == len(rows(tmp_path / "two")) == 14
