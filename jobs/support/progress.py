"""Progress of a job that reads an output: a live bar on a terminal, a line every 30 s elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 30.0


def plain_console(*, stderr: bool = False) -> rich.console.Console:
    """Names are shown as they are: none is markup, and no line is broken."""
    return rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=stderr)


class ShownProgress:
    """Called with what is counted, how many are done, and of how many."""

    def __init__(self, out: rich.console.Console) -> None:
        self._out = out
        self._bar: Progress | None = None
        self._last_line = time.monotonic()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show it while the block runs."""
        if not self._out.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._out, transient=True) as self._bar:
            yield
        self._bar = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if self._bar is not None:
            task = next((task.id for task in self._bar.tasks if task.description == what), None)
            self._bar.update(self._bar.add_task(what) if task is None else task, completed=done, total=total)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._out.print(f"{done} of {total} {what}")
