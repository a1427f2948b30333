"""Writes the data folder of an index: vectors, rows and parts, and then index.json, which makes it count."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.progress import Progress
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.output.stored import Output, StoredPart, stream
from shard_embedder.pipeline.retrieval.folder import PIECE_FILE, PIECE_NAME
from shard_embedder.pipeline.retrieval.index import (
    INDEX_FILE,
    LISTS_FILE,
    PARTS_FILE,
    PARTS_SCHEMA,
    ROW,
    ROWS_FILE,
    ROWS_SCHEMA,
    VECTORS_FILE,
    IndexFacts,
    sha256_of,
)
from shard_embedder.pipeline.retrieval.kinds import (
    IVF_TRAIN_ROWS,
    Vectors,
    add_rows,
    copy_without_rows,
    create_index,
    merge_on_disk,
    prepare_vectors,
    read_index,
    write_index,
)
from shard_embedder.pipeline.retrieval.recall import measure_recall

# Parts that the rows to train lists are drawn from: enough to see all of a sorted output.
_TRAIN_PARTS = 256
_ROW_GROUP_ROWS = 8192


def write_data(
    stored: Output,
    folder: Path,
    facts: IndexFacts,
    before: Path | None,
    kept: Sequence[StoredPart],
    new: Sequence[StoredPart],
    memory_bytes: int,
    on_progress: Progress,
) -> IndexFacts:
    """Write the data folder that `facts` names, and return the facts as index.json now has them.

    `before` is the data folder that already holds the parts `kept`; the parts `new` are added.
    """
    data = folder / facts.data
    data.mkdir()
    with _RowsWriter(data / ROWS_FILE, None if before is None else before / ROWS_FILE) as rows:
        if facts.kind == "ivf":
            index = _write_ivf(stored, data, before, facts, new, memory_bytes, rows, on_progress)
        else:
            index = (
                create_index(facts.kind, facts.num_features, facts.metric, 0)
                if before is None
                else read_index(before / VECTORS_FILE)
            )
            for values in _read_vectors(stored, facts, new, rows, on_progress):
                add_rows(index, values, index.ntotal)
            write_index(index, data / VECTORS_FILE)
    assert index.ntotal == facts.num_rows
    listed = pa.Table.from_pylist([part._asdict() for part in (*kept, *new)], schema=PARTS_SCHEMA)
    pq.write_table(listed, data / PARTS_FILE)
    on_progress("recall measured", 0, 1)
    measured = measure_recall(index)
    on_progress("recall measured", 1, 1)
    facts = replace(
        facts,
        width=measured.width,
        recall=round(measured.recall, 4),
        recall_queries=measured.num_queries,
        files={path.name: (path.stat().st_size, sha256_of(path)) for path in sorted(data.iterdir())},
    )
    for path in (*data.iterdir(), data, folder):
        _sync_to_disk(path)
    write_bytes(str(folder), INDEX_FILE, facts.as_json())
    return facts


def _read_vectors(
    stored: Output, facts: IndexFacts, parts: Sequence[StoredPart], rows: _RowsWriter, on_progress: Progress
) -> Iterator[Vectors]:
    """The embeddings of `parts`, prepared for the index; their ids go to `rows`."""
    total, done = sum(part.num_rows for part in parts), 0
    for piece in stream(stored, parts):
        rows.add(piece.ids)
        yield prepare_vectors(piece.vectors, facts.metric)
        done += len(piece.vectors)
        on_progress("rows indexed", done, total)


def _write_ivf(
    stored: Output,
    data: Path,
    before: Path | None,
    facts: IndexFacts,
    new: Sequence[StoredPart],
    memory_bytes: int,
    rows: _RowsWriter,
    on_progress: Progress,
) -> Any:
    """Write pieces that fit the memory, each an index of its own, and merge them into lists on disk."""
    pieces: list[Any] = []
    if before is None:
        trained = create_index("ivf", facts.num_features, facts.metric, facts.lists)
        trained.train(_draw_training_rows(stored, facts, new, on_progress))
    else:
        pieces.append(read_index(before / VECTORS_FILE))
        trained = copy_without_rows(pieces[0])
    piece, row = copy_without_rows(trained), rows.num_rows
    max_rows = max(1, memory_bytes // (2 * 4 * facts.num_features))

    def write_piece() -> None:
        path = data / PIECE_FILE.format(len(pieces))
        write_index(piece, path)
        pieces.append(read_index(path, is_piece=True))

    for values in _read_vectors(stored, facts, new, rows, on_progress):
        add_rows(piece, values, row)
        row += len(values)
        if piece.ntotal >= max_rows:
            write_piece()
            piece = copy_without_rows(trained)
    if piece.ntotal:
        write_piece()
    merged = merge_on_disk(trained, pieces, data / LISTS_FILE)
    write_index(merged, data / VECTORS_FILE)
    for path in data.iterdir():
        if PIECE_NAME.fullmatch(path.name):
            path.unlink()
    return merged


def _draw_training_rows(
    stored: Output, facts: IndexFacts, parts: Sequence[StoredPart], on_progress: Progress
) -> Vectors:
    """Rows [N, C] to train the lists with, drawn at random from parts drawn at random."""
    wanted = min(facts.num_rows, IVF_TRAIN_ROWS * facts.lists)
    drawn: list[StoredPart] = []
    available = 0
    for part in random.Random(0).sample(list(parts), len(parts)):
        if len(drawn) >= _TRAIN_PARTS and available >= wanted:
            break
        drawn.append(part)
        available += part.num_rows
    rng = np.random.default_rng(0)
    chosen: list[Vectors] = []
    count = 0
    for piece in stream(stored, drawn):
        share = -(-len(piece.vectors) * wanted // available)
        chosen.append(prepare_vectors(rng.permutation(piece.vectors)[:share], facts.metric))
        count += share
        on_progress("rows to train with", count, wanted)
    return np.concatenate(chosen)


class _RowsWriter:
    """Writes the ids of the rows, after those of an index before, in row groups of some thousand rows."""

    def __init__(self, path: Path, before: Path | None) -> None:
        self.num_rows = 0
        self._writer = pq.ParquetWriter(path, ROWS_SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        if before is not None:
            for batch in pq.ParquetFile(before).iter_batches(_ROW_GROUP_ROWS):
                self.add(pa.Table.from_batches([batch]).drop_columns(ROW))

    def __enter__(self) -> _RowsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def add(self, ids: pa.Table) -> None:
        """Add the next rows."""
        numbers = pa.array(np.arange(self.num_rows, self.num_rows + len(ids)), pa.int64())
        self._waiting.append(pa.Table.from_arrays([numbers, *ids.columns], schema=ROWS_SCHEMA))
        self.num_rows += len(ids)
        self._num_waiting += len(ids)
        if self._num_waiting >= _ROW_GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.concat_tables(self._waiting))
        self._waiting, self._num_waiting = [], 0


def _sync_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
