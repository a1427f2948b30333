#!/usr/bin/env python3
"""Find the near-duplicates in an output of embed.py: pairs of embeddings above a cosine, or groups of them.

Without --index the command compares all pairs: exact, and four times the work for twice the images. With the
index of the output it compares each embedding with its nearest only: exact with a flat index, while an hnsw or
ivf index misses pairs, above all where many images are alike.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shard_embedder.jobs.support.command import (
    Parser,
    add_output_argument,
    add_page_options,
    at_least,
    check_file,
    check_page_options,
    not_empty,
    run_command,
)
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from shard_embedder.jobs.support.progress import plain_console, show_progress
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.writing import write_whole

if TYPE_CHECKING:
    from shard_embedder.pipeline.retrieval.duplicates import DuplicateCounts
    from shard_embedder.pipeline.retrieval.group_files import GroupCounts
    from shard_embedder.pipeline.retrieval.index import IndexFacts

PAIRS_FILE = "duplicates.parquet"
PAGE_ROWS = 50
PAGE_NEAR = 6
_EPILOG = """\
Columns of the pairs: id_a, shard_a, sample_index_a, id_b, shard_b, sample_index_b, score (the cosine). Each pair
is there once, a before b in the order of the output. At most --max-pairs pairs begin with the same image; the
command says when there are more.

Columns of the groups: image_id, shard, sample_index, group, keep. Every image of the output is a row, and what a
chain of pairs connects is one group. One image of each group is the one to keep. --drop lists the ids of the
others, one a line, but none that a kept image has, too, and none with a line break; the command counts these.

Which cosine makes a duplicate depends on the backbone and its weights: look at --html, or measure it with
--group-pattern on images whose duplicates you know.
"""
_EXIT_CODES = {
    EXIT_OK: "the files are written, even if there are no pairs",
    EXIT_USAGE: "wrong usage: no output, or an index that does not hold it",
    EXIT_FAILED: "a disk or a store failed; no file is half written",
}


def parser() -> Parser:
    """The command line."""
    top = Parser(
        "duplicates.py",
        description=__doc__,
        epilog=_EPILOG,
        examples=["out/ --threshold 0.95 --html pairs.html", "out/ --groups groups.parquet --drop drop.txt"],
        exit_codes=_EXIT_CODES,
        interrupted="no file is half written",
    )
    add_output_argument(top)
    top.add_argument(
        "--pairs",
        type=not_empty,
        metavar="FILE",
        help=f"write the pairs here (default: {PAIRS_FILE}, or none with --groups or --drop)",
    )
    top.add_argument(
        "--max-pairs",
        type=at_least(1),
        default=1000,
        metavar="N",
        help="write at most N pairs that begin with the same image, the nearest; with --index, also the most "
        "neighbours of an image to compare with (default: 1000)",
    )
    top.add_argument(
        "--groups", type=not_empty, metavar="FILE", help="write the group of every image here, as Parquet"
    )
    top.add_argument("--drop", type=not_empty, metavar="FILE", help="write the ids of images that are not kept here")
    top.add_argument(
        "--keep-one",
        choices=("first", "largest"),
        default="first",
        help="which image of a group to keep: the first in the output, or the one of the most bytes (default: first)",
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
    add_page_options(
        top,
        f"a page of {PAGE_ROWS} images drawn at random, with their duplicates",
        also_for=" and --keep-one largest",
    )
    return top


def describe_pairs(found: DuplicateCounts, flags: argparse.Namespace, facts: IndexFacts | None) -> list[str]:
    """The pairs that were found, by the index of `facts` or by comparing all: to print and for the page."""
    lines = [
        f"{format_count(found.num_pairs, 'pair')} of cosine {flags.threshold:g} and above "
        f"among {format_count(found.num_rows, 'embedding')}"
    ]
    if found.num_true is not None:
        shares = [
            f"{name} {'-' if share is None else format(share, '.4f')}"
            for name, share in (("precision", found.precision), ("recall", found.recall))
        ]
        lines.append(f"{', '.join(shares)} ({found.num_right} pairs of the {found.num_true} that share a group)")
    lines += describe_index(facts)
    if found.truncated:
        lines.append(
            f"{format_count(found.truncated, 'embedding')} with more than {format_count(flags.max_pairs, 'pair')}: "
            "only the nearest are written; --groups has all of them, or give a higher --max-pairs"
        )
    return lines


def describe_index(facts: IndexFacts | None) -> list[str]:
    """A warning if an approximate index was used."""
    if facts is None or facts.kind == "flat":
        return []
    return [
        f"looked for in an index of kind {facts.kind}, recall@10 {facts.recall:.3f}: pairs may be missing, above "
        "all where many images are alike; without --index, or with a flat one, none is"
    ]


def describe_groups(found: DuplicateCounts, groups: GroupCounts) -> list[str]:
    """The groups that were found."""
    lines = [
        f"{format_count(groups.num_groups, 'group')} of near-duplicates among "
        f"{format_count(found.num_rows, 'embedding')}: {found.num_rows - groups.num_others:,} to keep, "
        f"{groups.num_others:,} to drop"
    ]
    if groups.num_unsized:
        lines.append(
            f"{format_count(groups.num_unsized, 'image')} of unknown size, whose shards changed or cannot be read: "
            "others of their groups are kept if possible"
        )
    if groups.num_unlisted:
        lines.append(
            f"{format_count(groups.num_unlisted, 'image')} to drop not in the list: a kept image has the same id, "
            "or the id has a line break. --groups tells such images apart by shard and sample_index"
        )
    return lines


def _run(flags: argparse.Namespace) -> int:
    # PyArrow takes a while to import: --help and usage errors do not need it.
    from shard_embedder.pipeline.retrieval.duplicates import draw_duplicates, find_duplicates, tags_of  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.group_files import GroupFiles  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.index import open_index  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.originals import Originals  # noqa: PLC0415

    wants_groups = flags.groups is not None or flags.drop is not None
    pairs = flags.pairs if flags.pairs is not None or wants_groups else PAIRS_FILE
    _check_options(flags, pairs)
    shards, folder = check_page_options(flags)
    group_files = GroupFiles(groups=flags.groups, drop=flags.drop, keep_one=flags.keep_one, shards=shards)
    index = None if flags.index is None else open_index(flags.index)
    out = plain_console()
    with show_progress(out) as on_progress:
        found = find_duplicates(
            flags.output,
            pairs,
            flags.threshold,
            index=index,
            group_pattern=flags.group_pattern,
            group_files=group_files if wants_groups else None,
            scratch=flags.scratch,
            max_pairs=flags.max_pairs,
            on_progress=on_progress,
        )
    facts = None if index is None else index.facts
    lines = [] if pairs is None else describe_pairs(found, flags, facts)
    said = [*lines, *([] if found.groups is None else describe_groups(found, found.groups))]
    for line in said if pairs is not None else [*said, *describe_index(facts)]:
        out.print(line)
    for path in (pairs, flags.groups, flags.drop):
        if path is not None:
            out.print(f"written to {path}")
    if flags.html:
        # It imports torch, which takes seconds: the rest does not need it.
        from shard_embedder.pipeline.pages.near import duplicates_page  # noqa: PLC0415

        drawn = draw_duplicates(pairs, PAGE_ROWS, PAGE_NEAR)
        tags = tags_of(flags.output)
        page = Path(flags.html)
        originals = Originals.of_output(flags.output, folder)
        text = duplicates_page(
            flags.output, found, flags.threshold, drawn, lines[1:], shards, tags.get, page, originals
        )
        with write_whole(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        out.print(f"written to {flags.html}")
    return EXIT_OK


def _check_options(flags: argparse.Namespace, pairs: str | None) -> None:
    """Raise `SettingsError` if the options do not fit together, or a file cannot be written."""
    for option, path in (("--pairs", pairs), ("--groups", flags.groups), ("--drop", flags.drop)):
        if path is not None:
            check_file(option, path)
    if pairs is None and (flags.html or flags.group_pattern):
        raise SettingsError("--html and --group-pattern need --pairs, got --groups or --drop alone")
    if flags.keep_one != "first" and flags.groups is None and flags.drop is None:
        raise SettingsError(f"--keep-one needs --groups or --drop, got {flags.keep_one!r} without them")
    files = [os.path.abspath(path) for path in (pairs, flags.groups, flags.drop, flags.html) if path is not None]
    if len(set(files)) < len(files):
        raise SettingsError(f"--pairs, --groups, --drop and --html must be different files, got {', '.join(files)}")


def main(arguments: list[str] | None = None) -> int:
    """Find the near-duplicates, and return the exit code."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
