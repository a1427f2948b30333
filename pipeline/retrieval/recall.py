"""How many of the true nearest neighbours an index finds, by measuring."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np

from shard_embedder.pipeline.retrieval.kinds import Vectors, iterate_rows, load_faiss, search_rows, search_widths

NEAREST = 10
NUM_QUERIES = 100
# The search is made wider until it finds this share.
TARGET = 0.95
# The same score, added up in another order, differs by this share.
_TOLERANCE = 1e-5


class Recall(NamedTuple):
    """recall@10 of `num_queries` rows of the index, and the width of search that gives it."""

    recall: float
    num_queries: int
    width: int


def measure_recall(index: Any) -> Recall:
    """Search for rows of the index, wider and wider, until the recall is `TARGET`.

    The true neighbours come from an exact search of all rows. A row is not its own neighbour. Every neighbour that
    is as near as the tenth counts as one of the ten: of several that are equally near, any is right.
    """
    rows = sorted(random.Random(0).sample(range(index.ntotal), min(NUM_QUERIES, index.ntotal)))
    count = min(NEAREST, index.ntotal - 1)
    if count < 1:
        return Recall(1.0, 0, next(search_widths(index)))
    queries = _read_rows(index, rows)
    exact = exact_scores(index, queries, rows, count)
    result = Recall(0.0, len(rows), 0)
    for width in search_widths(index):
        result = Recall(_recall(index, queries, rows, exact, width), len(rows), width)
        if result.recall >= TARGET:
            break
    return result


def _read_rows(index: Any, rows: list[int]) -> Vectors:
    """The embeddings [N, C] of `rows`."""
    found = np.zeros((len(rows), index.d), np.float32)
    for numbers, values in iterate_rows(index):
        _, positions, places = np.intersect1d(rows, numbers, assume_unique=True, return_indices=True)
        found[positions] = values[places]
    return found


def exact_scores(index: Any, queries: Vectors, rows: list[int], count: int) -> Vectors:
    """Scores of the `count` nearest other rows of each query, [Q, count], best first; higher is nearer.

    `queries` are the embeddings of `rows`. For l2 a score is minus the square of the distance. FAISS's own
    `contrib.exhaustive_search.knn_ground_truth` takes twice the time, and would find each row itself.
    """
    is_l2 = index.metric_type == load_faiss().METRIC_L2
    best: Vectors = np.full((len(queries), count), -np.inf, np.float32)
    for numbers, values in iterate_rows(index):
        scores = queries @ values.T
        if is_l2:
            squares = (queries**2).sum(axis=1)[:, None] + (values**2).sum(axis=1)[None, :]
            scores = 2 * scores - squares
        scores[np.array(rows)[:, None] == numbers[None, :]] = -np.inf
        best = np.sort(np.concatenate([best, scores], axis=1), axis=1)[:, -count:]
    return best[:, ::-1]


def _recall(index: Any, queries: Vectors, rows: list[int], exact: Vectors, width: int) -> float:
    count = exact.shape[1]
    scores, found = search_rows(index, queries, count + 1, width)
    if index.metric_type == load_faiss().METRIC_L2:
        scores = -(scores**2)
    others = (found >= 0) & (found != np.array(rows)[:, None])
    # A sum of products is exact to a share of the largest of them.
    sizes = np.maximum((queries**2).sum(axis=1, keepdims=True), np.abs(exact[:, -1:]))
    least = exact[:, -1:] - _TOLERANCE * sizes
    hits = (others & (scores >= least)).sum(axis=1)
    return float(np.minimum(hits, count).mean() / count)
