"""Pages of neighbours: search results and pairs of near-duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.names import Place
from shard_embedder.pipeline.output.stored import open_output
from shard_embedder.pipeline.pages.html import render
from shard_embedder.pipeline.pages.links import DUPLICATES, SEARCH, TITLES, links
from shard_embedder.pipeline.pages.previews import Preview, Tile, preview, previews, shown
from shard_embedder.pipeline.retrieval.duplicates import DuplicateCounts, Duplicates
from shard_embedder.pipeline.retrieval.index import Index, Neighbour
from shard_embedder.pipeline.retrieval.search import Hit, score_name


def duplicates_page(
    output: str,
    found: DuplicateCounts,
    threshold: float,
    drawn: list[Duplicates],
    notes: list[str],
    inputs: Sequence[str],
    tag_of: Callable[[str], str | None],
    page: Path | None = None,
) -> str:
    """A page of rows with their near-duplicates, whose images are read from the shards of `inputs`.

    Where it names none, they are looked for where they were embedded. `notes` say how far the pairs can be trusted.
    `page` is where the page will be stored: it links to the pages there.

    Raises:
        InputError: the inputs name no shard.
    """
    made = open_output(output).made
    places = {one.place for one in drawn} | {near.place for one in drawn for near in one.near}
    pictures = previews(inputs, made.settings.naming, places, tag_of, made.input_prefix)
    rows = [
        [
            Tile(pictures[one.place], "image", one.image_id, shown(one.place)),
            *_tiles(one.near, "cosine", pictures),
        ]
        for one in drawn
    ]
    numbers = [
        ("pairs", f"{found.num_pairs:,}"),
        ("least cosine of a pair", f"{threshold:g}"),
        ("embeddings compared", f"{found.num_rows:,}"),
        ("images shown, drawn at random", f"{len(drawn):,}"),
    ]
    return _page(DUPLICATES, made, output, numbers, notes, rows, page)


def search_page(index: Index, hits: Sequence[Hit], inputs: Sequence[str], page: Path | None = None) -> str:
    """A page of the queries with their neighbours, whose images are read from the shards of `inputs`.

    Where it names none, they are looked for where they were embedded. `page` is where the page will be stored: it
    links to the pages there.

    Raises:
        InputError: the inputs name no shard.
    """
    facts = index.facts
    places = {near.place for hit in hits for near in hit.neighbours}
    pictures = previews(inputs, facts.made.settings.naming, places, index.tag, facts.made.input_prefix)
    rows = [
        [
            Tile(_preview(hit.query.path), "query", Path(hit.query.name).name, hit.query.reason),
            *_tiles(hit.neighbours, score_name(facts.metric), pictures),
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


def _tiles(neighbours: Iterable[Neighbour], score: str, pictures: Mapping[Place, Preview]) -> list[Tile]:
    """Neighbours with what their score is called, and their previews."""
    return [
        Tile(pictures[near.place], f"{score} {near.score:.4f}", near.image_id, shown(near.place))
        for near in neighbours
    ]


def _preview(path: Path) -> Preview:
    try:
        return preview(path.read_bytes())
    except OSError as error:
        return Preview(None, str(error))
