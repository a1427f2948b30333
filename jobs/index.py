#!/usr/bin/env python3
"""Build a FAISS index of an output of embed.py, or add to it what is new in the output.

The index records what made its embeddings, so that search.py embeds queries in the same way. It needs FAISS:
pip install faiss-cpu.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING

import rich.console

from shard_embedder.jobs.support.command import Parser, add_output_argument, not_empty, run_command
from shard_embedder.jobs.support.exit_codes import EXIT_BUSY, EXIT_FAILED, EXIT_OK, EXIT_USAGE
from shard_embedder.jobs.support.progress import plain_console, show_progress
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import format_size

if TYPE_CHECKING:
    from shard_embedder.pipeline.retrieval.build import Built

_EPILOG = """\
Without --kind, the number of rows and --memory choose the kind:
  flat  compares a query with every embedding; exact. Up to 100000 rows that fit --memory
  hnsw  a graph over all embeddings, in memory. While embeddings and graph fit --memory
  ivf   lists of embeddings on disk, of which a search reads some. Beyond that

Run it again after embed.py to add the new parts. The command builds the whole index again, and says why, when
an indexed part has changed or is gone from the output, or when a file of the index is damaged. The old index
stays usable until the new one is complete. The search width is measured: the narrowest that finds 95 % of the
ten nearest, compared with an exact search for 100 rows of the index.
"""
_EXIT_CODES = {
    EXIT_OK: "the index holds what the output holds",
    EXIT_USAGE: "wrong usage: no output, an index of other settings, or FAISS is not installed",
    EXIT_FAILED: "a disk or a store failed; the index is as it was before",
    EXIT_BUSY: "another index.py writes to this index: try again later",
}


def parser() -> Parser:
    """The command line."""
    top = Parser(
        "index.py",
        description=__doc__,
        epilog=_EPILOG,
        examples=["out/ index/"],
        exit_codes=_EXIT_CODES,
        interrupted="the index is as it was before",
    )
    add_output_argument(top)
    top.add_argument("index", type=not_empty, metavar="INDEX", help="local folder for the index")
    top.add_argument(
        "--metric",
        metavar="M",
        help="cosine, ip (inner product of the embeddings as they are) or l2 (distance) "
        "(default: that of the index, cosine for a new one)",
    )
    top.add_argument("--kind", metavar="K", help="flat, hnsw or ivf (default: by the rule below)")
    top.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB", help="for embeddings in memory, in GiB (default: 4)"
    )
    return top


def show(built: Built, index: str, out: rich.console.Console) -> None:
    """Print what was done, and what the index is now."""
    facts = built.facts
    for note in built.notes:
        out.print(f"note  {note}")
    if built.rebuilt:
        out.print(f"built again: {built.rebuilt}", style="yellow")
    elif not built.num_added:
        out.print("nothing to do: the index holds what the output holds")
    size = sum(num_bytes for num_bytes, _ in facts.files.values())
    lists = f" of {facts.lists} lists" if facts.lists else ""
    width = f", search width {facts.width}" if facts.width else ""
    recall = f"{facts.recall:.3f} of exact search, on {facts.recall_queries} of its rows{width}"
    rows = [
        ("index", f"{index}, {format_size(size)}"),
        ("kind", f"{facts.kind}{lists}, {facts.metric}, {facts.num_features} features"),
        ("rows", f"{facts.num_rows}, {built.num_added} of them added now"),
        ("recall@10", recall if facts.recall_queries else "not measured: there is no other row to find"),
    ]
    for name, value in rows:
        out.print(f"{name:<11}{value}")


def _run(flags: argparse.Namespace) -> int:
    # PyArrow takes a while to import: --help and usage errors do not need it.
    from shard_embedder.pipeline.retrieval.build import Options, build  # noqa: PLC0415

    if not math.isfinite(flags.memory):
        raise SettingsError(f"--memory must be a number of GiB, got {flags.memory}")
    options = Options(flags.metric, flags.kind, int(flags.memory * 2**30))
    out = plain_console()
    with show_progress(out) as on_progress:
        built = build(flags.output, flags.index, options, on_progress)
    show(built, flags.index, out)
    return EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Build the index or add to it, and return the exit code."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
