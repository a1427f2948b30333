#!/usr/bin/env python3
"""Make a FAISS index of an output of embed.py, or add to it what is new in the output.

The index knows what made its embeddings; search.py embeds queries in the same way. Needs the extra `index`:
pip install 'shard-embedder[index]'.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

import rich.console

from jobs.support.command import Parser, not_empty
from jobs.support.progress import ShownProgress, plain_console
from pipeline.core.errors import PipelineError, SettingsError
from pipeline.core.formatting import format_size

if TYPE_CHECKING:
    from pipeline.retrieval.build import Built

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_EPILOG = """\
The kind, where --kind does not say:
  flat  compares with every embedding, exact: up to 100000 rows that fit --memory
  hnsw  a graph over all embeddings, in memory: while these and the graph fit --memory
  ivf   lists on disk, of which a search reads some: beyond

Run it again after embed.py: the parts that are new are added. Where a part that is in the index has gone
from the output or changed, or a file of the index is damaged, the index is built anew, and that is said. The
old index stays usable until the new one is whole. How wide searches are is chosen by measuring: the narrowest
that finds 95 % of the ten nearest, compared with an exact search for 100 of its own rows.

exit codes:
  0    the index holds what the output holds
  2    wrong usage: no output, an index of other settings, or FAISS is not installed
  130  interrupted: the index is as it was before
"""


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="index.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    top.add_argument("output", type=not_empty, metavar="OUTPUT", help="folder or s3:// prefix that embed.py wrote")
    top.add_argument("index", type=not_empty, metavar="INDEX", help="local folder for the index")
    top.add_argument(
        "--metric",
        metavar="M",
        help="cosine, ip (inner product of the embeddings as they are) or l2 (distance) "
        "(default: that of the index, else cosine)",
    )
    top.add_argument("--kind", metavar="K", help="flat, hnsw or ivf (default: by the rule below)")
    top.add_argument(
        "--memory", type=float, default=4.0, metavar="GIB", help="for embeddings in memory, in GiB (default: 4)"
    )
    return top


def show(built: Built, index: str, out: rich.console.Console) -> None:
    """What was done, and what the index is now."""
    facts = built.facts
    for note in built.notes:
        out.print(f"note  {note}")
    if built.rebuilt:
        out.print(f"built anew: {built.rebuilt}", style="yellow")
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


def main(arguments: list[str] | None = None) -> int:
    """Build or add, and return the exit code."""
    top = parser()
    flags = top.parse_args(arguments)
    # PyArrow takes a while to import: who asks for help, or mistypes, shall not wait for it.
    from pipeline.retrieval.build import Options, build  # noqa: PLC0415

    out = plain_console()
    progress = ShownProgress(out)
    try:
        if not math.isfinite(flags.memory):
            raise SettingsError(f"--memory must be a number of GiB, got {flags.memory}")
        options = Options(flags.metric, flags.kind, int(flags.memory * 2**30))
        with progress.shown():
            built = build(flags.output, flags.index, options, progress)
        show(built, flags.index, out)
    except (PipelineError, OSError) as error:
        top.tell(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        top.tell("interrupted; the index is as it was before")
        return EXIT_INTERRUPTED
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
