"""Pages of neighbours: search results and pairs of near-duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pipeline.core.formatting import format_count
from pipeline.output.names import Place
from pipeline.output.stored import open_output
from pipeline.pages.html import render
from pipeline.pages.previews import Preview, Tile, preview, previews, shown
from pipeline.retrieval.duplicates import Duplicates
from pipeline.retrieval.index import Index, Neighbour
from pipeline.retrieval.search import Hit, score_name


def duplicates_page(
    output: str, drawn: list[Duplicates], lines: list[str], inputs: Sequence[str], tag_of: Callable[[str], str | None]
) -> str:
    """A page of rows with their near-duplicates, whose images are read from the shards of `inputs`.

    Where it names none, they are looked for where they were embedded.

    Raises:
        InputError: the inputs name no shard.
    """
    made = open_output(output).made
    places = {one.place for one in drawn} | {near.place for one in drawn for near in one.near}
    found = previews(inputs, made.settings.image_member, places, tag_of, made.input_prefix)
    rows = [
        [Tile(found[one.place], one.image_id, shown(one.place)), *_tiles(one.near, "cosine", found)] for one in drawn
    ]
    return render("near.html.j2", {"title": "Near-duplicates", "lines": lines, "rows": rows})


def search_page(index: Index, hits: Sequence[Hit], inputs: Sequence[str]) -> str:
    """A page of the queries with their neighbours, whose images are read from the shards of `inputs`.

    Where it names none, they are looked for where they were embedded.

    Raises:
        InputError: the inputs name no shard.
    """
    facts = index.facts
    places = {near.place for hit in hits for near in hit.neighbours}
    found = previews(inputs, facts.made.settings.image_member, places, index.tag, facts.made.input_prefix)
    rows = [
        [
            Tile(_preview(hit.query.path), Path(hit.query.name).name, hit.query.reason or "query"),
            *_tiles(hit.neighbours, score_name(facts.metric), found),
        ]
        for hit in hits
    ]
    lines = [
        f"{format_count(len(hits), 'query image')} in {format_count(facts.num_rows, 'embedding')} of {facts.output}",
        f"{facts.made.settings.backbone}, weights {facts.made.versions.get('weights', '?')}; {facts.kind} index, "
        f"recall@10 {facts.recall:.3f}",
    ]
    return render("near.html.j2", {"title": "Nearest images", "lines": lines, "rows": rows})


def _tiles(neighbours: Iterable[Neighbour], score: str, found: Mapping[Place, Preview]) -> list[Tile]:
    """Neighbours with what their score is called, and their previews."""
    return [
        Tile(found[near.place], near.image_id, f"{score} {near.score:.4f}, {shown(near.place)}")
        for near in neighbours
    ]


def _preview(path: Path) -> Preview:
    try:
        return preview(path.read_bytes())
    except OSError as error:
        return Preview(None, str(error))
