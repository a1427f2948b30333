"""Peak memory of processes, and of all test processes together at the end of a session."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

_EVERY_S = 2.0
# The limit for all test processes together, so that the tests run on an ordinary laptop.
MOST_MIB = 4096


def peak_memory_mib(pid: int | str = "self") -> int:
    """The most memory that a process has had. `ru_maxrss` would include that of the process that started it."""
    return _field_mib(f"/proc/{pid}/status", "VmHWM")


def _field_mib(path: str, name: str) -> int:
    return int(next(line for line in Path(path).read_text().splitlines() if line.startswith(name)).split()[1]) // 1024


class Peaks:
    """Reports the peak memory of the test processes. A plugin of the process that starts the others.

    Each process's figure is resident memory, of which about 0.5 GB are libraries that all of them share. Together
    they are sampled every few seconds by proportional set size, which counts shared memory once. The session fails
    when that exceeds `MOST_MIB`; but not where there is a GPU, whose libraries take gigabytes of each process.
    """

    def __init__(self) -> None:
        self.mib: list[int] = []
        self.together_mib = 0
        self._pids = {os.getpid()}
        self._ended = threading.Event()
        self._most_mib = None if Path("/dev/nvidiactl").exists() else MOST_MIB

    def _take_too_much(self) -> bool:
        return self._most_mib is not None and self.together_mib > self._most_mib

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY_S):
            total = 0
            for pid in tuple(self._pids):
                with suppress(OSError):  # it has ended
                    total += _field_mib(f"/proc/{pid}/smaps_rollup", "Pss:")
            self.together_mib = max(self.together_mib, total)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self) -> None:
        if len(self._pids) == 1:
            threading.Thread(target=self._watch, daemon=True).start()
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        self._pids |= {int(pid) for pid in children}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self.mib.append(getattr(node, "workeroutput", {}).get("peak_mib", 0))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self._ended.set()
        self.mib.append(peak_memory_mib())
        if self._take_too_much():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        each = " + ".join(map(str, self.mib))
        together = f", together {self.together_mib} MiB" if self.together_mib else ""
        terminalreporter.write_line(f"peak memory of the test processes: {each} MiB{together}")
        if self._take_too_much():
            terminalreporter.write_line(
                f"FAILED: test processes must take at most {MOST_MIB} MiB together, took {self.together_mib}"
            )
