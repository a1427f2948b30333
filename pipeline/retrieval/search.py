"""Finds the nearest embeddings of an index for image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import numpy as np

from shard_embedder.pipeline.embedding.queries import BATCH_SIZE, Query, QueryEmbedder
from shard_embedder.pipeline.retrieval.index import Index, Neighbour

# Of 1: embeddings of one image in several precisions and on several devices differ by less.
_SAME = 5e-3


class Hit(NamedTuple):
    """A query without its embedding, and its neighbours, nearest first. A query with an error reason has none."""

    query: Query
    neighbours: list[Neighbour]


def search_images(
    index: Index, embedder: QueryEmbedder, images: Iterable[Path], count: int, *, with_self: bool = False
) -> Iterator[Hit]:
    """The `count` nearest neighbours of each image, in the order of the images.

    An image is no neighbour of its own: a row with its name for an id and its embedding is left out, unless it is
    asked for.
    """
    waiting: list[Query] = []
    for query in embedder(images):
        waiting.append(query)
        if len(waiting) == BATCH_SIZE:
            yield from _search(index, waiting, count, with_self)
            waiting = []
    yield from _search(index, waiting, count, with_self)


def _search(index: Index, queries: list[Query], count: int, with_self: bool) -> Iterator[Hit]:
    embeddings = [query.embedding for query in queries if query.embedding is not None]
    most = count if with_self else count + 1
    found = iter(index.search(np.stack(embeddings), most)) if embeddings else iter(())
    for query in queries:
        near = next(found) if query.embedding is not None else []
        if query.embedding is not None and not with_self:
            square = float(np.square(query.embedding, dtype=np.float64).sum()) or 1.0
            near = [one for one in near if not _is_itself(query, square, one, index.facts.metric)][:count]
        yield Hit(query._replace(embedding=None), near)


def _is_itself(query: Query, square: float, near: Neighbour, metric: str) -> bool:
    """Whether a neighbour has the query's name, as packing makes ids of paths, and as good as its embedding.

    `square` is that of the embedding's length: its inner product with itself.
    """
    ids = {near.image_id, unquote(near.image_id)}
    names = (f"/{query.name}", f"/{query.name.removesuffix(query.path.suffix)}")
    if not any(name.endswith(f"/{id}") for name in names for id in ids):
        return False
    # What is lacking to the score of the embedding with itself, as a share of `square`; l2 is a distance.
    lacking = {"cosine": 1 - near.score, "ip": 1 - near.score / square, "l2": near.score**2 / square / 2}[metric]
    return abs(lacking) <= _SAME


def score_name(metric: str) -> str:
    """What a score is called."""
    return {"cosine": "cosine", "ip": "inner product", "l2": "distance"}[metric]
