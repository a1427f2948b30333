"""Items in groups that are handled at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T")


def grouped(
    items: Iterable[_T], size: Callable[[_T], int], most: int, most_items: int | None = None
) -> Iterator[list[_T]]:
    """The items in order, in groups whose sizes add up to `most` at most; a larger item is a group of its own."""
    group: list[_T] = []
    total = 0
    for item in items:
        more = size(item)
        if group and (len(group) == most_items or total + more > most):
            yield group
            group, total = [], 0
        group.append(item)
        total += more
    if group:
        yield group
