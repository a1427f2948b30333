"""Finds the nearest embeddings of an index for image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_embedder.pipeline.embedding.queries import BATCH_SIZE, Query, QueryEmbedder
from shard_embedder.pipeline.retrieval.index import Index, Neighbour


class Hit(NamedTuple):
    """A query without its embedding, and its neighbours, nearest first. A query with an error reason has none."""

    query: Query
    neighbours: list[Neighbour]


def search_images(index: Index, embedder: QueryEmbedder, images: Iterable[Path], count: int) -> Iterator[Hit]:
    """The `count` nearest neighbours of each image, in the order of the images."""
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
