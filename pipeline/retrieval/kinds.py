"""The kinds of FAISS index: which one for how many rows, and what differs between them.

flat  compares a query with every embedding: exact. Up to `FLAT_ROWS` rows that fit the memory.
hnsw  a graph of neighbours over all embeddings, in memory. While embeddings and graph fit the memory.
ivf   lists of embeddings around centroids, on disk. Beyond that.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shard_embedder.pipeline.core.errors import SettingsError, StoredDataError
from shard_embedder.pipeline.output.stored import unit

KINDS = ("flat", "hnsw", "ivf")
METRICS = ("cosine", "ip", "l2")
# Up to here, comparing with every row takes milliseconds, and is exact.
FLAT_ROWS = 100_000
HNSW_LINKS = 32
HNSW_BUILD_WIDTH = 200
# Links of a row: twice HNSW_LINKS in the lowest level, of 4 bytes each, and few above.
_HNSW_ROW_BYTES = 8 * HNSW_LINKS + 32
# FAISS wants at least 39 rows a centroid, and gains little above this number.
IVF_TRAIN_ROWS = 64
_BLOCK_BYTES = 32 * 2**20
_FIRST_WIDTH = {"flat": 0, "hnsw": 64, "ivf": 8}
_LARGEST_HNSW_WIDTH = 2048
_ROW_NUMBER_BYTES = 8
BUILD_AGAIN = "remove the folder of the index, and build the index again"

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def load_faiss() -> Any:
    """The module `faiss`. Raises `SettingsError` that names the extra if it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        raise SettingsError(f"FAISS is needed: pip install faiss-cpu ({error})") from error


def choose_kind(num_rows: int, num_features: int, memory_bytes: int) -> str:
    """The kind for this many rows, by the rule above."""
    vector_bytes = 4 * num_rows * num_features
    if num_rows <= FLAT_ROWS and vector_bytes <= memory_bytes:
        return "flat"
    return "hnsw" if vector_bytes + _HNSW_ROW_BYTES * num_rows <= memory_bytes else "ivf"


def num_lists(num_rows: int, num_features: int, memory_bytes: int) -> int:
    """Lists of an ivf index: 4 times the root of its rows, or fewer so that training rows fit half the memory."""
    trainable = min(num_rows, memory_bytes // (8 * num_features)) // IVF_TRAIN_ROWS
    return max(1, min(round(4 * math.sqrt(num_rows)), trainable))


def prepare_vectors(values: Vectors, metric: str) -> Vectors:
    """Embeddings [N, C] as the index holds them: scaled to length 1 for cosine."""
    return unit(values) if metric == "cosine" else np.ascontiguousarray(values, np.float32)


def create_index(kind: str, num_features: int, metric: str, lists: int) -> Any:
    """An empty index. An ivf index has `lists` lists and is not trained yet."""
    faiss = load_faiss()
    measure = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    if kind == "flat":
        return faiss.IndexFlat(num_features, measure)
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(num_features, HNSW_LINKS, measure)
        index.hnsw.efConstruction = HNSW_BUILD_WIDTH
        return index
    index = faiss.IndexIVFFlat(faiss.IndexFlat(num_features, measure), num_features, lists, measure)
    index.cp.min_points_per_centroid = 1  # train on few rows too, without a warning
    return index


def add_rows(index: Any, values: Vectors, first_row: int) -> None:
    """Add prepared embeddings [N, C] as the rows from `first_row`."""
    if hasattr(index, "nlist"):
        index.add_with_ids(values, np.arange(first_row, first_row + len(values), dtype=np.int64))
    else:
        assert index.ntotal == first_row
        index.add(values)


def merge_on_disk(trained: Any, pieces: Sequence[Any], lists_path: Path) -> Any:
    """One ivf index of all rows of ivf `pieces`, with its lists in the file `lists_path`, never all in memory.

    `trained` is the empty index that the pieces were copied from. Raises `OSError` if the disk has too little space.

    FAISS's own `contrib.ondisk.merge_ondisk` finds the lists of a piece at the path where they were written, so that
    nothing could be added to an index that was moved.
    """
    faiss = load_faiss()
    # FAISS writes to a memory map of the file: a full disk would kill the process.
    needed = sum(piece.ntotal for piece in pieces) * (trained.code_size + _ROW_NUMBER_BYTES)
    if shutil.disk_usage(lists_path.parent).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(lists_path))
    lists = faiss.OnDiskInvertedLists(trained.nlist, trained.code_size, str(lists_path))
    pointers = faiss.InvertedListsPtrVector()
    for piece in pieces:
        pointers.push_back(piece.invlists)
    with _stdout_to_stderr():
        trained.ntotal = lists.merge_from_multiple(pointers.data(), pointers.size(), False)
    trained.replace_invlists(lists, True)
    lists.this.disown()
    return trained


def copy_without_rows(index: Any) -> Any:
    """An empty ivf index with the trained lists of `index`."""
    faiss = load_faiss()
    measure = index.metric_type
    quantizer = faiss.IndexFlat(index.d, measure)
    quantizer.add(index.quantizer.reconstruct_n(0, index.nlist))
    return faiss.IndexIVFFlat(quantizer, index.d, index.nlist, measure)


def write_index(index: Any, path: Path) -> None:
    """Write an index to a local file. Raises `OSError` if the disk is full, or the like."""
    try:
        load_faiss().write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(f"{_last_line(error)}: {str(path)!r}") from error


def read_index(path: Path, *, is_piece: bool = False) -> Any:
    """Read an index. The lists of an ivf index stay on disk: in the same file for a piece, else in another.

    Raises:
        StoredDataError: it cannot be read.
    """
    faiss = load_faiss()
    # With this flag FAISS maps lists in the same file, and does not map those in another.
    flags = faiss.IO_FLAG_MMAP if is_piece else 0
    try:
        with _stdout_to_stderr():
            return faiss.read_index(str(path), flags | faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR)
    except (RuntimeError, MemoryError) as error:
        raise StoredDataError(f"{path} is not a FAISS index: {_last_line(error)}; {BUILD_AGAIN}") from error


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """FAISS prints about its files to standard output, which belongs to a command's results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        try:
            yield
        finally:
            # C's buffer still holds some of it.
            ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
    finally:
        os.close(kept)


def _last_line(error: Exception) -> str:
    """The message of an error of FAISS, which begins with the C++ function and line."""
    return str(error).strip().rpartition("\n")[2]


def search_rows(index: Any, queries: Vectors, count: int, width: int) -> tuple[Vectors, np.ndarray[Any, Any]]:
    """The nearest rows of prepared `queries` [Q, C]: scores and row numbers, each [Q, K], best first.

    The score of l2 is the distance, not its square. A row number is -1 if there are fewer rows, or if a narrow
    search found fewer. `width` says how much of the index to look at.
    """
    faiss = load_faiss()
    kind = kind_of(index)
    parameters = None
    if kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=max(width, count))
    elif kind == "ivf":
        parameters = faiss.SearchParametersIVF(nprobe=width)
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), count, params=parameters)
    if index.metric_type == faiss.METRIC_L2:
        scores = np.sqrt(np.maximum(scores, 0))
    return scores, rows


def kind_of(index: Any) -> str:
    """Which of `KINDS` an index is."""
    return "ivf" if hasattr(index, "nlist") else "hnsw" if hasattr(index, "hnsw") else "flat"


def iterate_rows(index: Any) -> Iterator[tuple[np.ndarray[Any, Any], Vectors]]:
    """Every row of an index, in blocks: row numbers [N] and embeddings [N, C].

    FAISS's own `contrib.inspect_tools.get_invlist` copies a whole list, which can be most of the index where many
    images are alike.
    """
    faiss = load_faiss()
    block = max(1, _BLOCK_BYTES // (4 * index.d))
    if kind_of(index) != "ivf":
        for start in range(0, index.ntotal, block):
            count = min(block, index.ntotal - start)
            yield np.arange(start, start + count), index.reconstruct_n(start, count)
        return
    lists = index.invlists
    for number in range(index.nlist):
        size = lists.list_size(number)
        for start in range(0, size, block):
            count = min(block, size - start)
            # A list on disk is mapped: only the copy of one block is in memory.
            rows = faiss.rev_swig_ptr(lists.get_ids(number), size)[start : start + count].copy()
            codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
            some = codes[start * index.code_size : (start + count) * index.code_size]
            yield rows, some.copy().view(np.float32).reshape(count, index.d)


def search_widths(index: Any) -> Iterator[int]:
    """The widths to search an index with, from the narrowest to the widest."""
    kind = kind_of(index)
    width = _FIRST_WIDTH[kind]
    if kind == "flat":
        yield width
        return
    largest = index.nlist if kind == "ivf" else _LARGEST_HNSW_WIDTH
    while width < largest:
        yield width
        width *= 2
    yield largest
