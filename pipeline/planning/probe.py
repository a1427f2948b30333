"""What the devices of a cluster can do, tried on them before the work begins.

Every GPU runs one batch before the first pass, and again after a pass that failed. One that cannot is left out: the
actor that tried it stays alive and holds it. Ray gives a node's GPUs to actors by count, so nothing else would keep
it from the actors of the run while its neighbours work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from socket import gethostname
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shard_embedder.pipeline.core.config import AUTO
from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.core.redact import redact
from shard_embedder.pipeline.embedding.embedder import Source
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.planning.batch_size import SMALLEST, best, ladder, measure
from shard_embedder.pipeline.planning.cpu import cpu_precisions
from shard_embedder.pipeline.planning.engine import Pixels, Trial, first_close
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.nodes import SAY_EVERY_S
from shard_embedder.pipeline.planning.resources import Resources

Say = Callable[[str], object]
Capability = tuple[int, int]

# For a worker to start on a node. Beyond it the GPU is another job's.
_PLACE_S = 60.0
# For torch, the weights and what is tried; then the run goes on without.
_WAIT_S = 300.0
_FAULTS_SHOWN = 8


def gpu_precisions(capabilities: Sequence[Capability]) -> tuple[str, ...]:
    """The reduced precisions that GPUs of all these compute capabilities compute faster than fp32, the best first.

    Volta and Turing have tensor cores for fp16, Ampere and newer ones for bf16, too.
    """
    lowest = min(capabilities, default=(0, 0))
    if lowest >= (8, 0):
        return ("bf16", "fp16")
    if lowest < (7, 0):
        return ()
    return ("fp16",)


def precisions_here(device: str) -> tuple[str, ...]:
    """The same of this process's GPU or processor."""
    if device == "cuda":
        return gpu_precisions([_capability_here()])
    return cpu_precisions()


def _capability_here() -> Capability:
    """That of this process's GPU; (0, 0) without one."""
    import torch  # noqa: PLC0415  it takes seconds, and the driver of a cluster does not need it

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def try_out(
    source: Source, network: Network, placement: Placement, images: Pixels, candidates: tuple[str, ...],
    sizes: list[int], part_rows: int,
) -> tuple[str, dict[int, float]]:  # fmt: skip
    """In this process, on the device of `placement`: the precision, and images/s by batch size.

    The precision is the first of `candidates` that is close to fp32 on `images`, or without candidates that of
    `placement`. Batches are timed in that precision and, where it asks for that, compiled.
    """
    precision = placement.precision
    if candidates:
        eager = replace(placement, batch_size=SMALLEST, compiled=False)
        precision = first_close(source, network, eager, images, candidates)
    if not sizes:
        return precision, {}
    runner: Any = source.runner(network, replace(placement, precision=precision, batch_size=sizes[0]))
    return precision, measure(runner, sizes, part_rows, network.preprocess.crop, compiled=placement.compiled)


class _Prober:
    """In a worker, with the resources of an actor of the run."""

    def place(self) -> str:
        """`GPU 1 of gpu-node-3`."""
        (index,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        return f"GPU {index} of {gethostname()}"

    def embed_batch(self, source: Source, network: Network, placement: Placement) -> Capability:
        """Load the network and embed a batch of noise; this also loads the device's libraries."""
        pixels = np.random.default_rng(0).integers(0, 256, (SMALLEST, *network.preprocess.crop, 3), np.uint8)
        source.runner(network, placement).embed(pixels, np.arange(SMALLEST))
        return _capability_here()

    def try_out(self, *asked: Any) -> tuple[str, dict[int, float]]:
        """As the function."""
        return try_out(*asked)


@dataclass(frozen=True)
class _Tried:
    """A GPU, held by the actor that tried it."""

    name: str
    node_id: str
    prober: Any
    capability: Capability = (0, 0)


class Gpus:
    """The GPUs of the cluster that have been tried. Those that failed are held until they are given back."""

    def __init__(self, source: Source, job: Job, resources: Resources) -> None:
        precision = "fp32" if job.precision == AUTO else job.precision
        self._asked = source, job.network, replace(resources, batch_size=SMALLEST).placement(precision)
        self._resources = resources
        self._held: list[_Tried] = []
        self._good: list[_Tried] = []

    @property
    def left_out(self) -> Counter[str]:
        """How many GPUs are left out, by node."""
        return Counter(gpu.node_id for gpu in self._held)

    @property
    def precisions(self) -> tuple[str, ...]:
        """The reduced precisions that all good ones compute faster than fp32."""
        return gpu_precisions([gpu.capability for gpu in self._good])

    def limit(self, resources: Resources) -> Resources:
        """The resources with no more actors than GPUs are good, once one is left out; a pool may still grow."""
        least, most = resources.num_actors
        if not self._held:
            return resources
        fewest = max(1, min(least, len(self._good)))
        return replace(resources, num_actors=(fewest, fewest if least == most else most))

    def look(self, on_wait: Say) -> list[str]:
        """Try every GPU that is free, and return what is said of those that are left out from now on.

        Raises:
            ClusterError: all failed.
        """
        probers = self._probers()
        tried: list[_Tried] = []
        for (node_id, prober), name in zip(
            probers, _answers([prober.place.remote() for _, prober in probers], _PLACE_S), strict=True
        ):
            if isinstance(name, str):
                tried.append(_Tried(name, node_id, prober))
            else:
                ray.kill(prober)
        asked = [gpu.prober.embed_batch.options(max_task_retries=0).remote(*self._asked) for gpu in tried]
        answers = _answers(asked, _WAIT_S, lambda left_s: on_wait(f"for a batch on each GPU, {left_s:g} s more"))
        self._good, faults = [], []
        for gpu, answer in zip(tried, answers, strict=True):
            if isinstance(answer, Exception):
                self._held.append(gpu)
                faults.append(f"{gpu.name} is left out: {_reason(answer)}")
            else:
                self._good.append(replace(gpu, capability=answer))
        # A prober that died starts again, and must hold its GPU before another one is free.
        _answers([gpu.prober.place.remote() for gpu in self._held], _PLACE_S)
        for gpu in self._good:
            ray.kill(gpu.prober)
        if faults and not self._good:
            self.give_back()
            shown = "; ".join(faults[:_FAULTS_SHOWN])
            raise ClusterError(f"device cuda needs a GPU that can embed a batch: {shown}")
        return faults

    def give_back(self) -> None:
        """Let go of those that are left out."""
        while self._held:
            ray.kill(self._held.pop().prober)

    def _probers(self) -> list[tuple[str, Any]]:
        """An actor for each GPU that is not left out, by node."""
        resource, left_out, make = self._resources.actor_resource, self.left_out, ray.remote(_Prober)
        each: dict[str, Any] = {
            "num_cpus": 0,
            "num_gpus": 1,
            "resources": self._resources.requests[0].named,
            "max_restarts": -1,
            "max_task_retries": -1,
        }
        return [
            (
                node_id,
                make.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False), **each
                ).remote(),
            )
            for node_id, has in ((node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"])
            if resource is None or resource in has
            for _ in range(int(has.get("GPU", 0) - left_out[node_id]))
        ]


def choose_by_trial(
    job: Job, trial: Trial, source: Source, resources: Resources, gpus: Gpus | None, on_wait: Say,
    wait_s: float = _WAIT_S,
) -> tuple[Job, Resources, list[str]]:  # fmt: skip
    """The job with precision and batch size, its resources, and what is to be told of them.

    The precision is tried here only for GPUs, all of which must have it. The batch size is the one asked for, or with
    `auto` the one that the output was begun with, or for a new output the one that is measured. Kernels of another
    batch shape may round the last bit otherwise, so run.json keeps it, and an output that was begun without one goes
    on with the device's own.
    """
    asked, begun = job.config.batch_size, job.fingerprint.batch_size.get(resources.device)
    size = asked if isinstance(asked, int) else None
    sizes: list[int] = []
    if asked == AUTO and not source.has_own_batch_size:
        size = begun
        if begun is None and job.is_new:
            crop, compiled = job.network.preprocess.crop, job.config.compile
            sizes = ladder(job.config.part_rows, crop, resources.device, compiled=compiled)
    candidates = gpus.precisions if gpus is not None and job.precision == AUTO else ()
    doubt = trial.doubt(candidates)
    notes = [] if doubt is None else [f"slower than it could be: {doubt}"]
    precision = "fp32" if job.precision == AUTO else job.precision
    rates: dict[int, float] = {}
    if doubt is not None:
        candidates = ()
    if candidates or sizes:
        placement = resources.placement(precision, compiled=job.config.compile)
        images = trial.images if candidates else np.zeros(0, np.uint8)
        found = _remote(
            resources, on_wait, wait_s,
            source, job.network, placement, images, candidates, sizes, job.config.part_rows,
        )  # fmt: skip
        if isinstance(found, Exception):
            why = _reason(found)
            notes += [f"slower than it could be: fp32, as no precision was tried: {why}"] if candidates else []
            notes += [f"the batch size was not measured: {why}"] if sizes else []
        else:
            precision, rates = found
            if rates:
                size = best(rates)
            elif sizes:
                notes.append(f"the batch size was not measured: {sizes[0]} images take too long, or too much")
    job = job.with_engine(job.engine or "", precision).with_batch_size(resources.device, size)
    return job, replace(resources, batch_size=size, batch_rates=tuple(rates.items())), notes


def _remote(resources: Resources, on_wait: Say, wait_s: float, *asked: Any) -> Any:
    """What `try_out` gives where an actor of the run would be, or the error that it ends with."""
    actor = resources.requests[0]
    make: Any = ray.remote(_Prober)
    prober = make.options(num_cpus=actor.cpus, num_gpus=actor.gpus, resources=actor.named).remote()
    try:
        (answer,) = _answers(
            [prober.try_out.remote(*asked)],
            wait_s,
            lambda left_s: on_wait(f"for the device to be tried, {left_s:g} s more"),
        )
    finally:
        # It leaves the device and its memory to an actor.
        ray.kill(prober)
    return answer


def _answers(refs: list[Any], wait_s: float, on_wait: Callable[[float], object] = lambda left_s: None) -> list[Any]:
    """What each call gives within `wait_s` seconds, or its error; `on_wait` is told every minute what is left."""
    done: list[Any] = []
    left_s = wait_s
    while len(done) < len(refs) and left_s > 0:
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=min(left_s, SAY_EVERY_S))
        left_s -= SAY_EVERY_S
        if len(done) < len(refs) and left_s > 0:
            on_wait(left_s)
    return [_answer(ref) if ref in done else TimeoutError(f"no answer within {wait_s:g} s") for ref in refs]


def _answer(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError as error:
        return error


def _reason(error: BaseException) -> str:
    """What went wrong in a worker: torch's own message, without the advice that follows it."""
    if isinstance(error, TimeoutError):
        return str(error)
    if isinstance(error, ray.exceptions.RayActorError):
        return "the process that tried it died"
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()] or [""]
    return redact(f"{type(cause).__name__}: {lines[0].strip()}")[:300]
