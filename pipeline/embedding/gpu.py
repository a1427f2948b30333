"""One CUDA device: what orders work on it, how busy it was, and what its errors mean."""

from __future__ import annotations

import os
import threading
import time
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

# How torch, cuDNN and cuBLAS say that memory ran out, of the device or the host. A library that finds none for
# itself speaks of an internal error, of a handle that it cannot make, or of no way to compute at all.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "STATUS_NOT_INITIALIZED",
    "unable to find an engine",
)

# CUDA gives the time between two events as float32: of milliseconds, which count from an event made so long ago.
_ORIGIN_S = 60.0
# Spans end nearly in order: one that comes late meets some that are still known.
_MOST_APART = 64


class _Origin(NamedTuple):
    """An event that has happened, at `ms` since the first of them."""

    event: torch.cuda.Event
    ms: float
    made_s: float


class Span(NamedTuple):
    """Work on a device between two timed events, of which the second is recorded when all is launched."""

    since: _Origin
    began: torch.cuda.Event
    ended: torch.cuda.Event


class _Union:
    """The length of what intervals cover together."""

    def __init__(self) -> None:
        self._apart: list[tuple[float, float]] = []
        self._before = 0.0

    def add(self, start: float, end: float) -> None:
        apart = []
        for one_start, one_end in self._apart:
            if one_end < start or one_start > end:
                apart.append((one_start, one_end))
            else:
                start, end = min(start, one_start), max(end, one_end)
        self._apart = sorted([*apart, (start, end)])
        if len(self._apart) > _MOST_APART:
            first_start, first_end = self._apart.pop(0)
            self._before += first_end - first_start

    @property
    def length(self) -> float:
        return self._before + sum(end - start for start, end in self._apart)


class Gpu:
    """A CUDA device of this process. `tests/embedding/simulated_gpu.py` has one that is as hostile as CUDA may be."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._busy = _Union()
        self._turn = threading.Lock()
        self._since: _Origin | None = None

    def stream(self) -> torch.cuda.Stream:
        """A stream of its own."""
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def current_stream(self) -> torch.cuda.Stream:
        """The stream that this thread computes in."""
        return torch.cuda.current_stream(self.device)

    def using(self, stream: torch.cuda.Stream) -> AbstractContextManager[object]:
        """Launch in `stream` meanwhile."""
        return torch.cuda.stream(stream)

    def event(self, *, timed: bool = False) -> torch.cuda.Event:
        """An event. Whoever waits for it keeps no core busy, which decodes meanwhile."""
        return torch.cuda.Event(enable_timing=timed, blocking=True)  # type: ignore[no-untyped-call]

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to by itself."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def synchronize(self) -> None:
        """Wait for all that was launched."""
        torch.cuda.synchronize(self.device)

    def free_cache(self) -> None:
        """Give back the memory that torch keeps for later."""
        torch.cuda.empty_cache()

    @property
    def total_bytes(self) -> int:
        """Its memory."""
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    @property
    def most_held_bytes(self) -> int:
        """What torch has held of it at most."""
        return torch.cuda.max_memory_reserved(self.device)

    def span(self) -> Span:
        """A stretch of work that begins here, in the stream that this thread launches in."""
        with self._turn:
            since = self._since
            if since is None or time.monotonic() - since.made_s > _ORIGIN_S:
                event = self.event(timed=True)
                event.record()
                event.synchronize()
                ms = 0.0 if since is None else since.ms + since.event.elapsed_time(event)
                since = self._since = _Origin(event, ms, time.monotonic())
        began = self.event(timed=True)
        began.record()
        return Span(since, began, self.event(timed=True))

    def add_busy(self, span: Span) -> None:
        """Count a span that has ended. Time that several have in common counts once."""
        since = span.since
        with self._turn:
            self._busy.add(*(since.ms + since.event.elapsed_time(event) for event in (span.began, span.ended)))

    @property
    def busy_s(self) -> float:
        """Seconds in which it was at work, by its own clock."""
        with self._turn:
            return self._busy.length / 1000.0

    def is_broken(self) -> bool:
        """Whether this process can use it no more: after an illegal access, say, CUDA fails each call with that."""
        try:
            self.synchronize()
        except RuntimeError:
            return True
        return False


def lacks_memory(error: RuntimeError) -> bool:
    """Whether the device or the host had too little memory, so that a smaller batch may fit."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def use_exact_fp32() -> None:
    """Compute fp32 in fp32 from now on, in this process: TF32 rounds what goes in to 10 bits, as fp16 does.

    By default cuDNN's convolutions do. NVIDIA's images ask for it in matrix products, too, by
    `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE`, which torch obeys when it is imported.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    # `allow_tf32` alone would still follow `torch.backends.fp32_precision`.
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    # cuBLAS and cuDNN read it when they are first used, and may rate it above what torch asks for.
    if os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "0":
        del os.environ["NVIDIA_TF32_OVERRIDE"]
