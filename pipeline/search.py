"""Image files in, the nearest embeddings of an index out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import words
from pipeline.index import Index, Neighbour
from pipeline.pages import Row, Tile, near_tiles, page
from pipeline.previews import Preview, preview, previews
from pipeline.queries import BATCH_SIZE, Query, QueryEmbedder


class Hit(NamedTuple):
    """A query, without its embedding, and its nearest, nearest first; none where the query has a reason."""

    query: Query
    neighbours: list[Neighbour]


def search_images(index: Index, embedder: QueryEmbedder, images: Iterable[Path], count: int) -> Iterator[Hit]:
    """The `count` nearest of each image, in order."""
    waiting: list[Query] = []
    for query in embedder(images):
        waiting.append(query)
        if len(waiting) == BATCH_SIZE:
            yield from _search(index, waiting, count)
            waiting = []
    yield from _search(index, waiting, count)


def _search(index: Index, queries: list[Query], count: int) -> Iterator[Hit]:
    embeddings = [query.embedding for query in queries if query.embedding is not None]
    found = iter(index.search(np.stack(embeddings), count)) if embeddings else iter(())
    for query in queries:
        yield Hit(query._replace(embedding=None), next(found) if query.embedding is not None else [])


def score_name(metric: str) -> str:
    """What a score is called."""
    return {"cosine": "cosine", "ip": "inner product", "l2": "distance"}[metric]


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
    found = previews(inputs, facts.settings["image_member"], places, index.tag, facts.settings["input_prefix"])
    rows = [
        Row(
            Tile(Path(hit.query.name).name, hit.query.reason or "query", _preview(hit.query.path)),
            near_tiles(hit.neighbours, score_name(facts.metric), found),
        )
        for hit in hits
    ]
    said = [
        f"{words.count(len(hits), 'query image')} in {words.count(facts.num_rows, 'embedding')} of {facts.output}",
        f"{facts.settings['backbone']}, weights {facts.versions.get('weights', '?')}; {facts.kind} index, "
        f"recall@10 {facts.recall:.3f}",
    ]
    return page("Nearest images", said, rows)
