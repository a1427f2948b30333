#!/usr/bin/env python3
"""Find the images of an index that are nearest to yours.

Your images are embedded with the backbone, weights, preprocessing and precision that the index records. Search
needs FAISS: pip install faiss-cpu.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shard_embedder.jobs.support.command import (
    Parser,
    add_page_options,
    at_least,
    check_page_options,
    from_here,
    not_empty,
    run_command,
)
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from shard_embedder.pipeline.core.formatting import one_line
from shard_embedder.pipeline.core.writing import write_whole
from shard_embedder.pipeline.shards.keys import printable

if TYPE_CHECKING:
    from shard_embedder.pipeline.retrieval.originals import Originals
    from shard_embedder.pipeline.retrieval.search import Hit

EXIT_SOME_FAILED = 1
_EXIT_CODES = {
    EXIT_OK: "every image was searched for",
    EXIT_SOME_FAILED: "some images could not be embedded; standard error names each",
    EXIT_USAGE: "wrong usage: no index, no image, or other weights than those of the index",
    EXIT_FAILED: "a disk or a store failed",
}


def parser() -> Parser:
    """The command line."""
    examples = ["index/ photo.jpg", "index/ queries/ --top 10 --html near.html"]
    top = Parser("search.py", description=__doc__, examples=examples, exit_codes=_EXIT_CODES)
    top.add_argument("index", type=not_empty, metavar="INDEX", help="folder that index.py wrote")
    top.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or a folder of them")
    top.add_argument("--top", type=at_least(1), default=5, metavar="N", help="neighbours of each image (default: 5)")
    top.add_argument(
        "--with-self", action="store_true", help="list your image among its neighbours too, if it is in the index"
    )
    top.add_argument(
        "--weights", metavar="W", help="path or URL of the weights, when the name in the index does not find them"
    )
    top.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    top.add_argument("--json", action="store_true", help="print JSON: a list with one object for each image")
    add_page_options(top, "a page with the images")
    return top


def show(hit: Hit, score: str, originals: Originals) -> None:
    """Print a query with its neighbours, by their files where they are here; `score` is what scores are called."""
    files = originals.files((near.image_id, near.place) for near in hit.neighbours)
    # Paths and ids may hold characters that a terminal would obey.
    print(f"{one_line(hit.query.name)}  {f'({score})' if hit.neighbours else '-'}")
    for rank, near in enumerate(hit.neighbours, 1):
        place = f"{one_line(near.shard)}[{near.sample_index}]"
        name = from_here(files[near.place]) if near.place in files else near.image_id
        print(f"  {rank:>3}  {near.score:.6f}  {one_line(name)}  {place}")


def as_dict(hit: Hit, originals: Originals) -> dict[str, object]:
    """A query with its neighbours, for JSON; `file` is the image's, where it is on this machine."""
    files = originals.files((near.image_id, near.place) for near in hit.neighbours)
    neighbours = [
        near._asdict() | {"file": printable(str(files[near.place])) if near.place in files else None}
        for near in hit.neighbours
    ]
    return {"query": hit.query.name, "reason": hit.query.reason or None, "neighbours": neighbours}


def _run(flags: argparse.Namespace, tell: Callable[[str], None]) -> int:
    # PyArrow takes a while to import: --help does not need it.
    from shard_embedder.pipeline.retrieval.index import open_index  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.originals import Originals  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.query_files import find_images  # noqa: PLC0415

    shards, folder = check_page_options(flags)
    images = find_images(flags.images)
    index = open_index(flags.index)
    originals = Originals.of_index(index, folder)

    # torch takes seconds to import: wrong usage does not need it.
    from shard_embedder.pipeline.embedding.queries import QueryEmbedder  # noqa: PLC0415
    from shard_embedder.pipeline.pages.near import search_page  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.search import score_name, search_images  # noqa: PLC0415

    embedder = QueryEmbedder(index.facts.made, flags.weights, flags.device)
    hits: list[Hit] = []
    num_failed = 0
    for hit in search_images(index, embedder, images, flags.top, with_self=flags.with_self):
        if hit.query.reason:
            num_failed += 1
            tell(f"{one_line(hit.query.name)}: {hit.query.reason}")
        elif not flags.json:
            show(hit, score_name(index.facts.metric), originals)
        if flags.json or flags.html:
            hits.append(hit)
    if flags.json:
        print(json.dumps([as_dict(hit, originals) for hit in hits], indent=2, ensure_ascii=False))
    if flags.html:
        page = Path(flags.html)
        text = search_page(index, hits, shards, page, originals)
        with write_whole(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        if not flags.json:
            print(f"written to {one_line(flags.html)}")
    return EXIT_SOME_FAILED if num_failed else EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Search, and return the exit code."""
    top = parser()
    return run_command(top, arguments, lambda flags: _run(flags, top.tell))


if __name__ == "__main__":
    sys.exit(main())
