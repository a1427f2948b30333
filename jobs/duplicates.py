#!/usr/bin/env python3
"""Find the near-duplicates in an output of embed.py: every pair of embeddings above a cosine, as Parquet.

Without --index the command compares all pairs: exact, and four times the work for twice the images. With the
index of the output it compares each embedding with its nearest only: exact with a flat index, while an hnsw or
ivf index misses pairs, above all where many images are alike.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.support.command import (
    Parser,
    add_output_argument,
    add_page_options,
    check_file,
    check_page_options,
    not_empty,
    run_command,
)
from jobs.support.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from jobs.support.progress import plain_console, show_progress
from pipeline.core.formatting import format_count

if TYPE_CHECKING:
    from pipeline.retrieval.duplicates import Found
    from pipeline.retrieval.index import IndexFacts

PAGE_ROWS = 50
PAGE_NEAR = 6
_EPILOG = """\
Columns of the pairs: id_a, shard_a, sample_index_a, id_b, shard_b, sample_index_b, score (the cosine). Each pair
is there once, a before b in the order of the output.

Which cosine makes a duplicate depends on the backbone and its weights: look at --html, or measure it with
--group-pattern on images whose duplicates you know.
"""
_EXIT_CODES = {
    EXIT_OK: "the pairs are written, even if there are none",
    EXIT_USAGE: "wrong usage: no output, or an index that does not hold it",
    EXIT_FAILED: "a disk or a store failed; nothing is written",
}


def parser() -> Parser:
    """The command line."""
    top = Parser(
        "duplicates.py",
        description=__doc__,
        epilog=_EPILOG,
        exit_codes=_EXIT_CODES,
        interrupted="nothing is written",
    )
    add_output_argument(top)
    top.add_argument(
        "--pairs",
        type=not_empty,
        default="duplicates.parquet",
        metavar="FILE",
        help="(default: duplicates.parquet)",
    )
    top.add_argument("--threshold", type=float, default=0.95, metavar="C", help="least cosine (default: 0.95)")
    top.add_argument(
        "--index", type=not_empty, metavar="INDEX", help="compare with the nearest in this index, made by index.py"
    )
    top.add_argument(
        "--group-pattern",
        metavar="REGEX",
        help="print precision and recall: true duplicates share what the first group of this expression matches in "
        "their ids, such as '^(.*)-view'",
    )
    top.add_argument(
        "--scratch",
        type=not_empty,
        metavar="FOLDER",
        help="keep the embeddings here meanwhile (default: the system's temporary folder)",
    )
    add_page_options(top, f"a page of {PAGE_ROWS} images drawn at random, with their duplicates")
    return top


def lines_of(found: Found, threshold: float, facts: IndexFacts | None) -> list[str]:
    """What was found, by an index of `facts` or by comparing all: to print and for the page."""
    lines = [
        f"{format_count(found.num_pairs, 'pair')} of cosine {threshold:g} and above "
        f"among {format_count(found.num_rows, 'embedding')}"
    ]
    if found.num_true is not None:
        shares = [
            f"{name} {'-' if share is None else format(share, '.4f')}"
            for name, share in (("precision", found.precision), ("recall", found.recall))
        ]
        lines.append(f"{', '.join(shares)} ({found.num_right} pairs of the {found.num_true} that share a group)")
    if facts is not None and facts.kind != "flat":
        lines.append(
            f"looked for in an index of kind {facts.kind}, recall@10 {facts.recall:.3f}: pairs may be missing, above "
            "all where many images are alike; without --index, or with a flat one, none is"
        )
    if found.truncated:
        lines.append(
            f"{format_count(found.truncated, 'embedding')} with more near-duplicates than were looked for: "
            "pairs are missing"
        )
    return lines


def _run(flags: argparse.Namespace) -> int:
    # PyArrow takes a while to import: --help and usage errors do not need it.
    from pipeline.pages.near import duplicates_page  # noqa: PLC0415
    from pipeline.retrieval.duplicates import draw_duplicates, find_duplicates, tags_of  # noqa: PLC0415
    from pipeline.retrieval.index import open_index  # noqa: PLC0415

    check_file("--pairs", flags.pairs)
    check_page_options(flags)
    index = None if flags.index is None else open_index(flags.index)
    out = plain_console()
    with show_progress(out) as on_progress:
        found = find_duplicates(
            flags.output,
            flags.pairs,
            flags.threshold,
            index=index,
            group_pattern=flags.group_pattern,
            scratch=flags.scratch,
            on_progress=on_progress,
        )
    lines = lines_of(found, flags.threshold, None if index is None else index.facts)
    for line in lines:
        out.print(line)
    out.print(f"written to {flags.pairs}")
    if flags.html:
        drawn = draw_duplicates(flags.pairs, PAGE_ROWS, PAGE_NEAR)
        tags = tags_of(flags.output)
        text = duplicates_page(flags.output, drawn, lines, flags.input, tags.get)
        Path(flags.html).write_text(text, encoding="utf-8")
    return EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Find the near-duplicates, and return the exit code."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
