"""Pages of neighbours: search results and pairs of near-duplicates."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from markupsafe import Markup

from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.names import Place
from shard_embedder.pipeline.output.stored import open_output
from shard_embedder.pipeline.pages.html import render
from shard_embedder.pipeline.pages.links import DUPLICATES, SEARCH, TITLES, links
from shard_embedder.pipeline.pages.previews import Preview, Tile, preview, previews, shown
from shard_embedder.pipeline.retrieval.duplicates import DuplicateCounts, Duplicates
from shard_embedder.pipeline.retrieval.index import Index, Neighbour
from shard_embedder.pipeline.retrieval.originals import Original, Originals
from shard_embedder.pipeline.retrieval.search import Hit, score_name
from shard_embedder.pipeline.shards.find import Shard


def duplicates_page(
    output: str,
    found: DuplicateCounts,
    threshold: float,
    drawn: list[Duplicates],
    notes: list[str],
    shards: Sequence[Shard],
    tag_of: Callable[[str], str | None],
    page: Path | None = None,
    originals: Originals | None = None,
) -> str:
    """A page of rows with their near-duplicates, whose images are read from `shards`.

    Without any, they are looked for where they were embedded. `notes` say how far the pairs can be trusted.
    `page` is where the page will be stored: it links to the pages there, and to the files that `originals` finds.

    Raises:
        OutputError: no output.
    """
    made = open_output(output).made
    of_place = {one.place: one.image_id for one in drawn} | {
        near.place: near.image_id for one in drawn for near in one.near
    }
    pictures = previews(shards, made.settings.naming, of_place, tag_of, made.input_prefix)
    named = _Named.of(of_place, pictures, page, originals)
    rows = [[named.tile("image", one.image_id, one.place), *_tiles(one.near, "cosine", named)] for one in drawn]
    numbers = [
        ("pairs", f"{found.num_pairs:,}"),
        ("least cosine of a pair", f"{threshold:g}"),
        ("embeddings compared", f"{found.num_rows:,}"),
        ("images shown, drawn at random", f"{len(drawn):,}"),
    ]
    return _page(DUPLICATES, made, output, numbers, notes, rows, page)


def search_page(
    index: Index,
    hits: Sequence[Hit],
    shards: Sequence[Shard],
    page: Path | None = None,
    originals: Originals | None = None,
) -> str:
    """A page of the queries with their neighbours, whose images are read from `shards`.

    Without any, they are looked for where they were embedded. `page` is where the page will be stored: it links to
    the pages there, and to the files that `originals` finds.
    """
    facts = index.facts
    of_place = {near.place: near.image_id for hit in hits for near in hit.neighbours}
    pictures = previews(shards, facts.made.settings.naming, of_place, index.tag, facts.made.input_prefix)
    named = _Named.of(of_place, pictures, page, originals)
    rows = [
        [
            Tile(_preview(hit.query.path), "query", Path(hit.query.name).name, hit.query.reason),
            *_tiles(hit.neighbours, score_name(facts.metric), named),
        ]
        for hit in hits
    ]
    numbers = [
        ("query images", f"{len(hits):,}"),
        ("embeddings in the index", f"{facts.num_rows:,}"),
        ("index", facts.kind),
        ("recall@10 of the index", f"{facts.recall:.3f}"),
    ]
    return _page(SEARCH, facts.made, facts.output, numbers, [], rows, page)


def _page(
    kind: str,
    made: Fingerprint,
    output: str,
    numbers: list[tuple[str, str]],
    notes: list[str],
    rows: list[list[Tile]],
    page: Path | None,
) -> str:
    values = {
        "kind": kind,
        "title": TITLES[kind],
        "backbone": made.settings.backbone,
        "weights": made.versions.get("weights", "?"),
        "output": output,
        "numbers": numbers,
        "notes": notes,
        "rows": rows,
        "links": links(page, output),
    }
    return render("near.html.j2", values)


class _Named(NamedTuple):
    """Rows with their previews and originals, for the page at a place."""

    pictures: Mapping[Place, Preview]
    originals: Mapping[Place, Original]
    page: Path | None

    @classmethod
    def of(
        cls,
        of_place: Mapping[Place, str],
        pictures: Mapping[Place, Preview],
        page: Path | None,
        originals: Originals | None,
    ) -> _Named:
        found = {} if originals is None else originals.find((name, place) for place, name in of_place.items())
        return cls(pictures, found, page)

    def tile(self, label: str, image_id: str, place: Place) -> Tile:
        """One row. Its path comes first, where it names one."""
        original = self.originals.get(place)
        if original is None:
            return Tile(self.pictures[place], label, image_id, shown(place))
        where = shown(place) if original.path == image_id else f"{image_id} in {shown(place)}"
        file, page = original.file, self.page
        href = None if file is None or page is None else _href(file, page)
        return Tile(self.pictures[place], label, original.path, where, href)


def _tiles(neighbours: Iterable[Neighbour], score: str, named: _Named) -> list[Tile]:
    """Neighbours with what their score is called."""
    return [named.tile(f"{score} {near.score:.4f}", near.image_id, near.place) for near in neighbours]


def _href(file: Path, page: Path) -> Markup:
    """Where a file is from a page. Nothing in it acts: what is no letter or digit is quoted."""
    return Markup(quote(os.fsencode(os.path.relpath(file.resolve(), page.resolve().parent))))


def _preview(path: Path) -> Preview:
    try:
        return preview(path.read_bytes())
    except OSError as error:
        return Preview(None, str(error))
