"""Pages of neighbours: search results and pairs of near-duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.core.formatting import format_count
from pipeline.output.names import Place
from pipeline.output.stored import open_output
from pipeline.pages.html import Tile, document, figure, safe, shown
from pipeline.pages.previews import SIDE, Preview, preview, previews
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
    found = previews(inputs, made.settings.naming, places, tag_of, made.input_prefix)
    rows = [
        Row(Tile(one.image_id, shown(one.place), found[one.place]), near_tiles(one.near, "cosine", found))
        for one in drawn
    ]
    return page("Near-duplicates", lines, rows)


_STYLE = f"""
section {{ display: flex; flex-wrap: wrap; gap: .8rem; padding: 1rem 0; border-top: 1px solid var(--line); }}
figure {{ width: {SIDE}px; }}
figure.head {{ margin-right: 1.6rem; }}
figure.head img {{ outline: 3px solid var(--accent); outline-offset: -3px; }}
@media (max-width: 560px) {{ figure {{ width: calc(50% - .4rem); }} figure.head {{ margin-right: 0; }} }}
"""


class Row(NamedTuple):
    """One image, and those near it."""

    head: Tile
    near: list[Tile]


def near_tiles(neighbours: Iterable[Neighbour], score: str, found: Mapping[Place, Preview]) -> list[Tile]:
    """Neighbours with what their score is called, and their previews."""
    return [
        Tile(
            near.image_id,
            f"{score} {near.score:.4f}, {shown(near.place)}",
            found[near.place],
        )
        for near in neighbours
    ]


def page(title: str, lines: Iterable[str], rows: Iterable[Row]) -> str:
    """The page as HTML. Every text is shown as it is."""
    said = "".join(f"<p>{safe(line)}</p>" for line in lines)
    body = "".join(
        f"<section>{figure(row.head, 'head')}{''.join(figure(tile, 'near') for tile in row.near)}</section>"
        for row in rows
    )
    return document(title, _STYLE, f"<h1>{safe(title)}</h1>{said}{body}")


def _preview(path: Path) -> Preview:
    try:
        return preview(path.read_bytes())
    except OSError as error:
        return Preview(None, str(error))


def search_page(index: Index, hits: Sequence[Hit], inputs: Sequence[str]) -> str:
    """A page of the queries with their neighbours, whose images are read from the shards of `inputs`.

    Where it names none, they are looked for where they were embedded.

    Raises:
        InputError: the inputs name no shard.
    """
    facts = index.facts
    places = {near.place for hit in hits for near in hit.neighbours}
    found = previews(inputs, facts.made.settings.naming, places, index.tag, facts.made.input_prefix)
    rows = [
        Row(
            Tile(Path(hit.query.name).name, hit.query.reason or "query", _preview(hit.query.path)),
            near_tiles(hit.neighbours, score_name(facts.metric), found),
        )
        for hit in hits
    ]
    said = [
        f"{format_count(len(hits), 'query image')} in {format_count(facts.num_rows, 'embedding')} of {facts.output}",
        f"{facts.made.settings.backbone}, weights {facts.made.versions.get('weights', '?')}; {facts.kind} index, "
        f"recall@10 {facts.recall:.3f}",
    ]
    return page("Nearest images", said, rows)
