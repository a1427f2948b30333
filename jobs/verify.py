#!/usr/bin/env python3
"""Read an output of embed.py back and prove it, or name every fault in it.

Without --input the Parquet alone is read: every part, to its last row. With --input it is held against the
shards themselves as well, sample by sample, and some embeddings are computed again from their images.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import rich.console
from rich.filesize import decimal

from jobs.support.command import Parser, at_least, check_file, not_empty
from jobs.support.progress import ShownProgress, plain_console
from pipeline.core.errors import PipelineError
from pipeline.core.formatting import format_count
from pipeline.core.storage import join
from pipeline.verify.findings import RULES, Verdict, one_line
from pipeline.verify.proof import THREADS, verify
from pipeline.verify.recompute import RECOMPUTE_IMAGES, Recompute

EXIT_PROVEN = 0
EXIT_WRONG = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_RULES = "\n".join(f"  {name:<16}{meaning}" for name, meaning in RULES.items())
_EPILOG = f"""\
Each finding is one line: the file, the rule that it breaks, the value. Do not verify an output while a run
goes on in it. The rules:
{_RULES}

exit codes:
  0    proven: nothing is wrong
  1    something is wrong: each finding is told
  2    wrong usage: no output, no shards, or weights that cannot be had
  130  interrupted
"""


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="verify.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    top.add_argument("output", type=not_empty, metavar="OUTPUT", help="folder or s3:// prefix that embed.py wrote")
    top.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="URL",
        help="the shards it was made of, named as for embed.py: counts and ids must balance with them",
    )
    top.add_argument(
        "--recompute",
        type=at_least(0, "all"),
        metavar="N",
        help="with --input: embed N images again, drawn at random, or `all`; 0 for none "
        f"(default: {RECOMPUTE_IMAGES}, where the weights can be had)",
    )
    top.add_argument("--weights", metavar="W", help="weights to embed with (default: those that run.json names)")
    top.add_argument("--seed", type=int, default=0, metavar="N", help="draws the images (default: 0)")
    top.add_argument(
        "--threads", type=at_least(1), default=THREADS, metavar="N", help=f"parts read at once (default: {THREADS})"
    )
    top.add_argument(
        "--json", type=not_empty, metavar="FILE", help="write the verdict there as JSON, - for standard output alone"
    )
    return top


def recompute_of(flags: argparse.Namespace) -> Recompute | None:
    """What to compute again, by the command line; what was asked for must be possible."""
    if flags.recompute == 0 or not flags.input:
        return None
    asked = flags.recompute is not None or flags.weights is not None
    count = RECOMPUTE_IMAGES if flags.recompute is None else flags.recompute
    return Recompute(None if count == "all" else count, flags.weights, flags.seed, required=asked)


def show(verdict: Verdict, out: rich.console.Console, *, with_input: bool) -> None:
    """Every finding and note as a line, and what was read."""
    for finding in verdict.findings:
        out.print(f"WRONG {finding}", style="red")
    for note in verdict.notes:
        out.print(f"note  {note}")
    broken = f", {verdict.broken_shards} of them broken" if verdict.broken_shards else ""
    cosine = verdict.lowest_cosine
    lowest = "" if cosine is None else f", the lowest cosine is {cosine:.6f}"
    none = "" if verdict.tars_compared else ": no stored shard is in the input, unchanged and readable"
    rows = [
        ("shards", f"{verdict.shards}{broken}"),
        ("parts", f"{verdict.parts}, {decimal(verdict.num_bytes)} with their errors"),
        ("samples", f"{verdict.samples}: {verdict.embedded} embedded, {verdict.errors} errors"),
        *([("unused", f"{verdict.unused_images} image members without a row")] if verdict.unused_images else []),
        ("tars", f"{verdict.tars_compared} compared{none}" if with_input else "not compared: no --input"),
        ("recomputed", f"{verdict.recomputed} embeddings{lowest}"),
    ]
    for name, value in rows:
        out.print(f"{name:<12}{value}")
    for name in verdict.to_delete():
        out.print(f"MEND  delete {one_line(join(verdict.output, name))}")
    if verdict.broken_shards:
        out.print("MEND  replace the broken shards, where it was not the network that failed: a run reads them again")
    if verdict.mended_by_a_run:
        then = "then run" if verdict.to_delete() else "run"
        out.print(f"MEND  {then} embed.py again, as it was run: it makes what is missing")
    wrong = f"NOT PROVEN: {format_count(len(verdict.findings), 'finding')} in {verdict.output}"
    out.print(f"proven: {verdict.output}" if verdict.proven else wrong)


def main(arguments: list[str] | None = None) -> int:
    """Verify, and return the exit code."""
    top = parser()
    flags = top.parse_args(arguments)
    if not flags.input and (flags.recompute or flags.weights):
        top.error("--recompute and --weights need --input: without the images nothing can be computed again")
    out = plain_console(stderr=flags.json == "-")
    progress = ShownProgress(out)
    try:
        if flags.json and flags.json != "-":
            check_file("--json", flags.json)
        with progress.shown():
            verdict = verify(
                flags.output, flags.input, recompute_of(flags), threads=flags.threads, on_progress=progress
            )
        show(verdict, out, with_input=bool(flags.input))
        if flags.json:
            _write_json(verdict, flags.json)
    except (PipelineError, OSError) as error:
        top.tell(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        top.tell("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_PROVEN if verdict.proven else EXIT_WRONG


def _write_json(verdict: Verdict, path: str) -> None:
    text = json.dumps(verdict.as_dict(), indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
