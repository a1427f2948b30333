"""Axes of charts, with ticks at round numbers. The shapes are drawn by `templates/chart.html.j2`."""

from __future__ import annotations

import math
from typing import NamedTuple

_EPSILON = 1e-9


class Axis(NamedTuple):
    """One axis: what it shows with its unit, from where to where, and where its ticks are."""

    label: str
    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def along(self, value: float) -> str:
        """Where a value lies from the left of an SVG that is 1000 wide."""
        return f"{1000 * self.share(value):.1f}"

    def down(self, value: float) -> str:
        """Where a value lies from the top of an SVG that is 1000 high."""
        return f"{1000 - 1000 * self.share(value):.1f}"


def axis(label: str, low: float, high: float, most: int = 6, *, tight: bool = False) -> Axis:
    """An axis with ticks at round numbers, at most `most` + 1; it ends at ticks unless it is `tight`.

    Raises:
        ValueError: `low` is not below `high`.
    """
    if not low < high:
        raise ValueError(f"an axis must go up, got {low} to {high}")
    step = round_step((high - low) / most)
    first, last = math.floor(low / step + _EPSILON), math.ceil(high / step - _EPSILON)
    ticks = [number * step for number in range(first, last + 1)]
    if tight:
        slack = _EPSILON * (high - low)
        return Axis(label, low, high, [tick for tick in ticks if low - slack <= tick <= high + slack])
    return Axis(label, ticks[0], ticks[-1], ticks)


def round_step(step: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(times * power for times in (1, 2, 5, 10) if times * power >= step * (1 - _EPSILON))


def number(value: float) -> str:
    """A number as people write it: thousands apart, and no digits that say nothing."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"
