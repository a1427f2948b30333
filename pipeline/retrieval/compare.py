"""Compares embeddings, all with all or each with its nearest in an index: the pairs above a cosine.

`compare_...` yield these pairs, at most `max_pairs` that begin with the same row: those of the highest cosine.
`connect_...` use every pair to connect rows, and yield none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shard_embedder.pipeline.core.progress import Progress
from shard_embedder.pipeline.core.writing import name_in_errors
from shard_embedder.pipeline.retrieval.groups import Components, Flags
from shard_embedder.pipeline.retrieval.index import Index

# Rows compared with as many others at once: their cosines are 64 MiB.
BLOCK_ROWS = 4096
MAX_PAIRS = 1000
# The cosine of two equal rows may come out as a little less than 1.
_ROUNDING = 1e-6
# Neighbours of a row that an index is asked for first. If all of them are near enough, it is asked for more.
_FIRST_COUNT = 16
_QUERY_ROWS = 256
# Pairs in memory at once. A block of rows that has more is halved.
_PAIRS_AT_ONCE = 2**21
# A pair on disk: row a times the number of rows, plus row b.
_STORED_PAIR = np.dtype([("key", np.int64), ("cosine", np.float32)])
_NUM_RANGES = 256

Vectors = np.ndarray[Any, np.dtype[np.float32]]


class Pairs(NamedTuple):
    """Pairs of rows a < b with their cosines, in the order of a and then b."""

    a: np.ndarray[Any, Any]
    b: np.ndarray[Any, Any]
    cosines: np.ndarray[Any, Any]


def connect_all(rows: Vectors, threshold: float, block_rows: int, on_progress: Progress) -> Components:
    """Connect every two rows of at least the cosine `threshold`."""
    components = Components(len(rows))
    blocks = _blocks(0, len(rows), block_rows)
    for number, block in enumerate(blocks, 1):
        first = np.array(rows[block.start : block.stop])
        for others in _blocks(block.start, len(rows), block_rows):
            # Of many copies of one image, most blocks need no comparison.
            if not components.are_one(block, others):
                components.join_near(block, others, _cosines(first, rows, others) >= threshold - _ROUNDING)
        on_progress("blocks connected", number, len(blocks))
    return components


def compare_all(
    rows: Vectors, threshold: float, max_pairs: int, is_cut: Flags, block_rows: int, on_progress: Progress
) -> Iterator[Pairs]:
    """Pairs of all rows. Sets `is_cut` [N] for each row that has more than `max_pairs`."""
    blocks = _blocks(0, len(rows), block_rows)
    for number, block in enumerate(blocks, 1):
        yield from _compare_block(rows, block, threshold, max_pairs, is_cut, block_rows)
        on_progress("blocks compared", number, len(blocks))


def _blocks(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def _cosines(first: Vectors, rows: Vectors, others: range) -> Vectors:
    cosines: Vectors = first @ np.array(rows[others.start : others.stop]).T
    return cosines


def _compare_block(
    rows: Vectors, block: range, threshold: float, max_pairs: int, is_cut: Flags, block_rows: int
) -> Iterator[Pairs]:
    """Pairs of the rows of a block with each other and those after them."""
    first = np.array(rows[block.start : block.stop])
    least = np.full(len(block), threshold - _ROUNDING, np.float32)
    num_near = np.zeros(len(block), np.int64)
    found: list[Pairs] = []
    num_found = 0
    for others in _blocks(block.start, len(rows), block_rows):
        cosines = _cosines(first, rows, others)
        if others.start == block.start:
            cosines[np.tri(*cosines.shape, dtype=np.bool_)] = -np.inf  # b <= a
        num_near += np.count_nonzero(cosines >= threshold - _ROUNDING, axis=1)
        is_near = cosines >= least[:, None]
        if found and num_found + _count(is_near, max_pairs) > _PAIRS_AT_ONCE:
            found = [_limit_pairs(found, max_pairs)]
            num_found = len(found[0].a)
            _raise_least(least, found[0], max_pairs)
            is_near = cosines >= least[:, None]
        if num_found + _count(is_near, max_pairs) > _PAIRS_AT_ONCE and len(block) > 1:
            # One image a thousand times, such as what a shop shows where it has none, is half a million pairs.
            del found, cosines, is_near
            half = len(block) // 2
            yield from _compare_block(rows, block[:half], threshold, max_pairs, is_cut, block_rows)
            yield from _compare_block(rows, block[half:], threshold, max_pairs, is_cut, block_rows)
            return
        for row in np.flatnonzero(np.count_nonzero(is_near, axis=1) > max_pairs):
            is_near[row] = _is_nearest(cosines[row], max_pairs)
        a, b = np.nonzero(is_near)
        found.append(Pairs(a, b + others.start, cosines[a, b]))
        num_found += len(a)
    is_cut[block.start : block.stop] |= num_near > max_pairs
    a, b, cosines = _limit_pairs(found, max_pairs)
    yield Pairs(a + block.start, b, cosines)


def _count(is_near: Flags, max_pairs: int) -> int:
    """How many pairs a block gives, with at most `max_pairs` a row."""
    return int(np.minimum(np.count_nonzero(is_near, axis=1), max_pairs).sum())


def _is_nearest(cosines: Vectors, count: int) -> Flags:
    """Which `count` of the cosines are the highest; of equal ones, the first."""
    lowest = np.partition(cosines, -count)[-count]
    is_nearest: Flags = cosines > lowest
    equal = np.flatnonzero(cosines == lowest)
    is_nearest[equal[: count - np.count_nonzero(is_nearest)]] = True
    return is_nearest


def _limit_pairs(found: list[Pairs], max_pairs: int) -> Pairs:
    """At most `max_pairs` pairs of each row a, those of the highest cosine, in the order of a and then b."""
    a, b, cosines = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.lexsort((b, -cosines, a))
    _, starts, counts = np.unique(a[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    kept = order[rank < max_pairs]
    kept = kept[np.lexsort((b[kept], a[kept]))]
    return Pairs(a[kept], b[kept], cosines[kept])


def _raise_least(least: Vectors, pairs: Pairs, max_pairs: int) -> None:
    """Of a row that has all its pairs, only a higher cosine than its lowest still counts."""
    if not len(pairs.a):
        return
    own, starts, counts = np.unique(pairs.a, return_index=True, return_counts=True)
    lowest = np.minimum.reduceat(pairs.cosines, starts)
    is_full = counts >= max_pairs
    least[own[is_full]] = np.nextafter(lowest[is_full], np.float32(np.inf))


def connect_nearest(
    rows: Vectors, index: Index, threshold: float, max_pairs: int, on_progress: Progress
) -> Components:
    """Connect each row with its nearest in the index, of at least the cosine `threshold`."""
    components = Components(len(rows))
    for a, b, _, _ in _search(rows, index, threshold, max_pairs, on_progress):
        components.join(a, b)
    return components


def compare_nearest(
    rows: Vectors,
    index: Index,
    threshold: float,
    max_pairs: int,
    is_cut: Flags,
    folder: Path,
    on_progress: Progress,
) -> Iterator[Pairs]:
    """Pairs of each row with its nearest in the index, once each, whether one or both of the two find the other.

    Sets `is_cut` [N] for each row that has more than `max_pairs`. Until all are found, pairs are in files below
    `folder`, each of a range of rows.
    """
    for a, b, cosines, cut_rows in _search(rows, index, threshold, max_pairs, on_progress):
        is_cut[cut_rows] = True
        pairs = np.empty(len(a), _STORED_PAIR)
        pairs["key"] = np.minimum(a, b) * len(rows) + np.maximum(a, b)
        pairs["cosine"] = cosines
        _append_to_ranges(pairs, len(rows), folder)
    for number in range(_NUM_RANGES):
        path = folder / f"pairs-{number}"
        if path.exists():
            pairs = np.fromfile(path, _STORED_PAIR)
            path.unlink()
            both, places = np.unique(pairs["key"], return_index=True)
            a, counts = np.unique(both // len(rows), return_counts=True)
            is_cut[a[counts > max_pairs]] = True
            yield _limit_pairs([Pairs(both // len(rows), both % len(rows), pairs["cosine"][places])], max_pairs)


def _search(
    rows: Vectors, index: Index, threshold: float, max_pairs: int, on_progress: Progress
) -> Iterator[tuple[np.ndarray[Any, Any], ...]]:
    """Rows, near rows and their cosines, some at a time, and the rows that have more of them than were asked for."""
    most = min(len(rows), max_pairs + 1)  # a row finds itself, too
    for start in range(0, len(rows), _QUERY_ROWS):
        block = np.array(rows[start : start + _QUERY_ROWS])
        count = min(_FIRST_COUNT, most)
        while True:
            cosines, near = index.search_rows(block, count)
            is_near = (cosines >= threshold - _ROUNDING) & (near >= 0)
            is_full = is_near[:, -1]
            if not is_full.any() or count == most:
                break
            count = min(4 * count, most)
        cut_rows = np.flatnonzero(is_full) + start if count < len(rows) else np.empty(0, np.int64)
        position, rank = np.nonzero(is_near)
        a, b = position + start, near[position, rank]
        is_other = a != b
        yield a[is_other], b[is_other], cosines[position, rank][is_other], cut_rows
        on_progress("rows searched for", min(start + _QUERY_ROWS, len(rows)), len(rows))


def _append_to_ranges(pairs: np.ndarray[Any, Any], num_rows: int, folder: Path) -> None:
    """Append pairs to the files of the ranges that their first rows are in."""
    ranges = pairs["key"] // num_rows * _NUM_RANGES // num_rows
    order = np.argsort(ranges, kind="stable")
    numbers, starts = np.unique(ranges[order], return_index=True)
    for number, some in zip(numbers, np.split(pairs[order], starts)[1:], strict=True):
        path = folder / f"pairs-{number}"
        with name_in_errors(path), path.open("ab") as file:
            file.write(some.tobytes())
