"""Two jobs that start on one cluster at the same moment."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.conftest import write_shards
from tests.outputs import rows


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_two_jobs_for_which_a_cluster_is_too_small_run_one_after_the_other(
    run_process: Callable[..., Any], tmp_path: Path
) -> None:
    write_shards(tmp_path / "in", num_shards=2)
    address = ray.get_runtime_context().gcs_address

    def job(name: str) -> Any:
        # The actors of both would fill the two CPUs, and nothing could be read.
        return run_process(
            "embed.py", "--input", "in", "--output", name, "--backbone", "squeezenet1_1", "--weights", "random:0",
            "--image-size", "64", "--device", "cpu", "--actors", "4", "--node-wait-s", "240", RAY_ADDRESS=address,
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(job, ("one", "two"))
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert len(rows(tmp_path / "one")) == len(rows(tmp_path / "two")) == 14
