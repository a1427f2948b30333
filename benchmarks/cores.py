"""Core-seconds of a process and of all below it, as they pass. Linux only.

Unlike images/s they hardly depend on what else runs on the machine.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from benchmarks.memory import processes

_LOOK_EVERY_S = 0.5
_TICKS = os.sysconf("SC_CLK_TCK")
_WORKER, _OTHER = "worker", "other"
# The tasks of stages, and what waits for one; Ray's own actors and agents have other names.
_WORKERS = ("ray::MapBatches", "ray::IDLE")

# When it was, and the core-seconds that each kind of process had until then.
Look = tuple[float, dict[str, float]]


class CoreWatch:
    """Looks at this process and at all below it, from a thread, while its block runs."""

    def __init__(self) -> None:
        self.looks: list[Look] = []
        self._seen: dict[int, float] = {}
        self._totals: dict[str, float] = defaultdict(float)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> CoreWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_LOOK_EVERY_S):
            for pid, name in processes(os.getpid()):
                with suppress(OSError):
                    seconds = _core_seconds(pid)
                    kind = _WORKER if name.startswith(_WORKERS) else _OTHER
                    self._totals[kind] += seconds - self._seen.get(pid, 0.0)
                    self._seen[pid] = seconds
            self.looks.append((time.time(), dict(self._totals)))


def cores_in_use(looks: list[Look], begin: float, end: float) -> dict[str, float]:
    """How many cores `worker` and `other` processes used between two times, in the mean; empty without two looks."""
    within = [look for look in looks if begin <= look[0] <= end]
    if len(within) < 2:
        return {}
    (since, before), (until, after) = within[0], within[-1]
    return {kind: (after.get(kind, 0.0) - before.get(kind, 0.0)) / (until - since) for kind in (_WORKER, _OTHER)}


def _core_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
