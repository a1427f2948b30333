"""A GPU that does not exist, on which the runner's own code runs.

It has streams, events, device memory and pinned memory as CUDA and torch have them, and is as hostile as these may
be. What is launched runs as late as the order of streams and events allows, or at random, by a seed. A copy reads its
source when it runs. Memory that is freed is handed out again at once, and filled with poison.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from shard_embedder.pipeline.embedding.gpu import Gpu
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import TorchRunner

WAITS = ("wait_stream", "record_stream", "fetch", "buffer")
_KERNEL_MS, _COPY_MS = 5.0, 1.0
_POISON = 0xEE
_DTYPES = {torch.uint8: np.uint8, torch.float32: np.float32}


class Done:
    """A point in a stream, and when the device came to it."""

    def __init__(self) -> None:
        self.at_ms: float | None = None

    def __bool__(self) -> bool:
        return self.at_ms is not None


@dataclass
class Work:
    """What a stream does next, as soon as all that it waits for is done."""

    run: Callable[[], object]
    waits_for: Done | None
    takes_ms: float
    done: Done = field(default_factory=Done)


class SimulatedGpu(Gpu):
    """`eagerness` is how likely the device does something between two calls of the host; `lacks` names what it does
    not do though it is asked to, of `WAITS`: as if the runner had not asked.
    """

    def __init__(self, seed: int = 0, eagerness: float = 0.0, *, total_bytes: int = 0, lacks: str = "") -> None:
        super().__init__(torch.device("cuda"))
        self.lacks = lacks
        self.now_ms = 0.0
        self.pinned_errors: list[RuntimeError] = []
        self._total_bytes = total_bytes
        self._random, self._eagerness = random.Random(seed), eagerness
        self._lock = threading.RLock()
        self._streams: list[Stream] = []
        self._of_thread = threading.local()
        self._default = self.stream()
        self._free: dict[tuple[int, int], list[tuple[Any, list[Done]]]] = {}
        self._free_pinned: list[tuple[Any, list[Done]]] = []
        self._broken: RuntimeError | None = None

    # As `Gpu` has them.

    def stream(self) -> Any:
        stream = Stream(self, len(self._streams))
        self._streams.append(stream)
        return stream

    def current_stream(self) -> Any:
        return getattr(self._of_thread, "stream", self._default)

    @contextmanager
    def using(self, stream: Any) -> Iterator[None]:
        before, self._of_thread.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def event(self, *, timed: bool = False) -> Any:
        return Event(self, timed)

    def pinned(self, shape: Any, dtype: torch.dtype) -> Any:
        if self.pinned_errors:
            raise self.pinned_errors.pop(0)
        return PinnedTensor(self, shape, dtype)

    def synchronize(self) -> None:
        for stream in self._streams:
            stream.synchronize()

    def free_cache(self) -> None:
        with self._lock:
            self._free.clear()

    @property
    def total_bytes(self) -> int:
        return self._total_bytes

    # The device.

    def break_down(self, error: RuntimeError) -> RuntimeError:
        """From now on every call fails with `error`, as after an access to memory that is not there."""
        self._broken = error
        return error

    def launch(
        self, stream: Stream, run: Callable[[], object], *, waits_for: Done | None = None, takes_ms: float = 0.0
    ) -> Done:
        if self._broken is not None:
            raise self._broken
        work = Work(run, waits_for, takes_ms)
        with self._lock:
            stream.queue.append(work)
            while self._random.random() < self._eagerness and self._do_something():
                pass
        return work.done

    def wait_for(self, done: Done | None) -> None:
        if self._broken is not None:
            raise self._broken
        # A thread that is to wait may be late, and others go on.
        time.sleep(self._random.choice((0.0, 0.0005)))
        with self._lock:
            while done is not None and not done:
                assert self._do_something(), "a deadlock: someone waits, and nothing can run"

    def _do_something(self) -> bool:
        ready = [stream for stream in self._streams if stream.queue and _may_run(stream.queue[0])]
        if ready:
            work = self._random.choice(ready).queue.popleft()
            work.run()
            self.now_ms += work.takes_ms
            work.done.at_ms = self.now_ms
        return bool(ready)

    # Memory.

    def allocate(self, stream: Stream, num_bytes: int, writer: Stream | None = None) -> Any:
        """Of the device: what the same stream has freed, if the streams that are recorded are done with it.

        `writer` writes to it first, where that is another stream.
        """
        with self._lock:
            freed = self._free.setdefault((id(stream), num_bytes), [])
            found = next((entry for entry in reversed(freed) if all(entry[1])), None)
            memory = np.empty(num_bytes, np.uint8) if found is None else found[0]
            if found is not None:
                freed[:] = [entry for entry in freed if entry is not found]
        # Whoever has it now may write to it as early as this.
        self.launch(writer or stream, lambda: memory.fill(_POISON))
        return memory

    def free(self, stream: Stream, memory: Any, recorded: list[Stream]) -> None:
        if self._broken is not None:
            return
        with self._lock:
            waits = [other.mark() for other in recorded]
            self._free.setdefault((id(stream), memory.nbytes), []).append((memory, waits))

    def allocate_pinned(self, num_bytes: int) -> Any:
        with self._lock:
            for index, (memory, copies) in enumerate(self._free_pinned):
                if memory.nbytes == num_bytes and all(copies):
                    del self._free_pinned[index]
                    memory.fill(_POISON)
                    return memory
        return np.full(num_bytes, _POISON, np.uint8)

    def free_pinned(self, memory: Any, copies: list[Done]) -> None:
        with self._lock:
            self._free_pinned.append((memory, copies))


def _may_run(work: Work) -> bool:
    return work.waits_for is None or bool(work.waits_for)


class Stream:
    def __init__(self, gpu: SimulatedGpu, number: int) -> None:
        self._gpu, self._number = gpu, number
        self.queue: deque[Work] = deque()

    def mark(self) -> Done:
        return self._gpu.launch(self, lambda: None)

    def synchronize(self) -> None:
        if self._gpu.lacks != f"synchronize {self._number}":
            self._gpu.wait_for(self.mark())

    def wait_stream(self, other: Stream) -> None:
        if self._gpu.lacks != "wait_stream":
            self._gpu.launch(self, lambda: None, waits_for=other.mark())


class Event:
    def __init__(self, gpu: SimulatedGpu, timed: bool) -> None:
        self._gpu, self._timed = gpu, timed
        self._done: Done | None = None

    def record(self) -> None:
        self._done = self._gpu.current_stream().mark()

    def synchronize(self) -> None:
        # The runner times batches, which it waits for to fetch, and nothing else.
        if self._gpu.lacks != ("fetch" if self._timed else "buffer"):
            self._gpu.wait_for(self._done)

    def elapsed_time(self, end: Event) -> float:
        if self._gpu.lacks == "fetch":
            return 0.0
        assert self._timed
        assert end._timed
        return end._done.at_ms - self._done.at_ms


class DeviceTensor:
    """Its bytes are there when its stream has come so far."""

    def __init__(self, gpu: SimulatedGpu, shape: Any, dtype: torch.dtype) -> None:
        self.gpu, self.shape, self.dtype = gpu, tuple(shape), dtype
        self._stream, self._recorded = gpu.current_stream(), []
        self._memory = gpu.allocate(self._stream, _num_bytes(self.shape, dtype))
        self.array = self._memory.view(_DTYPES[dtype]).reshape(self.shape)

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            self.gpu.free(self._stream, self._memory, self._recorded)

    def record_stream(self, stream: Stream) -> None:
        if stream is not self._stream and self.gpu.lacks != "record_stream":
            self._recorded.append(stream)

    def new_zeros(self, shape: Any) -> DeviceTensor:
        zeros = DeviceTensor(self.gpu, shape, self.dtype)
        array = zeros.array
        self.gpu.launch(self.gpu.current_stream(), lambda: array.fill(0), takes_ms=_COPY_MS)
        return zeros

    def __getitem__(self, where: slice) -> Any:
        return self.array[where]

    def __setitem__(self, where: slice, values: Any) -> None:
        array = self.array
        self.gpu.launch(self.gpu.current_stream(), lambda: array.__setitem__(where, values), takes_ms=_COPY_MS)


class PinnedTensor:
    """Freed, it is handed out again when the copies that were launched are done."""

    def __init__(self, gpu: SimulatedGpu, shape: Any, dtype: torch.dtype) -> None:
        self._gpu, self.shape, self.dtype = gpu, tuple(shape), dtype
        self._memory, self._copies = gpu.allocate_pinned(_num_bytes(self.shape, dtype)), []
        self._array = self._memory.view(_DTYPES[dtype]).reshape(self.shape)

    def __del__(self) -> None:
        self._gpu.free_pinned(self._memory, self._copies)

    def numpy(self) -> Any:
        return self._array

    def to(self, device: torch.device, *, non_blocking: bool) -> DeviceTensor:
        there = DeviceTensor(self._gpu, self.shape, self.dtype)
        self._copy(there.array, self._array, non_blocking)
        return there

    def copy_(self, source: DeviceTensor, *, non_blocking: bool) -> None:
        self._copy(self._array, source.array, non_blocking)

    def _copy(self, target: Any, source: Any, non_blocking: bool) -> None:
        stream = self._gpu.current_stream()
        done = self._gpu.launch(stream, lambda: target.__setitem__(slice(None), source), takes_ms=_COPY_MS)
        self._copies.append(done)
        if not non_blocking:
            self._gpu.wait_for(done)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return int(np.prod(shape)) * np.dtype(_DTYPES[dtype]).itemsize


class SimulatedNetwork:
    """An image to its sum, its first value and how many it has, in two kernels with memory between them.

    `errors` are raised in place of what the calls of these numbers would do; more than `room` images are refused.
    """

    def __init__(
        self, gpu: SimulatedGpu, *, width: int = 3, room: int = 2**31, errors: dict[int, RuntimeError] | None = None
    ) -> None:
        self._gpu, self._width, self._room, self._errors = gpu, width, room, errors or {}
        self.num_calls = 0
        self.sizes: list[int] = []

    def as_precision(self, dtype: torch.dtype) -> SimulatedNetwork:
        return self

    def eval(self) -> SimulatedNetwork:
        return self

    def fused(self, crop: tuple[int, int]) -> SimulatedNetwork:
        return self

    def to(self, device: torch.device) -> SimulatedNetwork:
        return self

    def __call__(self, images: DeviceTensor) -> DeviceTensor:
        self.num_calls += 1
        self.sizes.append(images.shape[0])
        if self.num_calls in self._errors:
            raise self._errors[self.num_calls]
        if images.shape[0] > self._room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        pixels = images.array.reshape(len(images.array), -1)
        between = DeviceTensor(self._gpu, pixels.shape, torch.float32)
        features = DeviceTensor(self._gpu, (len(pixels), self._width), torch.float32)
        values, found = between.array, features.array
        stream = self._gpu.current_stream()
        self._gpu.launch(stream, lambda: values.__setitem__(slice(None), pixels), takes_ms=_KERNEL_MS)
        self._gpu.launch(stream, lambda: found.__setitem__(slice(None), features_of(values, self._width)),
                         takes_ms=_KERNEL_MS)  # fmt: skip
        return features


def features_of(pixels: Any, width: int = 3) -> Any:
    """What `SimulatedNetwork` gives for uint8 [N, ...]."""
    values = pixels.reshape(len(pixels), -1).astype(np.float32)
    features = np.zeros((len(values), width), np.float32)
    features[:, 0], features[:, 1], features[:, 2] = values.sum(1), values[:, 0], values.shape[1]
    return features


def simulated_runner(network: SimulatedNetwork, crop: tuple[int, int], batch_size: int | None = 8) -> TorchRunner:
    placement = Placement(device="cuda", precision="bf16", batch_size=batch_size)
    return TorchRunner(network, crop, placement, network._gpu)


LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


@dataclass(frozen=True)
class BreakingSource:
    """Makes runners of which the first `num_broken` lose their GPU at the batch of number `at`, wherever they are.

    `folder` holds a file for each runner that was made.
    """

    has_own_batch_size: ClassVar[bool] = True

    folder: Path
    at: int
    num_broken: int
    width: int

    def runner(self, network: Network, placement: Placement) -> TorchRunner:
        number = len(list(self.folder.iterdir()))
        (self.folder / str(number)).touch()
        gpu = SimulatedGpu(seed=number)
        losing = LosingNetwork(gpu, self.at if number < self.num_broken else 0, self.width)
        return simulated_runner(losing, network.preprocess.crop, batch_size=1024)


class LosingNetwork(SimulatedNetwork):
    """Breaks its GPU at one of its batches."""

    def __init__(self, gpu: SimulatedGpu, at: int, width: int) -> None:
        super().__init__(gpu, width=width)
        self._at = at

    def __call__(self, images: DeviceTensor) -> DeviceTensor:
        if self.num_calls + 1 == self._at:
            raise self._gpu.break_down(torch.AcceleratorError(LOST))
        return super().__call__(images)
