"""The batch size of a device: which sizes to try, how each is timed, and which is the best.

The best depends on the device, the backbone and the image size, so `--batch-size auto` measures it (`probe`).
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import numpy as np

from shard_embedder.pipeline.embedding.embedder import Runner

SMALLEST, LARGEST = 16, 1024
# A smaller gain is noise, and a larger batch costs memory, and padding at the end of a part.
GAIN = 0.03
# The device also holds what it decodes, and loses memory to fragments.
_MEMORY_SHARE = 0.75
# Pixels of a batch. A GPU is bound by the host memory that three batches pin, a CPU by the backbone, which needs some
# hundred bytes for a pixel.
_MAX_PIXELS = {"cuda": 80 * 2**20, "cpu": 8 * 2**20}
_MEASURE_S = 20.0
# A compiled network takes ten seconds and more for each size, so few are tried.
_MEASURE_COMPILED_S = 120.0
_NUM_COMPILED = 3
_STEP_S = 1.0
_NUM_IMAGES = 16


class ResizableRunner(Runner, Protocol):
    """A runner whose batch size can be changed. It falls by itself when a batch does not fit the memory."""

    def use_batches_of(self, batch_size: int) -> None:
        """Compute in batches of so many images from now on."""
        ...

    def memory_share(self) -> float:
        """The largest share of the device's memory that was held."""
        ...


def best(rates: dict[int, float]) -> int:
    """The smallest batch size whose images/s are within `GAIN` of the best."""
    return min(size for size, rate in rates.items() if rate >= (1 - GAIN) * max(rates.values()))


def of_part(size: int, batch_s: float, part_rows: int) -> float:
    """Images/s if a batch takes `batch_s`: batches end with the part, and the last is padded."""
    return part_rows / (math.ceil(part_rows / size) * batch_s)


def is_flat(rates: list[float]) -> bool:
    """Whether the last two rates are at most `GAIN` above the best before them."""
    return len(rates) > 2 and max(rates[-2:]) <= (1 + GAIN) * max(rates[:-2])


def ladder(part_rows: int, crop: tuple[int, int], device: str, *, compiled: bool = False) -> list[int]:
    """Batch sizes to try: powers of two, up to a whole part or the most pixels of a batch.

    For a `compiled` network these are the largest of them, a quarter of it, and a sixteenth.
    """
    sizes = [SMALLEST]
    while sizes[-1] < min(part_rows, LARGEST) and 2 * sizes[-1] * crop[0] * crop[1] <= _MAX_PIXELS[device]:
        sizes.append(2 * sizes[-1])
    return sizes[::-2][:_NUM_COMPILED][::-1] if compiled else sizes


def measure(
    runner: ResizableRunner,
    sizes: list[int],
    part_rows: int,
    crop: tuple[int, int],
    *,
    compiled: bool = False,
    limit_s: float | None = None,
    step_s: float = _STEP_S,
) -> dict[int, float]:
    """Images/s of a part, padding included, by batch size, of which each is repeated for `step_s` seconds.

    It stops at a batch that does not fit the memory, after two larger ones that gained no more than `GAIN`, or before
    a size that would take longer than is left of `limit_s` seconds. A `compiled` runner compiles for each size, and
    records a graph in the second call.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (_NUM_IMAGES, *crop, 3), dtype=np.uint8)
    if limit_s is None:
        limit_s = _MEASURE_COMPILED_S if compiled else _MEASURE_S
    deadline = time.perf_counter() + limit_s

    def seconds(num_images: int) -> float:
        start = time.perf_counter()
        runner.embed(pixels, np.arange(num_images) % _NUM_IMAGES)
        return time.perf_counter() - start

    rates: dict[int, float] = {}
    num_first = 2 if compiled else 1
    image_s = ready_s = 0.0
    if not compiled:
        runner.use_batches_of(1)
        seconds(1)
        image_s = seconds(1)
    for size in sizes:
        # The first calls warm up, and one more counts.
        if ready_s + (num_first + 1) * size * image_s > deadline - time.perf_counter():
            break
        try:
            runner.use_batches_of(size)
            first_s = sum(seconds(size) for _ in range(num_first))
            batch_s = seconds(size)
            ready_s = max(0.0, first_s - num_first * batch_s)
            num_batches = int(min(step_s, deadline - time.perf_counter()) / batch_s)
            if num_batches > 1:
                batch_s = seconds(num_batches * size) / num_batches
        except RuntimeError:  # torch's, when host or device has no memory left
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
