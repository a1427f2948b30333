"""A small, bounded sample of an output's embeddings, and what can be seen of it: lengths, a plane, neighbours.

The sample is a look and no measure: it is taken from the fronts of parts, and the parts from the fronts of shards,
because the images can be read from there without reading whole shards.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.schema import EMBEDDING, IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.core.storage import join, locate
from shard_embedder.pipeline.output.ledger import list_parts
from shard_embedder.pipeline.output.names import EMBEDDINGS, PartName, Place, version_tag
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.output.stored import unit
from shard_embedder.pipeline.shards.find import Shard

MAX_ROWS = 2000
MAX_PARTS = 20
# Of the embeddings as they are stored, before compression.
MAX_BYTES = 64 * 2**20
MAX_S = 10.0
MAX_LISTED = 100_000
SEED = 0
_BUFFER_BYTES = 2**20
# Directions that are looked for beside the two wanted, and rounds of looking: see `plane`.
_PROBES = 12
_ROUNDS = 8
# Unit vectors whose variance, all coordinates together, is below this are equal but for rounding.
_NO_VARIANCE = 1e-9

_T = TypeVar("_T")
Vectors = np.ndarray[Any, np.dtype[np.float32]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Sample:
    """Some rows of an output: their ids, where they are, and their embeddings, float32 [N, C].

    Of feature maps [C, H, W] these are the means over the grid. `num_stored` counts the output's parts, of which
    `num_read` were looked into; `is_cut` says that there are more, which were not listed. `faults` tells of parts
    that could not be read.
    """

    ids: list[str]
    places: list[Place]
    vectors: Vectors
    is_map: bool
    num_read: int
    num_stored: int
    is_cut: bool
    faults: list[str] = field(default_factory=list)


def take_sample(output: str, shards: Mapping[str, Shard], opened: Collection[str]) -> Sample:
    """At most `MAX_ROWS` rows from the fronts of at most `MAX_PARTS` parts, in about `MAX_S` seconds.

    Parts of another version than that of `shards` are left out. Of those there are, half and more are of the `opened`
    shards, as far as they have so many; the first parts of shards come first, spread evenly over the names.

    Raises:
        OutputError: the output cannot be listed.
    """
    ends = time.monotonic() + MAX_S
    parts: list[PartName] = []
    is_cut = False
    for part, _ in list_parts(output, EMBEDDINGS):
        if len(parts) == MAX_LISTED or time.monotonic() > ends:
            is_cut = True
            break
        shard = shards.get(part.shard)
        if shard is None or version_tag(shard.num_bytes, shard.version) == part.tag:
            parts.append(part)
    of_opened = [part for part in parts if part.shard in opened]
    others = [part for part in parts if part.shard not in opened]
    chosen = spread(of_opened, MAX_PARTS - min(len(others), MAX_PARTS // 2))
    chosen += spread(others, MAX_PARTS - len(chosen))
    ids: list[str] = []
    places: list[Place] = []
    pieces: list[Vectors] = []
    faults: list[str] = []
    is_map = False
    ends = time.monotonic() + MAX_S
    for number, part in enumerate(chosen):
        if time.monotonic() > ends:
            faults.append(f"{len(chosen) - number} more parts were not read within {MAX_S:.0f} s")
            break
        try:
            table = _front(output, part, len(chosen))
            values = vectors(table)
        # What pyarrow and the store may raise on a part that is broken, gone or out of reach.
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            faults.append(f"{part}: {describe(error)}")
            continue
        if values.ndim > 2:
            is_map = True
            values = values.mean(axis=tuple(range(2, values.ndim)), dtype=np.float32)
        ids += table.column(IMAGE_ID).to_pylist()
        indices = table.column(SAMPLE_INDEX).to_pylist()
        places += zip(table.column(SHARD).to_pylist(), indices, strict=True)
        pieces.append(values.astype(np.float32, copy=False))
    found = np.concatenate(pieces) if pieces else np.zeros((0, 0), np.float32)
    return Sample(ids, places, found, is_map, len(pieces), len(parts), is_cut, faults)


def spread(parts: Iterable[PartName], most: int) -> list[PartName]:
    """At most `most` of `parts`: those with the lowest numbers, evenly over the names where there are too many."""
    chosen: list[PartName] = []
    ordered = sorted(parts, key=lambda part: (part.part, part))
    for _, level in itertools.groupby(ordered, key=lambda part: part.part):
        chosen += evenly(list(level), most - len(chosen))
        if len(chosen) == most:
            break
    return chosen


def evenly(items: Sequence[_T], most: int) -> list[_T]:
    """At most `most` of `items`, at equal distances."""
    count = min(len(items), most)
    return [items[number * len(items) // count] for number in range(count)]


def _front(output: str, part: PartName, num_parts: int) -> pa.Table:
    """The first rows of a part, which is read no further: so many that `num_parts` parts keep the bounds."""
    fs, path = locate(join(output, f"{EMBEDDINGS}/{part}"))
    with fs.open(path, "rb") as opened:
        # A buffer: else pyarrow reads all of a column before its first row.
        file = pq.ParquetFile(opened, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        kind = file.schema_arrow.field(EMBEDDING).type
        storage = getattr(kind, "storage_type", kind)
        row_bytes = storage.list_size * storage.value_type.bit_width // 8
        wanted = max(1, min(MAX_ROWS // num_parts, MAX_BYTES // num_parts // row_bytes))
        batches: list[pa.RecordBatch] = []
        for batch in file.iter_batches(wanted, columns=[IMAGE_ID, SHARD, SAMPLE_INDEX, EMBEDDING], use_threads=False):
            batches.append(batch.slice(0, wanted))
            wanted -= len(batches[-1])
            if wanted <= 0:
                break
        columns = pa.schema([file.schema_arrow.field(name) for name in (IMAGE_ID, SHARD, SAMPLE_INDEX, EMBEDDING)])
        return pa.Table.from_batches(batches, columns)


def norms(values: Vectors) -> Numbers:
    """L2 length of each row of [N, C], as float64 [N]."""
    lengths: Numbers = np.linalg.norm(values.astype(np.float64), axis=1)
    return lengths


class Plane(NamedTuple):
    """Where rows lie on their two principal components, [N, 2], and the share of the variance along each."""

    points: Numbers
    explained: tuple[float, float]


def plane(values: Vectors) -> Plane | None:
    """The first two principal components of rows [N, C] scaled to length 1; None where all are equal.

    By a singular value decomposition of the rows less their mean, projected on the few directions in which they
    reach furthest: an exact one of 2,000 rows takes half a minute on two cores. Source: Halko, Martinsson and Tropp,
    "Finding structure with randomness", SIAM Review 53 (2011), algorithms 4.4 and 5.1.
    """
    if len(values) < 2:
        return None
    rows = unit(values)
    centred = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    variance = float(np.square(centred, dtype=np.float64).sum())
    if variance <= _NO_VARIANCE * len(rows):
        return None
    probes = np.random.default_rng(SEED).standard_normal((centred.shape[1], _PROBES)).astype(np.float32)
    basis = np.linalg.qr(centred @ probes)[0]
    for _ in range(_ROUNDS):
        basis = np.linalg.qr(centred @ np.linalg.qr(centred.T @ basis)[0])[0]
    _, singular, components = np.linalg.svd(basis.T @ centred, full_matrices=False)
    # One column has one component.
    two = components[:2]
    # The sign of a component is no property of the rows.
    two = two * np.where(two[np.arange(len(two)), np.abs(two).argmax(axis=1)] < 0, -1, 1)[:, None]
    points = np.zeros((len(rows), 2))
    points[:, : len(two)] = centred @ two.T
    shares = [float(value) ** 2 / variance for value in singular[:2]] + [0.0]
    return Plane(points, (shares[0], shares[1]))


class Near(NamedTuple):
    """A row, and its nearest with their cosines, the nearest first."""

    row: int
    others: list[tuple[int, float]]


def neighbours(values: Vectors, rows: Sequence[int], num_queries: int, count: int) -> list[Near]:
    """Of the `rows` of [N, C], some drawn with a fixed seed, each with the `count` others of highest cosine."""
    if len(rows) < 2:
        return []
    drawn = np.random.default_rng(SEED).choice(len(rows), min(num_queries, len(rows)), replace=False)
    units = unit(values[list(rows)])
    found = []
    for query in drawn.tolist():
        cosines = units @ units[query]
        # Of equal ones the first; never itself, nor is another like it taken for itself.
        order = [other for other in np.argsort(-cosines, kind="stable").tolist() if other != query][:count]
        found.append(Near(rows[query], [(rows[other], float(cosines[other])) for other in order]))
    return found
