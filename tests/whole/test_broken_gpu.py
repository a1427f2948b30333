"""A GPU that an error takes from its process, on Ray: a new process takes over, and none does so without end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.pipeline.planning.engine import Engine
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import run
from tests.conftest import write_shards
from tests.embedding.simulated_gpu import BreakingSource
from tests.outputs import UNHEARD, job_for

pytestmark = pytest.mark.usefixtures("ray_session")


def embed(folder: Path, at: int, num_broken: int) -> tuple[dict[str, Any], int, int]:
    """The report, and how many passes and processes that took."""
    made = folder / "made"
    made.mkdir()
    passes: list[int] = []

    def choose(job: Any, *_: Any) -> Engine:
        return Engine("simulated", "fp32", BreakingSource(made, at, num_broken, job.shape[0]))

    job = job_for(
        write_shards(folder / "in", num_shards=1, samples_each=8), folder / "out", part_rows=2, max_passes=2
    )
    watcher = replace(UNHEARD, on_pass=lambda number, *_: passes.append(number))
    report = run(job, make_plan(job.shards, job.config.output), watcher, OnRay(choose))
    return report, len(passes), len(list(made.iterdir()))


def test_another_process_takes_over_within_the_pass(tmp_path: Path) -> None:
    report, num_passes, num_processes = embed(tmp_path, at=3, num_broken=1)
    assert (report["balanced"], report["embedded"], report["problems"]) == (True, 8, [])
    assert (num_passes, num_processes) == (1, 2)


def test_a_run_whose_every_process_loses_its_gpu_at_once_ends_and_says_why(tmp_path: Path) -> None:
    report, num_passes, num_processes = embed(tmp_path, at=1, num_broken=100)
    assert (report["balanced"], report["embedded"]) == (False, 0)
    assert (num_passes, num_processes) == (2, 2)
    assert report["problems"][0].endswith("its GPU no more: CUDA error: an illegal memory access was encountered")
