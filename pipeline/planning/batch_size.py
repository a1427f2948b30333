"""The batch size of a run: the one asked for, the one its output was begun with, or the one measured to be the best.

How many images fill a device depends on the device, the backbone and the image size, so `auto` tries: one task with
the resources of an actor, and so on the kind of device that will do the work, loads the backbone and embeds noise.
Kernels of another batch shape may round the last bit otherwise. What was found therefore stands in `run.json`, by
kind of device, and a later run on the same output does not measure again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import ray

from shard_embedder.pipeline.core.config import AUTO
from shard_embedder.pipeline.embedding.embedder import Runner, Source
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.nodes import SAY_EVERY_S
from shard_embedder.pipeline.planning.resources import Resources

SMALLEST, LARGEST = 16, 1024
# Less is noise, and a larger batch has its price: memory, and padding where a part ends.
GAIN = 0.03
# Beside a batch the device has to hold what it decodes, and memory that falls to pieces.
_MEMORY_SHARE = 0.75
# Pixels of a batch: on a GPU bound by the memory of the host that three of them pin, on a CPU by what a backbone
# needs for a pixel, which is some hundred bytes.
_MAX_PIXELS = {"cuda": 80 * 2**20, "cpu": 8 * 2**20}
_MEASURE_S = 20.0
_STEP_S = 1.0
# For a place in the cluster, a process, torch and the weights; then the run goes on without.
_WAIT_S = 300.0
_NUM_IMAGES = 16


class ResizableRunner(Runner, Protocol):
    """A runner whose batch size can be changed, and falls where a batch does not fit into memory."""

    def use_batches_of(self, batch_size: int) -> None:
        """Compute in batches of so many images from now on."""
        ...

    def memory_share(self) -> float:
        """Of the device's memory, what was held at most."""
        ...


def choose_batch_size(
    job: Job, source: Source, resources: Resources, on_wait: Callable[[str], object], wait_s: float = _WAIT_S
) -> tuple[Job, Resources, str | None]:
    """The job and its resources with the batch size, and why that could not be measured, where it could not.

    `source` is what the actors will load, and `wait_s` how long a cluster without room is waited for. An output that
    was begun without a batch size that was measured or asked for goes on with the device's own.
    """
    begun = job.fingerprint.batch_size.get(resources.device)
    asked, note = job.config.batch_size, None
    rates: dict[int, float] = {}
    size = asked if isinstance(asked, int) else None
    if asked == AUTO and not source.has_own_batch_size:
        if begun is not None:
            size = begun
        elif job.is_new:
            rates, note = _measured(job, source, resources, on_wait, wait_s)
            size = best(rates) if rates else None
    job = job.with_batch_size(resources.device, size)
    return job, replace(resources, batch_size=size, batch_rates=tuple(rates.items())), note


def best(rates: dict[int, float]) -> int:
    """The smallest batch size whose images/s are within `GAIN` of the best."""
    return min(size for size, rate in rates.items() if rate >= (1 - GAIN) * max(rates.values()))


def of_part(size: int, batch_s: float, part_rows: int) -> float:
    """Images/s where a batch takes `batch_s`: batches end with the part, and the last is padded."""
    return part_rows / (math.ceil(part_rows / size) * batch_s)


def is_flat(rates: list[float]) -> bool:
    """Whether the last two of the images/s are no more than `GAIN` above the best before them."""
    return len(rates) > 2 and max(rates[-2:]) <= (1 + GAIN) * max(rates[:-2])


def ladder(part_rows: int, crop: tuple[int, int], device: str) -> list[int]:
    """Batch sizes to try: powers of two, up to one that holds a part, or all the pixels that a batch may have."""
    sizes = [SMALLEST]
    while sizes[-1] < min(part_rows, LARGEST) and 2 * sizes[-1] * crop[0] * crop[1] <= _MAX_PIXELS[device]:
        sizes.append(2 * sizes[-1])
    return sizes


def measure(
    runner: ResizableRunner, sizes: list[int], part_rows: int, crop: tuple[int, int], limit_s: float = _MEASURE_S
) -> dict[int, float]:
    """Images/s of a part by batch size, its padding included, of as many of `sizes` as are worth it.

    It ends where a batch does not fit into memory, where two larger ones have brought no more than `GAIN`, and
    before `limit_s` seconds are over: nothing is begun that would last longer, by the time of what went before.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (_NUM_IMAGES, *crop, 3), dtype=np.uint8)
    deadline = time.perf_counter() + limit_s

    def seconds(num_images: int) -> float:
        start = time.perf_counter()
        runner.embed(pixels, np.arange(num_images) % _NUM_IMAGES)
        return time.perf_counter() - start

    rates: dict[int, float] = {}
    runner.use_batches_of(1)
    seconds(1)
    image_s = seconds(1)
    for size in sizes:
        # A first call, which makes ready, and one that counts.
        if 2 * size * image_s > deadline - time.perf_counter():
            break
        try:
            runner.use_batches_of(size)
            seconds(size)
            batch_s = seconds(size)
            num_batches = int(min(_STEP_S, deadline - time.perf_counter()) / batch_s)
            if num_batches > 1:
                batch_s = seconds(num_batches * size) / num_batches
        except RuntimeError:  # torch's, of memory that neither host nor device has
            if not rates:
                raise
            break
        if runner.batch_size != size or runner.memory_share() > _MEMORY_SHARE:
            break
        image_s = batch_s / size
        rates[size] = of_part(size, batch_s, part_rows)
        if is_flat(list(rates.values())):
            break
    return rates


def _measure(
    source: Source, network: Network, placement: Placement, sizes: list[int], part_rows: int
) -> dict[int, float]:
    """In a worker."""
    runner: Any = source.runner(network, placement)
    return measure(runner, sizes, part_rows, network.preprocess.crop)


def _measured(
    job: Job, source: Source, resources: Resources, on_wait: Callable[[str], object], wait_s: float
) -> tuple[dict[int, float], str | None]:
    """Images/s by batch size as an actor of the run would have them; none, and why, where that cannot be found."""
    actor = resources.requests[0]
    # The process ends with the task, and leaves the device and its memory to an actor.
    task: Any = ray.remote(max_calls=1, max_retries=0)(_measure)
    task = task.options(num_cpus=actor.cpus, num_gpus=actor.gpus, resources=actor.named)
    placement = replace(resources, batch_size=SMALLEST).placement(job.precision)
    part_rows = job.config.part_rows
    sizes = ladder(part_rows, job.network.preprocess.crop, resources.device)
    found = task.remote(source, job.network, placement, sizes, part_rows)
    left_s = wait_s
    while not ray.wait([found], timeout=min(left_s, SAY_EVERY_S))[0]:
        left_s -= SAY_EVERY_S
        if left_s <= 0:
            ray.cancel(found, force=True)
            return {}, f"the batch size was not measured: no device was free for that in {wait_s:g} s"
        on_wait(f"for the batch size to be measured, {left_s:g} s more")
    try:
        rates: dict[int, float] = ray.get(found)
    except ray.exceptions.RayError as error:
        return {}, f"the batch size was not measured: {str(error).strip().splitlines()[-1][:300]}"
    return rates, None if rates else f"the batch size was not measured: {SMALLEST} images take too long, or too much"
