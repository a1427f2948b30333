#!/usr/bin/env python3
"""Find the images of an index that are nearest to yours.

Your images are embedded with the backbone, weights, preprocessing and precision that made the index: they
stand in it. Needs the extra `index`: pip install 'shard-embedder[index]'.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.support.command import Parser, at_least, check_page, not_empty
from pipeline.core.errors import PipelineError
from pipeline.verify.findings import one_line

if TYPE_CHECKING:
    from pipeline.retrieval.search import Hit

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
_EPILOG = """\
exit codes:
  0    every image was searched for
  1    some images could not be embedded; each is named on standard error
  2    wrong usage: no index, no image, or other weights than those of the index
  130  interrupted
"""


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="search.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    top.add_argument("index", type=not_empty, metavar="INDEX", help="folder that index.py wrote")
    top.add_argument("images", metavar="IMAGE", nargs="+", help="image file, or a folder of them")
    top.add_argument("--top", type=at_least(1), default=5, metavar="N", help="neighbours of each image (default: 5)")
    top.add_argument(
        "--weights", metavar="W", help="the weights, where they cannot be had by the name in the index: a path or URL"
    )
    top.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    top.add_argument("--json", action="store_true", help="print JSON: a list, one object a query")
    top.add_argument("--html", type=not_empty, metavar="FILE", help="write a page with the images as well")
    top.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="URL",
        help="for --html: the shards, as named for embed.py (default: where they lay then)",
    )
    return top


def show(hit: Hit, name: str) -> None:
    """A query with its neighbours, as lines."""
    # Paths and ids may hold what a terminal would obey.
    print(f"{one_line(hit.query.name)}  {f'({name})' if hit.neighbours else '-'}")
    for rank, near in enumerate(hit.neighbours, 1):
        place = f"{one_line(near.shard)}[{near.sample_index}]"
        print(f"  {rank:>3}  {near.score:.6f}  {one_line(near.image_id)}  {place}")


def as_dict(hit: Hit) -> dict[str, object]:
    """A query with its neighbours, for JSON."""
    neighbours = [near._asdict() for near in hit.neighbours]
    return {"query": hit.query.name, "reason": hit.query.reason or None, "neighbours": neighbours}


def main(arguments: list[str] | None = None) -> int:
    """Search, and return the exit code."""
    top = parser()
    flags = top.parse_args(arguments)
    # torch takes seconds to import: who asks for help, or mistypes, shall not wait for it.
    from pipeline.embedding.queries import QueryEmbedder, find_images  # noqa: PLC0415
    from pipeline.pages.near import search_page  # noqa: PLC0415
    from pipeline.retrieval.index import open_index  # noqa: PLC0415
    from pipeline.retrieval.search import score_name, search_images  # noqa: PLC0415

    try:
        check_page(flags.html, flags.input)
        images = find_images(flags.images)
        index = open_index(flags.index)
        embedder = QueryEmbedder(index.facts.made, flags.weights, flags.device)
        hits: list[Hit] = []
        failed = 0
        for hit in search_images(index, embedder, images, flags.top):
            if hit.query.reason:
                failed += 1
                top.tell(f"{one_line(hit.query.name)}: {hit.query.reason}")
            elif not flags.json:
                show(hit, score_name(index.facts.metric))
            if flags.json or flags.html:
                hits.append(hit)
        if flags.json:
            print(json.dumps([as_dict(hit) for hit in hits], indent=2, ensure_ascii=False))
        if flags.html:
            Path(flags.html).write_text(search_page(index, hits, flags.input), encoding="utf-8")
    except (PipelineError, OSError) as error:
        top.tell(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        top.tell("interrupted")
        return EXIT_INTERRUPTED
    return EXIT_SOME_FAILED if failed else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
