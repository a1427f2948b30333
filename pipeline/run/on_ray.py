"""A pass on the cluster that Ray is connected to."""

from __future__ import annotations

import gc
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.data import Dataset
from ray.data.exceptions import ExecutionTimeoutError

from shard_embedder.pipeline.core.redact import redact
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.engine import Choose, Trial, choose_engine
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.nodes import DeviceTime, NodeWatch, StallWatch, alive_nodes
from shard_embedder.pipeline.planning.probe import Gpus, choose_by_trial
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
# The first line of an error, at the end of a traceback.
_IS_ERROR = re.compile(r"[\w.]+(Error|Exception): ")
_CAUSED = "The above exception was the direct cause of the following exception:"


class OnRay:
    """Runs the flow (`pipeline.flow`). `choose` decides what computes; it may have begun before Ray was up."""

    def __init__(self, choose: Choose = choose_engine) -> None:
        self._choose = choose
        self._gpus: Gpus | None = None

    def prepare(self, job: Job, pending: list[Pending], since: float, on_wait: Say) -> Prepared:
        """As `Executor.prepare`."""
        resources = plan_resources(job.config, on_wait)
        candidates = without = None
        if resources.device != "cuda":
            processors = processors_of(resources.actor_resource)
            candidates, without = fast_precisions(processors), without_openvino(processors, job.precision)
        engine = self._choose(job, pending, resources.device, candidates, without)
        source, problems = StoredSource.put(engine.source), engine.problems
        job = job.with_engine(engine.name, engine.precision)
        if resources.device == "cuda":
            self._gpus = Gpus(source, job, resources)
            problems += self._gpus.look(on_wait)
            resources = self._gpus.limit(resources)
        devices = DeviceTime(resources.requests[0], resources.num_actors[1], since, alive_nodes(self._left_out))
        job, resources, notes = choose_by_trial(job, Trial(job, pending), source, resources, self._gpus, on_wait)
        return Prepared(job, source, resources, devices, problems + notes)

    def close(self) -> None:
        """Give back the GPUs that were left out."""
        if self._gpus is not None:
            self._gpus.give_back()

    @property
    def _left_out(self) -> Counter[str]:
        return Counter() if self._gpus is None else self._gpus.left_out

    def receipts(self, prepared: Prepared, pending: list[Pending], on_wait: Say) -> Iterator[Any]:
        """As `Executor.receipts`."""
        gpus, wait_s = self._gpus, prepared.job.config.node_wait_s
        resources = prepared.resources if gpus is None else gpus.limit(prepared.resources)
        watch = NodeWatch(
            resources.requests,
            _NODE_WAIT_S if wait_s is None else wait_s,
            on_wait,
            prepared.devices,
            self._left_out,
        )
        stall = StallWatch(on_wait)

        def check() -> None:
            watch.check()
            stall.check()

        try:
            for receipt in watched(make_flow(pending, prepared.job, prepared.source, resources), check):
                stall.stored()
                yield receipt
            return
        except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
            why = [_brief(error)]
        # The actors of the pass hold their GPUs until nothing holds them, as the frames of the error do.
        gc.collect()
        if gpus is not None:
            # Perhaps one of a node that came later, or that broke: the next pass goes on without.
            why += gpus.look(on_wait)
        raise PassError("; ".join(why))


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
    """An error's type and the line that says what went wrong: not the advice of Ray and torch, which follows it."""
    text, _, advice = str(error).rpartition(_CAUSED)
    lines = [line for line in (text if "UserCodeException" in advice else str(error)).splitlines() if line.strip()]
    said = [line for line in lines if _IS_ERROR.match(line)] or lines or [""]
    return redact(f"{type(error).__name__}: {said[-1].strip()}")[:500]
