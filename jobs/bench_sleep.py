"""A backbone that sleeps for as long as a device would compute. Actors import this file, and little else with it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.decode import Preprocess
from pipeline.embedder import Runner


@dataclass(frozen=True)
class SleepRunner:
    """Embeds an image as [3]: its process, and when its batch began and ended, in seconds after `epoch`."""

    images_per_s: float
    epoch: float

    def embed(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Sleep for as long as `rows` take."""
        begin = time.time() - self.epoch
        time.sleep(len(rows) / self.images_per_s)
        return np.tile(np.array([os.getpid(), begin, time.time() - self.epoch], np.float32), (len(rows), 1))


@dataclass(frozen=True)
class SleepSource:
    """Makes runners that sleep; it needs no weights."""

    has_own_batch_size: ClassVar[bool] = True

    images_per_s: float
    epoch: float

    def runner(
        self, *, backbone: str, features: str, preprocess: Preprocess, normalize: bool, precision: str, device: str,
        batch_size: int | None, num_threads: int | None, compiled: bool = False,
    ) -> Runner:  # fmt: skip
        """Loads nothing, whatever the device."""
        return SleepRunner(self.images_per_s, self.epoch)

    def share(self) -> SleepSource:
        """Itself."""
        return self
