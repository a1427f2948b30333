"""GPUs that Ray is told of and that are not there.

What computes on them loads neither torch nor Ray Data, so that it starts soon.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shard_embedder.pipeline.embedding.network import Network, Placement

NODE = "EMBED_TEST_NODE"
LAUNCH = "CUDA error: unspecified launch failure\nSearch for it in the manual."
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
RAISES, DIES, BREAKS_LATER = "raises", "dies", "breaks later"
_BREAK_S = 60.0


@dataclass(frozen=True)
class DeclaredGpu:
    """Embeds all images as ones. What breaks does so in its first part, and until then the others wait in theirs."""

    num_features: int
    part_rows: int
    breaks: bool
    broken: Path | None
    batch_size: ClassVar[int] = 32
    gpu: ClassVar[None] = None

    def embed(self, pixels: Any, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        is_part = len(rows) == self.part_rows
        if is_part and self.broken is not None:
            if self.breaks:
                self.broken.touch()
                raise RuntimeError(LAUNCH)
            deadline = time.monotonic() + _BREAK_S
            while not self.broken.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        return np.ones((len(rows), self.num_features), np.float32)


@dataclass(frozen=True)
class DeclaredGpus:
    """Runners for a cluster whose GPUs, as `a1` of the node started as `a`, have these `faults`."""

    has_own_batch_size: ClassVar[bool] = True

    num_features: int
    part_rows: int
    faults: Mapping[str, str]
    broken: Path

    def runner(self, network: Network, placement: Placement) -> DeclaredGpu:
        assert placement.device == "cuda"
        fault = self.faults.get(os.environ[NODE] + os.environ["CUDA_VISIBLE_DEVICES"])
        if fault == DIES:
            os._exit(1)
        if fault == RAISES or (fault == BREAKS_LATER and self.broken.exists()):
            raise RuntimeError(f"{NO_KERNEL}\nSearch for it in the manual.")
        waits_for = self.broken if BREAKS_LATER in self.faults.values() else None
        return DeclaredGpu(self.num_features, self.part_rows, fault == BREAKS_LATER, waits_for)
