"""A pass on the cluster that Ray is connected to."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError

from shard_embedder.pipeline.core.redact import redact
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.batch_size import choose_batch_size
from shard_embedder.pipeline.planning.engine import Choose, choose_engine
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.nodes import DeviceTime, NodeWatch, StallWatch, alive_nodes
from shard_embedder.pipeline.planning.processors import fast_precisions, processors_of, without_openvino
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.planning.stored_source import StoredSource
from shard_embedder.pipeline.run.executor import PassError, Prepared, Say
from shard_embedder.pipeline.shards.find import Pending

# Spot machines may stay away for many minutes.
_NODE_WAIT_S = 1800
_LOOK_EVERY_S = 1.0
# For the threads of a flow that was ended.
_END_WAIT_S = 10.0
_CAUSED = "The above exception was the direct cause of the following exception:"


class OnRay:
    """Runs the flow (`pipeline.flow`). `choose` decides what computes; it may have begun before Ray was up."""

    def __init__(self, choose: Choose = choose_engine) -> None:
        self._choose = choose

    def prepare(self, job: Job, pending: list[Pending], since: float, on_wait: Say) -> Prepared:
        """As `Executor.prepare`."""
        resources = plan_resources(job.config, on_wait)
        devices = DeviceTime(resources.requests[0], resources.num_actors[1], since, alive_nodes())
        if resources.device == "cuda":
            candidates, without = resources.fast_gpu_precisions(), None
        else:
            processors = processors_of(resources.actor_resource)
            candidates, without = fast_precisions(processors), without_openvino(processors, job.precision)
        engine = self._choose(job, pending, resources.device, candidates, without)
        source = StoredSource.put(engine.source)
        job = job.with_engine(engine.name, engine.precision)
        job, resources, note = choose_batch_size(job, source, resources, on_wait)
        return Prepared(job, source, resources, devices, engine.problems + ([] if note is None else [note]))

    def receipts(self, prepared: Prepared, pending: list[Pending], on_wait: Say) -> Iterator[Any]:
        """As `Executor.receipts`."""
        resources, wait_s = prepared.resources, prepared.job.config.node_wait_s
        watch = NodeWatch(resources.requests, _NODE_WAIT_S if wait_s is None else wait_s, on_wait, prepared.devices)
        stall = StallWatch(on_wait)

        def check() -> None:
            watch.check()
            stall.check()

        flow = make_flow(pending, prepared.job, prepared.source, resources)
        try:
            for receipt in watched(flow, check):
                stall.stored()
                yield receipt
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
            raise PassError(_brief(error)) from error


def watched(flow: Dataset, check: Callable[[], None]) -> Iterator[dict[str, Any]]:
    """The rows of a flow as they come. `check` is called every second, and ends the flow by what it raises.

    Ray Data hands rows out in a thread of ours: it cannot be interrupted while it waits for one, which may be for
    ever. What ends it then is its executor, which is private to it.
    """
    found: queue.Queue[list[dict[str, Any]] | BaseException | None] = queue.Queue()
    executors: list[Any] = []
    create = flow._create_executor

    def create_and_keep() -> Any:
        executors.append(create())
        return executors[-1]

    flow._create_executor = create_and_keep

    def read() -> None:
        try:
            for table in flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                found.put(table.to_pylist())
            found.put(None)
        except BaseException as error:  # whatever it is, the caller raises it
            found.put(error)

    reader = threading.Thread(target=read, name="receipts", daemon=True)
    reader.start()
    try:
        while True:
            check()
            try:
                rows = found.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                continue
            if rows is None:
                return
            if isinstance(rows, BaseException):
                raise rows
            yield from rows
    finally:
        for executor in executors:
            executor.shutdown(force=True)
        reader.join(_END_WAIT_S)


def _brief(error: BaseException) -> str:
    """An error's type and the line that says what went wrong: not Ray's advice, which follows an error of ours."""
    text, _, advice = str(error).rpartition(_CAUSED)
    lines = [line for line in (text if "UserCodeException" in advice else str(error)).splitlines() if line.strip()]
    return redact(f"{type(error).__name__}: {lines[-1].strip() if lines else ''}")[:500]
