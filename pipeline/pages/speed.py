"""How fast a run was, and what held it up: a section of its page, drawn from the numbers of its report alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from shard_embedder.pipeline.core.formatting import format_duration, format_share
from shard_embedder.pipeline.core.schema import STAGE_DECODE, STAGE_EMBED, STAGE_READ, STAGE_WRITE, STAGES
from shard_embedder.pipeline.pages.charts import axis
from shard_embedder.pipeline.pages.html import render_or_reason

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


class Bins(NamedTuple):
    """A run in at most `MAX_BINS` bins of time: their edges in seconds, and for each what was done in it."""

    edges: list[float]
    images_per_s: list[float]
    busy: dict[str, list[float]]


def section(report: Mapping[str, Any]) -> Markup:
    """Throughput over time, and time by stage, as HTML."""
    return render_or_reason("speed.html.j2", lambda: {"report": report, **_charts(report)})


def bottleneck(report: Mapping[str, Any]) -> str:
    """What was slowest, in a sentence or two."""
    slowest = report["slowest_stage"]
    busy = min(report["stage_busy"][slowest], 1.0)
    share = format_share(busy)
    said = f"{slowest.capitalize()} was the slowest stage: its workers were busy {share} of the time after the start."
    first_s = report["first_part_s"]
    start = "" if first_s is None else f" The first part was stored after {format_duration(first_s)}."
    late = first_s is not None and first_s > report["wall_s"] / 3
    if busy >= _IDLE_SHARE:
        return f"{said} {_ADVICE[slowest]}{start if late else ''}"
    return f"{said} No stage was busy for half of that time: waiting took the rest.{start}"


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


def _charts(report: Mapping[str, Any]) -> dict[str, Any]:
    if not report["slowest_stage"]:
        return {}
    bins = make_bins(report)
    unit_s, unit = _unit(bins.edges[-1])
    edges = [edge / unit_s for edge in bins.edges]
    x = axis(f"{unit} since the run began", 0.0, edges[-1], 8, tight=True)
    first_s = report["first_part_s"]
    return {
        "bottleneck": bottleneck(report),
        "length_s": bins.edges[-1],
        "edges": edges,
        "images_per_s": bins.images_per_s,
        "x": x,
        "y": axis("images/s", 0.0, max([*bins.images_per_s, 1e-3]), 4),
        "mark": None if first_s is None else min(first_s / unit_s, x.high),
        "stages": [
            {
                "name": stage,
                "work": _WORK[stage],
                "kind": "slowest" if stage == report["slowest_stage"] else "",
                "busy": min(report["stage_busy"][stage], 1.0),
                "busy_over_time": bins.busy[stage],
                "seconds": report["stage_s"][stage],
                "workers": math.ceil(report["stage_workers"].get(stage, 1.0)),
            }
            for stage in STAGES
        ],
    }


def _unit(length_s: float) -> tuple[float, str]:
    if length_s < 300:
        return 1.0, "seconds"
    return (60.0, "minutes") if length_s < 5 * 3600 else (3600.0, "hours")
