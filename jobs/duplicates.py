#!/usr/bin/env python3
"""Find the near-duplicates in an output of embed.py: every pair of embeddings above a cosine, as Parquet.

Without --index every pair is compared: exact, and four times the work for twice the images. With the index of
the output, only the nearest of each are: with a flat one exact, while an hnsw or ivf one misses pairs, above
all where many images are alike.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.support.command import Parser, check_file, check_page, not_empty
from jobs.support.progress import ShownProgress, plain_console
from pipeline.core.errors import PipelineError
from pipeline.core.formatting import format_count

if TYPE_CHECKING:
    from pipeline.retrieval.duplicates import Found
    from pipeline.retrieval.index import Facts

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
PAGE_ROWS = 50
PAGE_NEAR = 6
_EPILOG = """\
Columns of the pairs: id_a, shard_a, sample_index_a, id_b, shard_b, sample_index_b, score (the cosine). Each pair
is there once, a before b in the order of the output.

What cosine makes a duplicate depends on the backbone and its weights: look at --html, or measure it with
--group-pattern on images of which you know it.

exit codes:
  0    the pairs are written, be there any or none
  2    wrong usage: no output, or an index that does not hold it
  130  interrupted: nothing is written
"""


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="duplicates.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    top.add_argument("output", type=not_empty, metavar="OUTPUT", help="folder or s3:// prefix that embed.py wrote")
    top.add_argument(
        "--pairs",
        type=not_empty,
        default="duplicates.parquet",
        metavar="FILE",
        help="(default: duplicates.parquet)",
    )
    top.add_argument("--threshold", type=float, default=0.95, metavar="C", help="least cosine (default: 0.95)")
    top.add_argument(
        "--index", type=not_empty, metavar="INDEX", help="look among the nearest in this index, made by index.py"
    )
    top.add_argument(
        "--group-pattern",
        metavar="REGEX",
        help="print precision and recall, where true duplicates share what the first group of this matches in their "
        "ids, such as '^(.*)-view'",
    )
    top.add_argument(
        "--scratch", type=not_empty, metavar="FOLDER", help="for the embeddings meanwhile (default: the system's)"
    )
    top.add_argument(
        "--html", type=not_empty, metavar="FILE", help=f"write a page of {PAGE_ROWS} images drawn at random as well"
    )
    top.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="URL",
        help="for --html: the shards, as named for embed.py (default: where they lay then)",
    )
    return top


def lines_of(found: Found, threshold: float, facts: Facts | None) -> list[str]:
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


def main(arguments: list[str] | None = None) -> int:
    """Find them, and return the exit code."""
    top = parser()
    flags = top.parse_args(arguments)
    # PyArrow takes a while to import: who asks for help, or mistypes, shall not wait for it.
    from pipeline.pages.near import duplicates_page  # noqa: PLC0415
    from pipeline.retrieval.duplicates import draw_duplicates, find_duplicates, tags_of  # noqa: PLC0415
    from pipeline.retrieval.index import open_index  # noqa: PLC0415

    out = plain_console()
    progress = ShownProgress(out)
    try:
        check_file("--pairs", flags.pairs)
        check_page(flags.html, flags.input)
        index = None if flags.index is None else open_index(flags.index)
        with progress.shown():
            found = find_duplicates(
                flags.output,
                flags.pairs,
                flags.threshold,
                index=index,
                group_pattern=flags.group_pattern,
                scratch=flags.scratch,
                on_progress=progress,
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
    except (PipelineError, OSError) as error:
        top.tell(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        top.tell("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
