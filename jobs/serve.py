#!/usr/bin/env python3
"""Serve a page that searches an index: drop an image, see its neighbours, click one to search by it.

Your images are embedded with the backbone, weights, preprocessing and precision that the index records. The page is
for this machine alone, unless --host names another address. Search needs FAISS: pip install faiss-cpu.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from shard_embedder.jobs.support.command import Parser, add_input_option, not_empty, run_command
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_USAGE

_EXIT_CODES = {
    EXIT_USAGE: "wrong usage: no index, no shard, other weights than those of the index, or a port that is taken",
    EXIT_FAILED: "a disk or a store failed",
}


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, got {text!r}")
    return int(text)


def parser() -> Parser:
    """The command line."""
    top = Parser("serve.py", description=__doc__, examples=["index/ --port 0"], exit_codes=_EXIT_CODES)
    top.add_argument("index", type=not_empty, metavar="INDEX", help="folder that index.py wrote")
    add_input_option(top)
    top.add_argument("--host", type=not_empty, default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    top.add_argument("--port", type=_port, default=8080, help="port, 0 for a free one (default: 8080)")
    top.add_argument(
        "--weights", metavar="W", help="path or URL of the weights, when the name in the index does not find them"
    )
    top.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    return top


def _run(flags: argparse.Namespace, tell: Callable[[str], None]) -> int:
    # PyArrow takes a while to import: --help does not need it.
    from shard_embedder.pipeline.retrieval.index import open_index  # noqa: PLC0415
    from shard_embedder.pipeline.retrieval.originals import find_input  # noqa: PLC0415

    index, shards = open_index(flags.index), find_input(flags.input).shards

    # torch takes seconds to import: wrong usage does not need it.
    from shard_embedder.pipeline.pages.live import open_live_search  # noqa: PLC0415
    from shard_embedder.pipeline.pages.server import serving  # noqa: PLC0415

    live = open_live_search(index, shards, flags.weights, flags.device)
    with serving(live, flags.host, flags.port) as served:
        if not served.is_loopback:
            tell(f"whoever reaches {served.url} sees the images of the index")
        print(f"searching {live.num_rows:,} embeddings at {served.url} until you press Ctrl-C", flush=True)
        while True:
            time.sleep(1)


def main(arguments: list[str] | None = None) -> int:
    """Serve until a signal, and return the exit code."""
    top = parser()
    return run_command(top, arguments, lambda flags: _run(flags, top.tell))


if __name__ == "__main__":
    sys.exit(main())
