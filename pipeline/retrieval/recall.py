"""How many of the true nearest neighbours an index finds: measured, not assumed."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np

from pipeline.retrieval.kinds import Vectors, held, load_faiss, search_rows, widths

NEAREST = 10
NUM_QUERIES = 100
# A search as wide as it takes to find this share, as long as there is a wider one.
TARGET = 0.95
# The same score computed in another order of additions.
_TOLERANCE = 1e-5


class Recall(NamedTuple):
    """recall@10 of `num_queries` rows of the index, and the width of search that gives it."""

    recall: float
    num_queries: int
    width: int


def measure(index: Any) -> Recall:
    """Search for rows of the index, narrow and then wider, until nine of ten neighbours and more are found.

    The true neighbours are those of every row that the index holds, compared one by one. A row itself
    does not count as its neighbour. A neighbour as near as the tenth counts as one of the ten: where
    several are equally near, any of them is right.
    """
    rows = sorted(random.Random(0).sample(range(index.ntotal), min(NUM_QUERIES, index.ntotal)))
    count = min(NEAREST, index.ntotal - 1)
    if count < 1:
        return Recall(1.0, 0, next(widths(index)))
    queries = _vectors_of(index, rows)
    exact = exact_scores(index, queries, rows, count)
    result = Recall(0.0, len(rows), 0)
    for width in widths(index):
        result = Recall(_recall(index, queries, rows, exact, width), len(rows), width)
        if result.recall >= TARGET:
            break
    return result


def _vectors_of(index: Any, rows: list[int]) -> Vectors:
    found = np.zeros((len(rows), index.d), np.float32)
    for numbers, values in held(index):
        positions = np.searchsorted(rows, numbers)
        wanted = np.flatnonzero(np.array(rows)[np.minimum(positions, len(rows) - 1)] == numbers)
        found[positions[wanted]] = values[wanted]
    return found


def exact_scores(index: Any, queries: Vectors, own: list[int], count: int) -> np.ndarray[Any, Any]:
    """Scores of the `count` nearest other rows of each query, [Q, count] from best to worst; higher is nearer.

    `own` are the rows of the queries. For l2 the score is minus the square of the distance.
    """
    is_l2 = index.metric_type == load_faiss().METRIC_L2
    best = np.full((len(queries), count), -np.inf)
    for numbers, values in held(index):
        scores = queries @ values.T
        if is_l2:
            squares = (queries**2).sum(axis=1)[:, None] + (values**2).sum(axis=1)[None, :]
            scores = 2 * scores - squares
        scores[np.array(own)[:, None] == numbers[None, :]] = -np.inf
        best = np.sort(np.concatenate([best, scores], axis=1), axis=1)[:, -count:]
    return best[:, ::-1]


def _recall(index: Any, queries: Vectors, own: list[int], exact: np.ndarray[Any, Any], width: int) -> float:
    count = exact.shape[1]
    scores, rows = search_rows(index, queries, count + 1, width)
    if index.metric_type == load_faiss().METRIC_L2:
        scores = -(scores**2)
    others = (rows >= 0) & (rows != np.array(own)[:, None])
    # Sums of products are exact to a share of the largest of these.
    sizes = np.maximum((queries**2).sum(axis=1, keepdims=True), np.abs(exact[:, -1:]))
    least = exact[:, -1:] - _TOLERANCE * sizes
    hits = (others & (scores >= least)).sum(axis=1)
    return float(np.minimum(hits, count).mean() / count)
