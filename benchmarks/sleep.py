"""A backbone that sleeps for as long as a device would compute. Actors import this file, and little else with it."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from shard_embedder.pipeline.embedding.embedder import Runner
from shard_embedder.pipeline.embedding.network import Network, Placement

_START_S = 120.0


@dataclass(frozen=True)
class Start:
    """Where actors wait for one another, so that all begin at once however long each took to start."""

    folder: Path
    num_actors: int

    def wait(self) -> None:
        """Wait until as many processes as there are actors have come here, one after the other on a busy machine.

        Raises:
            TimeoutError: for 120 s none came.
        """
        (self.folder / str(os.getpid())).touch()
        there, deadline = 0, 0.0
        while there < self.num_actors:
            before, there = there, len(list(self.folder.iterdir()))
            if there > before:
                deadline = time.monotonic() + _START_S
            elif time.monotonic() > deadline:
                raise TimeoutError(
                    f"{there} of {self.num_actors} actors had something to embed, {_START_S:.0f} s long"
                )
            time.sleep(0.02)


@dataclass(frozen=True)
class SleepRunner:
    """Embeds an image as [4]: its process, and when its part came, began and ended, in seconds after `epoch`."""

    gpu: ClassVar[None] = None

    images_per_s: float
    epoch: float
    start: Start | None = None
    batch_size: int = 1
    turn: threading.Lock = field(default_factory=threading.Lock)

    def embed(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Sleep for as long as `rows` take; before the first, until all actors are there."""
        if self.start is not None:
            self.start.wait()
        came = time.time() - self.epoch
        with self.turn:
            begin = time.time() - self.epoch
            time.sleep(len(rows) / self.images_per_s)
            times = came, begin, time.time() - self.epoch
        return np.tile(np.array([os.getpid(), *times], np.float32), (len(rows), 1))


@dataclass(frozen=True)
class SleepSource:
    """Makes runners that sleep; it needs no weights."""

    has_own_batch_size: ClassVar[bool] = True

    images_per_s: float
    epoch: float
    start: Start | None = None

    def runner(self, network: Network, placement: Placement) -> Runner:
        """Loads nothing, whatever the device."""
        return SleepRunner(self.images_per_s, self.epoch, self.start)
