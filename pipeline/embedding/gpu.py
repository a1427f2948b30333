"""One CUDA device: what orders work on it, how busy it was, and what its errors mean."""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager

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


class Gpu:
    """A CUDA device of this process. `tests/embedding/simulated_gpu.py` has one that is as hostile as CUDA may be."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._busy_s = 0.0
        self._turn = threading.Lock()

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

    def add_busy(self, began: torch.cuda.Event, ended: torch.cuda.Event) -> None:
        """Count the time between two timed events of one stream, both of which have happened."""
        with self._turn:
            self._busy_s += began.elapsed_time(ended) / 1000.0

    @property
    def busy_s(self) -> float:
        """Seconds in which it computed, by its own clock."""
        with self._turn:
            return self._busy_s

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
