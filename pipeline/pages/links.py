"""Links from a page to the other pages that lie beside it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fsspec.implementations.local import LocalFileSystem

from shard_embedder.pipeline.core.errors import PipelineError
from shard_embedder.pipeline.core.storage import join, locate
from shard_embedder.pipeline.output.names import PAGE_FILE

RUN, SEARCH, DUPLICATES = "run", "search", "duplicates"
MAX_LINKS = 20
TITLES = {RUN: "Run report", SEARCH: "Nearest images", DUPLICATES: "Near-duplicates"}
_MARK = re.compile(rb'<meta name="generator" content="shard-embedder (\w+)">')
_FRONT_BYTES = 512


class Link(NamedTuple):
    """A page: what it is called, and where it is from the page that links to it."""

    title: str
    href: str


def links(page: Path | None, output: str) -> list[Link]:
    """Links for `page` to the pages in its folder, and to the report of `output` where that lies below the folder.

    A page that is not on this machine (None) has no links.
    """
    if page is None:
        return []
    report = local_path(output, PAGE_FILE)
    try:
        own = page.resolve()
        others = set(own.parent.glob("*.html"))
        if report is not None and report.resolve().is_relative_to(own.parent):
            others.add(report.resolve())
        kinds = {path: _kind(path) for path in sorted(others - {own}) if path.is_file()}
        found = {path.relative_to(own.parent).as_posix(): kind for path, kind in kinds.items() if kind in TITLES}
    except (OSError, ValueError):
        return []
    return [
        Link(f"{TITLES[kind]} ({path})", quote(os.fsencode(path))) for path, kind in list(found.items())[:MAX_LINKS]
    ]


def local_path(url: str, name: str) -> Path | None:
    """Where the file `name` below a URL is on this machine; None where the URL is elsewhere."""
    try:
        fs, path = locate(join(url, name))
    except (PipelineError, ValueError):
        return None
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def _kind(path: Path) -> str:
    """Which of our pages a file is; empty for any other."""
    with path.open("rb") as file:
        match = _MARK.search(file.read(_FRONT_BYTES))
    return match[1].decode() if match else ""
