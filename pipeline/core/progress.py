"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with what is counted, how many are done, and how many there are.
Progress = Callable[[str, int, int], None]


def no_progress(what: str, done: int, total: int) -> None:
    """Show nothing."""
