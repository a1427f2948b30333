"""The demo's answer: the nearest neighbours of each stored embedding, how often they are right, and their picture."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from shard_embedder.pipeline.core.errors import InputError
from shard_embedder.pipeline.core.schema import IMAGE_ID
from shard_embedder.pipeline.output.names import EMBEDDINGS
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.output.stored import unit
from shard_embedder.pipeline.pages.sheet import Sheet

MAX_ROWS = 8
# Of more images than this, so many are drawn at random as queries.
MAX_QUERIES = 10_000


@dataclass(frozen=True)
class Stored:
    """The stored images in the order of their ids. `embeddings` is [N, C]."""

    ids: list[str]
    classes: list[str | None]
    paths: list[str | None]
    embeddings: np.ndarray[Any, np.dtype[np.float32]]

    @property
    def has_classes(self) -> bool:
        """Whether some neighbours can be right and others wrong."""
        return len(set(self.classes) - {None}) > 1


def read_stored(output: Path) -> Stored:
    """Read the embeddings of an output. Raises `InputError` where there are none."""
    table = pq.read_table(output / EMBEDDINGS).sort_by(IMAGE_ID)
    if len(table) == 0:
        raise InputError(f"no image could be embedded; the reasons are in {output}/errors")
    return Stored(
        ids=table[IMAGE_ID].to_pylist(),
        classes=table["class"].to_pylist(),
        paths=table["path"].to_pylist(),
        embeddings=vectors(table).astype(np.float32),
    )


class Neighbours(NamedTuple):
    """The nearest other images of some queries, nearest first.

    `queries` [Q] and `rows` [Q, K] are rows of the embeddings; `cosines` is [Q, K].
    """

    queries: np.ndarray[Any, np.dtype[np.intp]]
    rows: np.ndarray[Any, np.dtype[np.intp]]
    cosines: np.ndarray[Any, np.dtype[np.float32]]


def find_neighbours(
    embeddings: np.ndarray[Any, np.dtype[np.float32]], count: int, max_queries: int = MAX_QUERIES
) -> Neighbours:
    """The `count` nearest of all other `embeddings` [N, C] by cosine, fewer if there are fewer. N is at least 2."""
    num_images = len(embeddings)
    count = min(count, num_images - 1)
    drawn = random.Random(0).sample(range(num_images), min(num_images, max_queries))
    queries = np.array(sorted(drawn), np.intp)
    scaled = unit(embeddings)
    rows = np.empty((len(queries), count), np.intp)
    cosines = np.empty((len(queries), count), np.float32)
    step = max(1, 2**24 // num_images)
    for start in range(0, len(queries), step):
        chunk = queries[start : start + step]
        similar = scaled[chunk] @ scaled.T
        similar[np.arange(len(chunk)), chunk] = -np.inf
        nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similar, nearest, axis=1), axis=1, kind="stable")
        rows[start : start + step] = np.take_along_axis(nearest, order, axis=1)
        cosines[start : start + step] = np.take_along_axis(similar, rows[start : start + step], axis=1)
    return Neighbours(queries, rows, cosines)


class Score(NamedTuple):
    """How often the first neighbour is of the query's class, and how often it would be by chance."""

    right: int
    total: int
    chance: float


def score(classes: list[str | None], neighbours: Neighbours) -> Score:
    """Count over the queries whose class another image has too."""
    sizes = Counter(classes)
    nearest = zip(neighbours.queries.tolist(), neighbours.rows[:, 0].tolist(), strict=True)
    pairs = [(query, row) for query, row in nearest if classes[query] is not None and sizes[classes[query]] > 1]
    right = sum(classes[query] == classes[row] for query, row in pairs)
    chance = sum((sizes[classes[query]] - 1) / (len(classes) - 1) for query, _ in pairs) / max(len(pairs), 1)
    return Score(right, len(pairs), chance)


def describe_score(stored: Stored, neighbours: Neighbours, noun: str) -> str:
    """The score as a sentence; `noun` is what a class is."""
    if not stored.has_classes:
        return "all images are of one folder: nothing tells right from wrong"
    right, total, chance = score(stored.classes, neighbours)
    share = right / max(total, 1)
    return (
        f"the nearest neighbour is of the same {noun} for {right} of {total} images = {share:.1%} "
        f"(by chance {chance:.1%})"
    )


def choose_rows(labels: list[str | None], count: int) -> list[int]:
    """`count` positions in order, drawn from as many labels as possible. They are random, and the same every time."""
    seen: Counter[str | None] = Counter()
    turns: list[tuple[int, int, int]] = []
    for position in random.Random(0).sample(range(len(labels)), len(labels)):
        turns.append((seen[labels[position]], len(turns), position))
        seen[labels[position]] += 1
    return sorted(position for _, _, position in sorted(turns)[:count])


def draw_sheet(stored: Stored, neighbours: Neighbours, images: Path, lines: list[str], alarm: str) -> Image.Image:
    """A contact sheet of some queries, drawn at random, and their neighbours.

    Args:
        images: the folder that the images' paths start from.
        lines: texts below the title.
        alarm: a warning, or empty.
    """
    chosen = choose_rows([stored.classes[query] for query in neighbours.queries], MAX_ROWS)
    sheet = Sheet(len(chosen), neighbours.rows.shape[1])
    ticked = ", right ones ticked" if stored.has_classes else ""
    drawn = f"shown: {len(chosen)} of {len(neighbours.queries)} queries, drawn at random{ticked}"
    sheet.header("Nearest neighbours by cosine", [lines[0], "  |  ".join([drawn, *lines[1:]])], alarm)
    for row, position in enumerate(chosen):
        query = int(neighbours.queries[position])
        label = stored.classes[query]
        sheet.tile(row, 0, images / (stored.paths[query] or ""), stored.ids[query], "query", None)
        nearest = zip(neighbours.rows[position].tolist(), neighbours.cosines[position].tolist(), strict=True)
        for column, (other, cosine) in enumerate(nearest, 1):
            is_right = stored.classes[other] == label if stored.has_classes and label is not None else None
            path = images / (stored.paths[other] or "")
            sheet.tile(row, column, path, stored.ids[other], f"cosine {cosine:.3f}", is_right)
    return sheet.image
