"""`report.html`: one page that tells a person what a run did, and needs nothing but itself.

It is drawn after the run, from its report and a look into what is stored. What cannot be drawn says why in its place,
and nothing that goes wrong here changes the run or its report.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from shard_embedder.pipeline.core.schema import SHARD_FAULT
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.output.ledger import MAX_WORST
from shard_embedder.pipeline.output.names import PAGE_FILE
from shard_embedder.pipeline.pages import look, speed
from shard_embedder.pipeline.pages.html import render, render_or_reason
from shard_embedder.pipeline.pages.links import RUN, links, local_path
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.keys import Naming

MAX_REASONS = 20
MAX_INPUTS = 5
OPEN_LISTED = 10


def write_page(report: Mapping[str, Any], shards: Iterable[Shard], opened: Collection[str], naming: Naming) -> None:
    """Draw the page of a run and store it beside its report.

    `shards` are those of its input, as it found them. Pictures are read from those that it `opened`, by their names:
    a shard that was done before is not opened, not even for a picture.

    Raises:
        OSError, StoreError: it cannot be stored.
    """
    html = draw_page(report, {shard.name: shard for shard in shards}, opened, naming)
    write_bytes(str(report["output"]), PAGE_FILE, html.encode())


def draw_page(report: Mapping[str, Any], shards: Mapping[str, Shard], opened: Collection[str], naming: Naming) -> str:
    """The page as HTML."""
    output = str(report["output"])
    # Where nothing was pending, no device was asked for.
    values = {"report": report, "is_idle": report["device"] is None}
    sections = [
        ("Errors and broken shards", render_or_reason("errors.html.j2", lambda: values | _errors(report))),
        ("Speed", "" if values["is_idle"] else speed.section(report)),
        ("What ran", render_or_reason("facts.html.j2", lambda: values | {"MAX_INPUTS": MAX_INPUTS})),
        ("The embeddings", look.section(output, shards, opened, naming)),
    ]
    return render(
        "run.html.j2",
        values
        | {
            "kind": RUN,
            "weights": report["weights"],
            "links": links(local_path(output, PAGE_FILE), output),
            "sections": [(title, html) for title, html in sections if html],
        },
    )


def _errors(report: Mapping[str, Any]) -> dict[str, Any]:
    by_reason = report["errors_by_reason"]
    total = sum(by_reason.values())
    return {
        "reasons": sorted(by_reason.items(), key=lambda item: -item[1]),
        "total": total,
        # A broken shard's fault is a row and no sample.
        "num_failed": total - by_reason.get(SHARD_FAULT, 0),
        "broken": [f"{name}: {fault}" for name, fault in report["broken_shards"].items()],
        "MAX_REASONS": MAX_REASONS,
        "MAX_WORST": MAX_WORST,
        "OPEN_LISTED": OPEN_LISTED,
    }
