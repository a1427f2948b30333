#!/usr/bin/env python3
"""Read an output of embed.py back and prove that it is right, or name every fault in it.

Without --input the command reads the Parquet alone: every part, to its last row. With --input it also compares
the output with the shards, sample by sample, and computes some embeddings again from their images.
"""

from __future__ import annotations

import argparse
import json
import sys

import rich.console

from shard_embedder.jobs.support.command import (
    Parser,
    add_output_argument,
    at_least,
    check_file,
    not_empty,
    run_command,
)
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from shard_embedder.jobs.support.progress import plain_console, show_progress
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import format_count, format_size, one_line
from shard_embedder.pipeline.core.storage import join
from shard_embedder.pipeline.core.writing import write_whole
from shard_embedder.pipeline.verify.findings import RULES, Verdict
from shard_embedder.pipeline.verify.proof import THREADS, verify
from shard_embedder.pipeline.verify.recompute import RECOMPUTE_IMAGES, Recompute

EXIT_WRONG = 1
_RULES = "\n".join(f"  {name:<16}{meaning}" for name, meaning in RULES.items())
_EPILOG = f"""\
Each finding is one line: the file, the rule that it breaks, the value. Do not verify an output while a run
writes to it. The rules:
{_RULES}
"""
_EXIT_CODES = {
    EXIT_OK: "proven: nothing is wrong",
    EXIT_WRONG: "something is wrong: each finding is printed",
    EXIT_USAGE: "wrong usage: no output, no shards, or weights that cannot be loaded",
    EXIT_FAILED: "a disk or a store failed: nothing is proven",
}


def parser() -> Parser:
    """The command line."""
    top = Parser(
        "verify.py", description=__doc__, epilog=_EPILOG, examples=["out/ --input shards/"], exit_codes=_EXIT_CODES
    )
    add_output_argument(top)
    top.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="URL",
        help="the shards or the folder of images, named as for embed.py: counts and ids must balance with them",
    )
    top.add_argument(
        "--recompute",
        type=at_least(0, "all"),
        metavar="N",
        help="with --input: embed N images again, drawn at random, or `all`; 0 for none "
        f"(default: {RECOMPUTE_IMAGES}, if the weights can be loaded)",
    )
    top.add_argument("--weights", metavar="W", help="weights to embed with (default: those that run.json names)")
    top.add_argument("--seed", type=int, default=0, metavar="N", help="seed for drawing the images (default: 0)")
    top.add_argument(
        "--threads", type=at_least(1), default=THREADS, metavar="N", help=f"parts read at once (default: {THREADS})"
    )
    top.add_argument(
        "--json",
        type=not_empty,
        metavar="FILE",
        help="write the verdict as JSON; - prints only that, to standard output",
    )
    return top


def recompute_of(flags: argparse.Namespace) -> Recompute | None:
    """What to compute again. It is required if the command line asks for it."""
    if not flags.input and (flags.recompute or flags.weights):
        raise SettingsError(
            "--recompute and --weights need --input: without the images nothing can be computed again"
        )
    if flags.recompute == 0 or not flags.input:
        return None
    asked = flags.recompute is not None or flags.weights is not None
    count = RECOMPUTE_IMAGES if flags.recompute is None else flags.recompute
    return Recompute(None if count == "all" else count, flags.weights, flags.seed, required=asked)


def show(verdict: Verdict, out: rich.console.Console, *, with_input: bool) -> None:
    """Print every finding and note as a line, what was read, and how to mend it."""
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
        ("parts", f"{verdict.parts}, {format_size(verdict.num_bytes)} with their errors"),
        ("samples", f"{verdict.samples}: {verdict.embedded} embedded, {format_count(verdict.errors, 'error')}"),
        *([("unused", f"{verdict.unused_images} image members without a row")] if verdict.unused_images else []),
        ("tars", f"{verdict.tars_compared} compared{none}" if with_input else "not compared: no --input"),
        ("recomputed", f"{verdict.recomputed} embeddings{lowest}"),
    ]
    for name, value in rows:
        out.print(f"{name:<12}{value}")
    for name in verdict.to_delete():
        out.print(f"MEND  delete {one_line(join(verdict.output, name))}")
    for parts in verdict.retired:
        out.print(
            f"MEND  delete {one_line(parts)} in {one_line(verdict.output)}, and the same in errors/: this input does "
            "not name the shard, so no run makes them again; if it is to be embedded again, put it back first"
        )
    if any(finding.rule == "shard-refused" for finding in verdict.findings):
        out.print(
            "MEND  rename the refused shards, or host them where byte ranges are answered; then run the job again"
        )
    if verdict.broken_shards:
        out.print("MEND  replace the broken shards, where it was not the network that failed: a run reads them again")
    if verdict.mended_by_a_run:
        then = "then run" if verdict.to_delete() else "run"
        which = "" if with_input else " of the shards that its input still names; --input tells of the others"
        out.print(f"MEND  {then} the job again, as it was run: it makes what is missing{which}")
    wrong = f"NOT PROVEN: {format_count(len(verdict.findings), 'finding')} in {verdict.output}"
    out.print(f"proven: {verdict.output}" if verdict.proven else wrong)


def _run(flags: argparse.Namespace) -> int:
    recompute = recompute_of(flags)
    if flags.json and flags.json != "-":
        check_file("--json", flags.json)
    out = plain_console(stderr=flags.json == "-")
    with show_progress(out) as on_progress:
        verdict = verify(flags.output, flags.input, recompute, threads=flags.threads, on_progress=on_progress)
    show(verdict, out, with_input=bool(flags.input))
    if flags.json:
        _write_json(verdict, flags.json)
    return EXIT_OK if verdict.proven else EXIT_WRONG


def _write_json(verdict: Verdict, path: str) -> None:
    text = json.dumps(verdict.as_dict(), indent=2) + "\n"
    if path == "-":
        sys.stdout.write(text)
    else:
        with write_whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Verify, and return the exit code."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
