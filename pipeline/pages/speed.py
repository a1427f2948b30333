"""How fast a run was, and what held it up: a section of its page, drawn from the numbers of its report alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.core.formatting import format_count, format_duration, format_share
from pipeline.core.schema import STAGE_DECODE, STAGE_EMBED, STAGE_READ, STAGE_WRITE, STAGES
from pipeline.pages.charts import Axis, axis, bars, frame, plot, upright
from pipeline.pages.html import safe

MAX_BINS = 80
# A stage busy for less than this held nothing up.
_IDLE_SHARE = 0.5
_WORK = {
    STAGE_READ: "reading shards",
    STAGE_DECODE: "images to pixels",
    STAGE_EMBED: "pixels to embeddings",
    STAGE_WRITE: "storing parts",
}
_ADVICE = {
    STAGE_READ: "A faster network, or a store nearer by, would make the run faster.",
    STAGE_DECODE: "More CPU cores would make the run faster.",
    STAGE_EMBED: "A faster device, or more of them, would make the run faster.",
    STAGE_WRITE: "A faster store would make the run faster.",
}
STYLE = """
.time .plot { grid-template-columns: 3.4rem 1fr; }
.time .plot + .plot { margin-top: 1.4rem; }
.cell, rect.row { shape-rendering: crispEdges; }
.cell { fill: var(--data); } .slowest .cell, rect.slowest { fill: var(--accent); } rect.row { fill: var(--empty); }
.stages { display: grid; grid-template-columns: max-content minmax(4rem, 1fr) max-content; gap: .55rem .9rem;
  align-items: center; margin: .6rem 0 1rem; font-variant-numeric: tabular-nums; }
.stage { display: contents; }
.track { height: .8rem; border-radius: 3px; background: var(--empty); overflow: hidden; }
.track i { display: block; height: 100%; background: var(--data); }
.stage.slowest { color: var(--accent); font-weight: 600; }
.stage.slowest small { font-weight: 400; }
.slowest .track i { background: var(--accent); }
@media (max-width: 700px) { .stages { grid-template-columns: minmax(0, 1fr); gap: .8rem; }
  .stage { display: grid; grid-template-columns: 1fr max-content; gap: .1rem .9rem; align-items: baseline; }
  .track { grid-row: 2; grid-column: 1 / 3; } .spent small { display: none; } }
"""


class Bins(NamedTuple):
    """A run in at most `MAX_BINS` bins of time: their edges in seconds, and for each what was done in it."""

    edges: list[float]
    images_per_s: list[float]
    busy: dict[str, list[float]]


def section(report: Mapping[str, Any]) -> str:
    """Throughput over time, and time by stage."""
    if not report["slowest_stage"]:
        return "<p>No part was stored in this run, so there is nothing to time.</p>"
    slowest = str(report["slowest_stage"])
    return (
        f"<p>{safe(bottleneck(report))}</p>"
        f'<div class="time">{_charts(report, slowest)}</div>'
        f"<h3>Time by stage</h3>{_stages(report, slowest)}"
        '<p class="note">A part of the output counts when it is stored; what it took is spread over the time since '
        "the part before it; of the first, over the time that its stages took. Stages run at the same time, "
        "each with workers of its own.</p>"
    )


def bottleneck(report: Mapping[str, Any]) -> str:
    """What was slowest, in a sentence or two."""
    slowest = report["slowest_stage"]
    busy = min(report["stage_busy"][slowest], 1.0)
    said = f"{slowest.capitalize()} was the slowest stage: its workers were busy {format_share(busy)} of the time."
    first_s = report["first_part_s"]
    start = "" if first_s is None else f" The first part was stored after {format_duration(first_s)}."
    late = first_s is not None and first_s > report["wall_s"] / 3
    if busy >= _IDLE_SHARE:
        return f"{said} {_ADVICE[slowest]}{start if late else ''}"
    return f"{said} No stage was busy for half of the run: starting up and waiting took the rest.{start}"


def make_bins(report: Mapping[str, Any]) -> Bins:
    """The report's timeline in few enough bins to see, to the end of the run."""
    timeline = report["timeline"]
    step_s, num_steps = float(timeline["step_s"]), len(timeline["images"])
    end_s = max(float(report["wall_s"]), num_steps * step_s)
    width_s = math.ceil(end_s / step_s / MAX_BINS) * step_s
    # What is left over at the end belongs to the bin before: in a short one, a part would look like a burst.
    num_bins = max(1, round(end_s / width_s))
    edges = [*(bin * width_s for bin in range(num_bins)), end_s]
    lengths = [high - low for low, high in itertools.pairwise(edges)]

    busy_s = timeline["busy_s"]
    first = next((step for step, images in enumerate(timeline["images"]) if images or busy_s[STAGE_READ][step]), 0)
    # A part goes through the stages one after the other: before that there was none.
    took = math.ceil(sum(steps[first] for steps in busy_s.values()) / step_s) if num_steps else 1

    def rates(steps: Sequence[float]) -> list[float]:
        sums = [0.0] * num_bins
        for step, value in enumerate(spread(steps, max(1, took))):
            sums[min(int(step * step_s / width_s), num_bins - 1)] += value
        return [value / length for value, length in zip(sums, lengths, strict=True)]

    workers = report["stage_workers"]
    busy = {
        stage: [min(rate / workers.get(stage, 1.0), 1.0) for rate in rates(timeline["busy_s"][stage])]
        for stage in STAGES
    }
    return Bins(edges, rates(timeline["images"]), busy)


def spread(steps: Sequence[float], first: int) -> list[float]:
    """Each sum spread evenly over its step and the empty ones before it; the total stays as it is.

    The first is spread over `first` steps at most.
    """
    result: list[float] = []
    empty = 0
    for value in steps:
        empty += 1
        if value:
            over = empty if any(result) else min(empty, first)
            result += [0.0] * (empty - over) + [value / over] * over
            empty = 0
    return result + [0.0] * empty


def _charts(report: Mapping[str, Any], slowest: str) -> str:
    bins = make_bins(report)
    unit_s, unit = _unit(bins.edges[-1])
    edges = [edge / unit_s for edge in bins.edges]
    x = axis(f"{unit} since the run began", 0.0, edges[-1], 8, tight=True)
    y = axis("images/s", 0.0, max([*bins.images_per_s, 1e-3]), 4)
    first_s = report["first_part_s"]
    mark = "" if first_s is None else upright(x, min(first_s / unit_s, x.high))
    told = f"Images embedded a second over {format_duration(bins.edges[-1])}: {report['images_per_s']} on average"
    said = (
        f'<p class="note">{report["images_per_s"]:,} images/s on average over the whole run'
        + ("" if first_s is None else f"; the dashed line is the first stored part, after {format_duration(first_s)}")
        + ".</p>"
    )
    rates = plot(x._replace(label=""), y, bars(x, y, edges, bins.images_per_s) + mark, "11rem", told)
    return f"<h3>Throughput</h3>{said}{rates}{_busy_over_time(report, bins, x, edges, slowest)}"


def _busy_over_time(report: Mapping[str, Any], bins: Bins, x: Axis, edges: list[float], slowest: str) -> str:
    height = 1000 / len(STAGES)
    rows = []
    for row, stage in enumerate(STAGES):
        top, tall = row * height + 30, height - 60
        cells = "".join(
            f'<rect class="cell" x="{1000 * x.share(left):.1f}" y="{top:.0f}" height="{tall:.0f}" '
            f'width="{1000 * (x.share(right) - x.share(left)):.1f}" fill-opacity="{share:.2f}"/>'
            for left, right, share in zip(edges[:-1], edges[1:], bins.busy[stage], strict=True)
            if share >= 0.005
        )
        back = f'<rect class="row" x="0" y="{top:.0f}" width="1000" height="{tall:.0f}"/>'
        rows.append(f'<g class="{"slowest" if stage == slowest else ""}">{back}{cells}</g>')
    names = [(1 - (row + 0.5) / len(STAGES), stage) for row, stage in enumerate(STAGES)]
    shares = ", ".join(f"{stage} {format_share(min(share, 1))}" for stage, share in report["stage_busy"].items())
    label = "busy workers of each stage: from none (no colour) to all (full colour)"
    told = f"Share of each stage's workers that were busy over time; over the whole run: {shares}"
    return frame(x, label, names, "".join(rows), "7rem", told, "")


def _stages(report: Mapping[str, Any], slowest: str) -> str:
    rows = []
    for stage in STAGES:
        busy, workers = min(report["stage_busy"][stage], 1.0), report["stage_workers"].get(stage, 1.0)
        spent = (
            f"{format_duration(report['stage_s'][stage])} of work, up to {format_count(math.ceil(workers), 'worker')}"
        )
        rows.append(
            f'<div class="stage {"slowest" if stage == slowest else ""}">'
            f"<span>{stage} <small>{_WORK[stage]}</small></span>"
            f'<span class="track" aria-hidden="true"><i style="width:{100 * busy:.1f}%"></i></span>'
            f'<span class="spent">{format_share(busy)} busy <small>{spent}</small></span></div>'
        )
    return f'<div class="stages">{"".join(rows)}</div>'


def _unit(length_s: float) -> tuple[float, str]:
    if length_s < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if length_s < 5 * 3600 else (3600.0, "hours")
