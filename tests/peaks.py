"""The most memory that processes have had, and that of each test process at the end of a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def peak_memory_mib(pid: int | str = "self") -> int:
    """The most memory a process has had; `ru_maxrss` would count that of the process that started it."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


class Peaks:
    """The peak memory of each test process, as a plugin of the one that starts the others."""

    def __init__(self) -> None:
        self.mib: list[int] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        self.mib.append(getattr(node, "workeroutput", {}).get("peak_mib", 0))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        self.mib.append(peak_memory_mib())

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        each = " + ".join(map(str, self.mib))
        terminalreporter.write_line(f"peak memory of the test processes: {each} MiB")
