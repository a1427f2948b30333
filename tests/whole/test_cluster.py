"""Several Ray nodes on this machine: who decodes, who embeds, and what happens as nodes come and go.

The cluster has declared GPUs, not real ones. What a GPU would compute is slept for, by `benchmarks.scaling`'s source;
the rest of the flow is the job's. The driver is one process for all tests, since a process can join only one cluster.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray

from benchmarks.memory import WORKERS
from benchmarks.scaling import IMAGES_A_SHARD, light_shards
from benchmarks.sleep import SleepSource
from shard_embedder.jobs.support.connection import connect
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.schema import STAGE_DECODE, STAGE_EMBED
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from tests.conftest import ROOT, free_ports
from tests.faults.cluster import LEAN, SOON, kill_tree

pytestmark = pytest.mark.head

_HEAD = "127.0.0.11"
_WAIT_S = 600.0
# Of nodes, those that are started again included.
_MOST_STARTS = 20
# Looks, four a second.
_ENOUGH = 12
CPU_NODE = "127.0.0.12"
GPU_NODE = ("--num-cpus=1", "--num-gpus=1", '--resources={"embedder": 1}')
SETTINGS = {
    "backbone": "squeezenet1_1",
    "weights": "random:3",
    "image_size": "64",
    "precision": "fp32",
    "part_rows": IMAGES_A_SHARD,
}


def until(what: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not happen within {_WAIT_S:.0f} s"
        time.sleep(0.1)


class Nodes:
    """A Ray cluster whose nodes have addresses of their own; its head runs no tasks."""

    def __init__(self, folder: Path) -> None:
        # A socket's path must be short.
        self._temporary = tempfile.mkdtemp(prefix="r-", dir="/tmp")
        self._log = folder / "ray.log"
        # All at once: a port that was given and not yet taken would be given again.
        port, client_port, *self._agent_ports = free_ports(2 + 2 * _MOST_STARTS)
        self.address = f"{_HEAD}:{port}"
        self._count = 0
        self.gpu_node = ""  # the last that was added
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._options: dict[str, tuple[str, ...]] = {}
        self._start(
            _HEAD, "--head", f"--port={port}", f"--ray-client-server-port={client_port}", "--num-cpus=0",
            "--include-dashboard=false", f"--temp-dir={self._temporary}",
        )  # fmt: skip
        until("the head", lambda: self._listens(port))

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever is to join."""
        return {
            **os.environ,
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # How often workers send what they did.
            "RAY_task_events_report_interval_ms": "200",
            **SOON,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        }

    def add(self, *options: str) -> str:
        """Start a node, and return its address; it joins while others work."""
        self._count += 1
        node = f"127.0.0.{11 + self._count}"
        if options == GPU_NODE:
            self.gpu_node = node
        self._start(node, f"--address={self.address}", *options)
        return node

    def until(self, what: str, ready: Callable[[], bool]) -> None:
        """Wait for it, and start nodes that did not come up again: a busy machine may be too slow for Ray."""

        def kept() -> bool:
            for node in [node for node, process in self._processes.items() if process.poll() is not None]:
                self._start(node, *self._options[node])
            return ready()

        until(what, kept)

    def kill(self, node: str) -> None:
        """Kill it with all that runs there."""
        process = self._processes.pop(node)
        kill_tree(process.pid)
        process.wait()

    def stop(self) -> None:
        for node in reversed(list(self._processes)):
            self.kill(node)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self, node: str, *options: str) -> None:
        self._options[node] = options
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", f"--node-ip-address={node}", *LEAN]
        # Ray's own are the same for all nodes: an agent that finds its port taken dies, and its node with it, and
        # workers of two clusters on one port get each other's questions.
        agent, agent_grpc = self._agent_ports.pop(), self._agent_ports.pop()
        command += [
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}",
            "--min-worker-port=0", "--max-worker-port=0",
        ]  # fmt: skip
        with self._log.open("ab") as log:
            self._processes[node] = subprocess.Popen(
                [*command, "--object-store-memory=150000000", *options],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def _listens(port: int) -> bool:
        with suppress(OSError), socket.create_connection((_HEAD, port), 1):
            return True
        return False


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head that runs no tasks, and nothing else."""
    cluster = Nodes(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


class Driver:
    """The process that has joined the cluster; it runs functions of this file, each with a bound on its time."""

    def __init__(self, nodes: Nodes) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=connect)
        # From its first moment: the environment of a process that has started Ray asks for tokens, which Ray reads
        # when it is imported, and a driver that asks for them is taken for dead by workers that have none.
        with mock.patch.dict(os.environ, nodes.environment):
            self(addresses)

    def start(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(function, *arguments)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self.start(function, *arguments).result(_WAIT_S)

    def stop(self) -> None:
        for process in list(self._pool._processes.values()):
            kill_tree(process.pid)
        self._pool.shutdown(wait=False, cancel_futures=True)


@pytest.fixture(scope="module")
def driver(nodes: Nodes) -> Iterator[Driver]:
    process = Driver(nodes)
    yield process
    process.stop()


# What the driver does


def addresses() -> set[str]:
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}


def lacking(settings: dict[str, Any], said: Path) -> str:
    """What `plan_resources` says; who it tells of a wait writes it to a file."""
    config = parse({"input": ["in"], "output": "out", **SETTINGS, **settings})
    try:
        return str(plan_resources(config, said.write_text).num_actors)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@dataclass
class Ran:
    """One run of a flow: where its stages ran, how many actors lived at each look, what was waited for."""

    report: dict[str, Any] = field(default_factory=dict)
    decoded_on: set[str] = field(default_factory=set)
    embedded_on: set[str] = field(default_factory=set)
    num_alive: list[int] = field(default_factory=list)
    waited: list[str] = field(default_factory=list)


def sleep_flow(shards: Path, output: Path, images_per_s: float, settings: dict[str, Any]) -> Ran:
    """The flow with actors that want a GPU and sleep instead of using it, until two have been at work for a while."""
    begin = time.time()
    config = parse({"input": [str(shards)], "output": str(output), **SETTINGS, "device": "cuda", **settings})
    job = replace(prepare_job(config).with_engine("sleep", "fp32"), shape=(4,))
    pending = make_plan(job.shards, config.output).pending
    flow = make_flow(pending, job, SleepSource(images_per_s, time.time()), plan_resources(config))
    ran = Ran()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.25):
            # Ray Data looks at the nodes every 20 s by itself.
            with suppress(ValueError):
                coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
                ray.get(coordinator.get_reserved_resources.remote("", recompute=True))
            actors = ray._private.state.actors(actor_state_name="ALIVE").values()
            ran.num_alive.append(sum("Embedder" in actor["ActorClassName"] for actor in actors))

    looks = threading.Thread(target=look)
    looks.start()
    try:
        for _ in flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            if ran.num_alive[-_ENOUGH:] == [2] * _ENOUGH:
                break
    finally:
        ended.set()
        looks.join()
    return _where(ran, begin)


def whole_run(shards: Path, output: Path, said: Path, settings: dict[str, Any]) -> Ran:
    """The whole job, with its real backbone; what it waits for goes to a file, too."""
    begin = time.time()
    job = prepare_job(parse({"input": [str(shards)], "output": str(output), **SETTINGS, **settings}))
    ran = Ran()

    def on_wait(why: str) -> None:
        ran.waited.append(why)
        said.write_text("\n".join(ran.waited))

    def nothing(*_: Any) -> None:
        pass

    watcher = Watcher(nothing, nothing, nothing, on_wait)
    ran.report = run(job, make_plan(job.shards, job.config.output), watcher, OnRay())
    return _where(ran, begin)


def _where(ran: Ran, begin: float) -> Ran:
    # For the events of the last tasks.
    time.sleep(1.0)
    for event in ray.timeline():
        if event["cat"].startswith("task::") and event["ts"] / 1e6 >= begin:
            node = event["pid"].removeprefix("node:")
            if WORKERS[STAGE_DECODE] in event["cat"]:
                ran.decoded_on.add(node)
            elif WORKERS[STAGE_EMBED] in event["cat"]:
                ran.embedded_on.add(node)
    return ran


# Tests, in the order in which the cluster grows


def num_stored(output: Path) -> int:
    return len(list(output.rglob("*.parquet")))


def test_a_head_that_runs_nothing_is_told_of_and_not_waited_for(driver: Driver, tmp_path: Path) -> None:
    begin = time.monotonic()
    told = driver(lacking, {"device": "cuda", "actors": "1:2"}, tmp_path / "said")
    assert told == (
        "ClusterError: the cluster has no node for embed, 0.3 CPU and 1 GPU on one node: of 1 node, the nearest to "
        "it has 0 CPU, 0 GPU; with --node-wait-s the job waits for nodes that are still to come"
    )
    told = driver(lacking, {"device": "cuda", "node_wait_s": 3}, tmp_path / "said")
    assert told.endswith("has 0 CPU, 0 GPU; waited 3 s for it")
    assert (tmp_path / "said").read_text().startswith("for nodes, 3 s more: the cluster has no node for embed")
    assert time.monotonic() - begin < 60


def test_a_job_that_waits_goes_on_when_the_nodes_have_come(nodes: Nodes, driver: Driver, tmp_path: Path) -> None:
    said = tmp_path / "said"
    waits = driver.start(lacking, {"device": "cuda", "actors": "1:2", "node_wait_s": 300}, said)
    until("the wait", said.exists)
    assert nodes.add("--num-cpus=2") == CPU_NODE
    nodes.add(*GPU_NODE)
    nodes.until("the end of the wait", waits.done)
    assert waits.result() == "(1, 2)"


@pytest.mark.slow
def test_pixels_are_made_on_cpu_nodes_embeddings_only_on_gpus_and_one_that_joins_is_used(
    nodes: Nodes, driver: Driver, tmp_path: Path
) -> None:
    # The job before waited for a GPU node only. The CPU node may still be starting.
    nodes.until("the CPU node", lambda: CPU_NODE in driver(addresses))
    # More than will be done until a node has joined, and is counted in.
    light_shards(tmp_path / "in", 200)
    runs = driver.start(sleep_flow, tmp_path / "in", tmp_path / "out", 100.0, {"actors": "1:2"})
    nodes.until("the first part", lambda: num_stored(tmp_path / "out") > 0 or runs.done())
    before, joins = nodes.gpu_node, nodes.add(*GPU_NODE)
    nodes.until("the end of the run", runs.done)
    ran = runs.result()
    assert ran.embedded_on == {before, joins}
    assert CPU_NODE in ran.decoded_on
    # From the least that was asked for to the most.
    assert 1 in ran.num_alive[: ran.num_alive.index(2)]
    assert max(ran.num_alive) == 2
    nodes.kill(before)


@pytest.mark.skipif(os.environ.get("EMBED_TEST_CLUSTER") != "all", reason="takes minutes: set EMBED_TEST_CLUSTER=all")
@pytest.mark.slow
def test_a_job_whose_nodes_are_gone_says_so_and_ends_and_the_next_goes_on(
    nodes: Nodes, driver: Driver, tmp_path: Path
) -> None:
    light_shards(tmp_path / "in", 12)
    said, output = tmp_path / "said", tmp_path / "out"
    settings = {"backbone": "resnet18", "image_size": "112", "device": "cpu", "actor_resource": "embedder"}
    runs = driver.start(whole_run, tmp_path / "in", output, said, {**settings, "node_wait_s": 8})
    nodes.until("the first part", lambda: num_stored(output) > 0 or runs.done())
    nodes.kill(nodes.gpu_node)
    nodes.until("the end of the run", runs.done)
    ran = runs.result()
    assert ran.embedded_on == {nodes.gpu_node}
    assert not ran.report["balanced"]
    *_, problem = ran.report["problems"]
    assert "no node for embed, 0.3 CPU on a node with embedder" in problem, ran.report["problems"]
    assert "waited" in problem
    assert (tmp_path / "out" / "report.json").exists()
    assert any("s more: the cluster has no node for embed" in why for why in ran.waited)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    assert 0 < len(before) < 12

    runs = driver.start(whole_run, tmp_path / "in", output, said, {**settings, "node_wait_s": 300})
    nodes.until("the wait", lambda: "300 s more" in said.read_text())
    nodes.add(*GPU_NODE)
    nodes.until("another part", lambda: num_stored(output) > len(before) or runs.done())
    said.unlink()
    nodes.kill(nodes.gpu_node)
    nodes.until("the wait", lambda: said.exists() or runs.done())
    nodes.add(*GPU_NODE)
    nodes.until("the end of the run", runs.done)
    report = runs.result().report
    assert (report["balanced"], report["shards"]["missing"]) == (True, 0)
    assert {path: path.stat().st_mtime_ns for path in before} == before
