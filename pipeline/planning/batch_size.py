"""How many images a batch fill a device: what there is to try, how it is measured, and which is the best.

That depends on the device, the backbone and the image size, so `--batch-size auto` measures it (`probe`).
"""

from __future__ import annotations

import math
import time
from typing import Protocol

import numpy as np

from shard_embedder.pipeline.embedding.embedder import Runner

SMALLEST, LARGEST = 16, 1024
# Less is noise, and a larger batch has its price: memory, and padding where a part ends.
GAIN = 0.03
# Beside a batch the device has to hold what it decodes, and memory that falls to pieces.
_MEMORY_SHARE = 0.75
# Pixels of a batch: on a GPU bound by the memory of the host that three of them pin, on a CPU by what a backbone
# needs for a pixel, which is some hundred bytes.
_MAX_PIXELS = {"cuda": 80 * 2**20, "cpu": 8 * 2**20}
_MEASURE_S = 20.0
# A compiled network takes ten seconds and more for each size, so few are tried.
_MEASURE_COMPILED_S = 120.0
_NUM_COMPILED = 3
_STEP_S = 1.0
_NUM_IMAGES = 16


class ResizableRunner(Runner, Protocol):
    """A runner whose batch size can be changed, and falls where a batch does not fit into memory."""

    def use_batches_of(self, batch_size: int) -> None:
        """Compute in batches of so many images from now on."""
        ...

    def memory_share(self) -> float:
        """Of the device's memory, what was held at most."""
        ...


def best(rates: dict[int, float]) -> int:
    """The smallest batch size whose images/s are within `GAIN` of the best."""
    return min(size for size, rate in rates.items() if rate >= (1 - GAIN) * max(rates.values()))


def of_part(size: int, batch_s: float, part_rows: int) -> float:
    """Images/s where a batch takes `batch_s`: batches end with the part, and the last is padded."""
    return part_rows / (math.ceil(part_rows / size) * batch_s)


def is_flat(rates: list[float]) -> bool:
    """Whether the last two of the images/s are no more than `GAIN` above the best before them."""
    return len(rates) > 2 and max(rates[-2:]) <= (1 + GAIN) * max(rates[:-2])


def ladder(part_rows: int, crop: tuple[int, int], device: str, *, compiled: bool = False) -> list[int]:
    """Batch sizes to try: powers of two, up to one that holds a part, or all the pixels that a batch may have.

    Of a `compiled` network they are the largest, the quarter of it, and the quarter of that.
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
) -> dict[int, float]:
    """Images/s of a part by batch size, its padding included, of as many of `sizes` as are worth it.

    It ends where a batch does not fit into memory, where two larger ones have brought no more than `GAIN`, and
    before `limit_s` seconds are over: nothing is begun that would last longer, by the time of what went before.
    A `compiled` runner compiles for each size that it is given, and records a graph in the second call.
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
        # First calls, which make ready, and one that counts.
        if ready_s + (num_first + 1) * size * image_s > deadline - time.perf_counter():
            break
        try:
            runner.use_batches_of(size)
            first_s = sum(seconds(size) for _ in range(num_first))
            batch_s = seconds(size)
            ready_s = max(0.0, first_s - num_first * batch_s)
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
