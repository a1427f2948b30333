"""Outputs for indexes, written without embedding anything, and the true neighbours in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shard_embedder.pipeline.core.config import Config, parse
from shard_embedder.pipeline.core.schema import (
    END_LAST,
    END_NONE,
    STAGES,
    embedding_field,
    part_row,
    sample_type,
)
from shard_embedder.pipeline.output.fingerprint import write_fingerprint
from shard_embedder.pipeline.output.parts import PartWriter
from shard_embedder.pipeline.retrieval.index import open_index
from tests.output.test_fingerprint import made as fingerprint

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def clusters(num_rows: int, num_features: int = 24, seed: int = 0) -> Vectors:
    """Embeddings [N, C] that lie around 40 centres, as real ones do, of lengths from 1 to 3."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, num_features))
    values = centres[rng.integers(0, 40, num_rows)] + 0.5 * rng.standard_normal((num_rows, num_features))
    values *= rng.uniform(1, 3, (num_rows, 1)) / np.linalg.norm(values, axis=1, keepdims=True)
    return values.astype(np.float32)


def store(output: Path, shard: str, values: Vectors, part_rows: int = 500) -> None:
    """The parts of one shard with chosen embeddings [N, C], as the job writes them."""
    config: Config = parse({"input": "in", "output": str(output), "part_rows": part_rows})
    shape = (values.shape[1],)
    made = replace(fingerprint(), settings=replace(fingerprint().settings, embedding_shape=shape))
    write_fingerprint(str(output), made)
    writer = PartWriter(config, made, shape)
    field = embedding_field(shape, "float32")
    kind = sample_type(field, ())
    for part, start in enumerate(range(0, len(values), part_rows)):
        some = values[start : start + part_rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), type=field.type)
        numbers = range(start, start + len(some))
        names = pa.array([f"{shard}-{number:06d}" for number in numbers])
        empty = pa.nulls(len(some), pa.string())
        columns = [pa.array(numbers, pa.int32()), names, empty, empty, empty, column]
        samples = pa.StructArray.from_arrays(columns, fields=list(kind))
        facts = {"name": shard, "url": f"{shard}.tar", "num_bytes": 1, "version": "1", "part": part}
        facts |= {"first_index": start, "num_samples": len(some), "fault": None, "fault_transient": False}
        facts |= {"end": END_LAST if start + part_rows >= len(values) else END_NONE, "ignored_members": 0}
        facts |= {"unused_images": 0, "unused_example": None, "apart_samples": 0, "kept": []}
        facts |= {"device_refused": 0, "device_refusal": None}
        facts |= {"kept_nulls": 0, "read_bytes": 0, "batch_size": 1, **{f"{stage}_s": 0.0 for stage in STAGES}}
        writer(part_row(facts, samples))


def true_neighbours(values: Vectors, queries: Vectors, metric: str, count: int) -> np.ndarray[Any, Any]:
    """The numbers of the nearest rows, in float64: [Q, count]."""
    wide, asked = values.astype(np.float64), queries.astype(np.float64)
    scores = -np.linalg.norm(asked[:, None] - wide[None], axis=2) if metric == "l2" else asked @ wide.T
    if metric == "cosine":
        scores /= np.linalg.norm(wide, axis=1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def numbers(index: Path, values: Vectors, count: int) -> list[list[int]]:
    """What a search of an index of `chosen` finds, as numbers of the chosen embeddings."""
    found = open_index(index).search(values, count)
    first = {"a": 0, "b": 1800, "c": 3000}
    return [[first[near.shard] + near.sample_index for near in row] for row in found]


def garble(path: Path, start: int, data: bytes = b"\xff" * 64) -> None:
    """Overwrite some bytes of a file, which keeps its size."""
    whole = path.read_bytes()
    start %= len(whole)
    path.write_bytes(whole[:start] + data + whole[start + len(data) :])
