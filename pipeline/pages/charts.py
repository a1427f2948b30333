"""Charts as HTML: shapes in an SVG that stretches, and labels beside it in the page's own text size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.pages.html import safe

_EPSILON = 1e-9
STYLE = """
.plot { display: grid; grid-template-columns: max-content 1fr; grid-template-rows: auto 1fr auto auto;
  margin: .6rem 0 0; column-gap: .5rem; font-size: 12px; line-height: 1; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.plot .ylabel, .plot .xlabel { line-height: 1.25; }
.plot .ylabel { grid-column: 1 / 3; padding-bottom: .6rem; }
.plot .ys { grid-column: 1; grid-row: 2; display: grid; height: 100%; }
.plot .ys span { grid-area: 1 / 1; align-self: start; justify-self: end; position: relative;
  transform: translateY(-50%); }
.plot .area { grid-column: 2; grid-row: 2; position: relative; height: var(--height);
  border-bottom: 1px solid var(--soft); border-left: 1px solid var(--line); }
.plot .area > svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot .xs { grid-column: 2; grid-row: 3; position: relative; height: 1.3rem; }
.plot .xs span { position: absolute; top: .4rem; transform: translateX(-50%); white-space: nowrap; }
.plot .xlabel { grid-column: 2; grid-row: 4; text-align: right; padding-top: .3rem; }
.grid { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.fill { fill: var(--data); }
.mark { stroke: var(--accent); stroke-width: 1.5; stroke-dasharray: 4 3; vector-effect: non-scaling-stroke; }
.dots { stroke: var(--data); stroke-linecap: round; stroke-width: 4; vector-effect: non-scaling-stroke;
  opacity: .5; }
@media (max-width: 560px) { .plot .xs span:nth-child(even) { display: none; } }
"""


class Axis(NamedTuple):
    """One axis: what it shows with its unit, from where to where, and where its ticks are."""

    label: str
    low: float
    high: float
    ticks: list[float]

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


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


def plot(x: Axis, y: Axis, shapes: str, height: str, alternative: str, over: str = "") -> str:
    """A chart of `shapes`, SVG in a square of 1000 by 1000 with y downwards, with `over` (HTML) on top of it."""
    grid = "".join(
        f'<line class="grid" x1="0" x2="1000" y1="{_down(y, tick)}" y2="{_down(y, tick)}"/>' for tick in y.ticks
    )
    names = [(y.share(tick), number(tick)) for tick in y.ticks]
    return frame(x, y.label, names, grid + shapes, height, alternative, over)


def frame(
    x: Axis, y_label: str, y_names: Sequence[tuple[float, str]], shapes: str, height: str, alternative: str, over: str
) -> str:
    """As `plot`, with any texts along the upright axis: each from 0 (bottom) to 1 with what stands there."""
    ys = "".join(f'<span style="top:{100 - 100 * share:.2f}%">{safe(name)}</span>' for share, name in y_names)
    xs = "".join(f'<span style="left:{100 * x.share(tick):.2f}%">{number(tick)}</span>' for tick in x.ticks)
    return (
        f'<div class="plot" style="--height:{height}"><div class="ylabel">{safe(y_label)}</div>'
        f'<div class="ys">{ys}</div><div class="area">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{safe(alternative)}">{shapes}</svg>{over}</div>'
        f'<div class="xs">{xs}</div><div class="xlabel">{safe(x.label)}</div></div>'
    )


def bars(x: Axis, y: Axis, edges: Sequence[float], heights: Sequence[float], gap: float = 0.0) -> str:
    """Bars between `edges`, one more than `heights`, as one path; `gap` in thousandths of the chart's width."""
    path = "".join(
        f"M{_along(x, left) + gap / 2:.1f} 1000V{_down(y, top)}H{_along(x, right) - gap / 2:.1f}V1000Z"
        for left, right, top in zip(edges[:-1], edges[1:], heights, strict=True)
        if top > y.low
    )
    return f'<path class="fill" d="{path}"/>'


def upright(x: Axis, value: float) -> str:
    """A dashed line across the chart."""
    at = f"{_along(x, value):.1f}"
    return f'<line class="mark" x1="{at}" x2="{at}" y1="0" y2="1000"/>'


def dots(x: Axis, y: Axis, points: Sequence[tuple[float, float]]) -> str:
    """A round dot at each point, of the same size however the chart is stretched."""
    path = "".join(f"M{_along(x, left):.1f} {_down(y, up)}h0" for left, up in points)
    return f'<path class="dots" d="{path}"/>'


def _along(x: Axis, value: float) -> float:
    return 1000 * x.share(value)


def _down(y: Axis, value: float) -> str:
    return f"{1000 - 1000 * y.share(value):.1f}"
