"""Progress of a command: a live bar on a terminal, elsewhere a line every 30 s."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from shard_embedder.pipeline.core.progress import Progress
from shard_embedder.pipeline.core.redact import show

LINE_EVERY_S = 30.0


class _PlainConsole(rich.console.Console):
    """Prints everything through `show`, which strikes out secrets."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts without secrets and without control characters."""
        super().print(*(show(item) if isinstance(item, str) else item for item in objects), **options)


def plain_console(*, stderr: bool = False) -> rich.console.Console:
    """A console that prints names literally: it interprets no markup and breaks no line."""
    return _PlainConsole(highlight=False, soft_wrap=True, markup=False, emoji=False, stderr=stderr)


@contextlib.contextmanager
def show_progress(out: rich.console.Console, line_every_s: float = LINE_EVERY_S) -> Iterator[Progress]:
    """A function that shows progress on `out` while the block runs."""
    if out.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with rich.progress.Progress(*columns, console=out, transient=True) as bar:
            tasks: dict[str, rich.progress.TaskID] = {}

            def update_bar(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what)
                bar.update(tasks[what], completed=done, total=total)

            yield update_bar
        return
    last_line = time.monotonic()

    def print_line(what: str, done: int, total: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line >= line_every_s:
            last_line = time.monotonic()
            out.print(f"{done:,} of {total:,} {what}")

    yield print_line
