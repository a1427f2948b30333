"""The most memory that processes have had, each and together, as told at the end of a session."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

_EVERY_S = 2.0
# What all of the processes of `make test` may take together: an ordinary laptop has so much to spare.
MOST_MIB = 4096


def peak_memory_mib(pid: int | str = "self") -> int:
    """The most memory a process has had; `ru_maxrss` would count that of the process that started it."""
    return _field_mib(f"/proc/{pid}/status", "VmHWM")


def _field_mib(path: str, name: str) -> int:
    return int(next(line for line in Path(path).read_text().splitlines() if line.startswith(name)).split()[1]) // 1024


class Peaks:
    """The peak memory of the test processes, as a plugin of the one that starts the others.

    Each process's own is resident memory, of which some 0.5 GB are libraries that all of them share. Where there are
    several, they are looked at together every few seconds, by proportional set size: what is shared counts once. More
    than `MOST_MIB` fails the session.
    """

    def __init__(self) -> None:
        self.mib: list[int] = []
        self.together_mib = 0
        self._pids = {os.getpid()}
        self._ended = threading.Event()

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
        if self.together_mib > MOST_MIB:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        each = " + ".join(map(str, self.mib))
        together = f", together {self.together_mib} MiB" if self.together_mib else ""
        terminalreporter.write_line(f"peak memory of the test processes: {each} MiB{together}")
        if self.together_mib > MOST_MIB:
            terminalreporter.write_line(f"FAILED: test processes must take at most {MOST_MIB} MiB together")
