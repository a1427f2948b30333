"""GPUs that cannot embed: they are named and left out, and the others do the work.

Ray's nodes have declared GPUs, not real ones, which break as GPUs do.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
from ray.cluster_utils import Cluster

from benchmarks.scaling import IMAGES_A_SHARD, light_shards
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.planning.engine import Engine, choose_engine
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from tests.whole.declared_gpus import BREAKS_LATER, DIES, NO_KERNEL, NODE, RAISES, DeclaredGpus

pytestmark = pytest.mark.head

_WAIT_S = 300.0
# Each node without what reads its logs to the driver.
_NODE = {"object_store_memory": 250_000_000, "include_log_monitor": False}


def run_on(faults: dict[str, str], folder: Path) -> dict[str, Any] | str:
    """In the driver: the report of a job on GPUs with these faults, or why there is none."""
    job = prepare_job(parse({
        "input": [str(folder / "in")], "output": str(folder / "out"), "part_rows": IMAGES_A_SHARD,
        "backbone": "squeezenet1_1", "weights": "random:3", "image_size": "32", "device": "cuda", "node_wait_s": 60,
    }))  # fmt: skip

    def choose(*asked: Any) -> Engine:
        engine = choose_engine(*asked)
        return replace(engine, source=DeclaredGpus(job.shape[0], IMAGES_A_SHARD, faults, folder / "broken"))

    def nothing(*_: Any) -> None:
        pass

    plan = make_plan(job.shards, job.config.output)
    try:
        with closing(OnRay(choose)) as executor:
            return run(job, plan, Watcher(nothing, nothing, nothing), executor)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


_cluster: list[Cluster] = []


def start_cluster() -> None:
    """In the driver: two nodes, the head `a` with three GPUs and `b` with one."""
    head = {"num_cpus": 2, "num_gpus": 3, "env_vars": {NODE: "a"}, "include_dashboard": False, "no_monitor": True}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **_NODE})
    cluster.add_node(num_cpus=1, num_gpus=1, env_vars={NODE: "b"}, **_NODE)
    ray.init(cluster.address, log_to_driver=False)
    _cluster.append(cluster)


def stop_cluster() -> None:
    """In the driver."""
    ray.shutdown()
    _cluster[0].shutdown()


@pytest.fixture(scope="module")
def driver() -> Iterator[Callable[..., Any]]:
    """Runs functions of this file in a process that has joined a cluster, as a process can join only one."""
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, environment):
            pool.submit(start_cluster).result(_WAIT_S)
        yield lambda function, *arguments: pool.submit(function, *arguments).result(_WAIT_S)
        pool.submit(stop_cluster).result(_WAIT_S)


def test_gpus_that_cannot_embed_are_named_and_left_out_and_the_others_embed_all(
    driver: Callable[..., Any], tmp_path: Path
) -> None:
    light_shards(tmp_path / "in", 4)
    report = driver(run_on, {"a1": RAISES, "b0": DIES, "a2": BREAKS_LATER}, tmp_path)
    assert isinstance(report, dict), report
    first, second, later = sorted(report["problems"])
    host = os.uname().nodename
    assert first == f"GPU 0 of {host} is left out: the process that tried it died"
    assert second == f"GPU 1 of {host} is left out: RuntimeError: {NO_KERNEL}"
    assert "RuntimeError: CUDA error: unspecified launch failure; GPU 2" in later
    assert later.startswith("pass 1: ")
    assert later.endswith(f"; GPU 2 of {host} is left out: RuntimeError: {NO_KERNEL}")
    assert report["balanced"]
    assert report["embedded"] == 4 * IMAGES_A_SHARD


def test_a_job_without_a_gpu_that_can_embed_ends_with_what_torch_says(
    driver: Callable[..., Any], tmp_path: Path
) -> None:
    light_shards(tmp_path / "in", 1)
    told = driver(run_on, dict.fromkeys(("a0", "a1", "a2", "b0"), RAISES), tmp_path)
    assert isinstance(told, str), told
    assert told.startswith("ClusterError: device cuda needs a GPU that can embed a batch: GPU ")
    assert told.count(f"is left out: RuntimeError: {NO_KERNEL}") == 4
    assert not (tmp_path / "out" / "embeddings").exists()
