"""Near-duplicates: pairs of embeddings above a cosine, and the groups that they tie together.

Without an index every pair is compared, blockwise: exact, and work that grows with the square of the rows.
With one, only the nearest of each row are: for outputs of millions. An approximate index misses pairs, above all of
many equal rows, which crowd each other out of the lists and links that a search looks at.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.errors import OutputError, SettingsError
from pipeline.core.progress import Progress, no_progress
from pipeline.core.schema import IMAGE_ID, SAMPLE_INDEX, SHARD
from pipeline.output.names import Place
from pipeline.output.stored import Output, list_stored, open_output, stream, unit, with_facts
from pipeline.retrieval.index import Index, Neighbour, read_parts

PAIRS_SCHEMA = pa.schema(
    [
        *(
            pa.field(f"{name}_{side}", kind, nullable=False)
            for side in "ab"
            for name, kind in (("id", pa.string()), (SHARD, pa.string()), (SAMPLE_INDEX, pa.int32()))
        ),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
# Rows compared with as many others at once: their cosines are 64 MiB.
BLOCK_ROWS = 4096
# The cosine of two equal rows may come out as a little less than 1.
_ROUNDING = 1e-6
# Neighbours of a row that an index is asked for; where all of them are near enough, it is asked for more.
_FIRST_COUNT = 16
MOST_NEAR = 4096
_QUERY_ROWS = 256
# Pairs in memory at once: more are made of fewer rows.
_PAIRS_AT_ONCE = 2**21
# Pairs that an index finds, as they are kept on disk: the row a times the number of rows, and b.
_FOUND = np.dtype([("key", np.int64), ("cosine", np.float32)])
_NUM_RANGES = 256
_WRITE_ROWS = 65536

Pairs = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]  # rows a < rows b, cosines


@dataclass(frozen=True)
class Found:
    """How many pairs there are, of how many rows. `truncated` rows have more than was looked for.

    `num_true` pairs are of one group of ids, `num_right` of these were found; None without a pattern.
    """

    num_rows: int
    num_pairs: int
    truncated: int = 0
    num_true: int | None = None
    num_right: int | None = None

    @property
    def precision(self) -> float | None:
        """Share of the pairs found that are of one group; None without a pattern, or a pair."""
        return None if self.num_right is None or not self.num_pairs else self.num_right / self.num_pairs

    @property
    def recall(self) -> float | None:
        """Share of the pairs of one group that were found; None without a pattern, or such a pair."""
        return None if self.num_right is None or not self.num_true else self.num_right / self.num_true


def find_duplicates(
    output: str,
    pairs_path: str | Path,
    threshold: float,
    *,
    index: Index | None = None,
    group_pattern: str | None = None,
    scratch: str | Path | None = None,
    block_rows: int = BLOCK_ROWS,
    most_near: int = MOST_NEAR,
    on_progress: Progress = no_progress,
) -> Found:
    """Write every pair of cosine `threshold` and above to the Parquet `pairs_path`, which appears whole.

    The embeddings are kept on disk meanwhile, below `scratch`: 4 bytes a number, and with an index 24 bytes a pair.
    Memory holds two blocks of embeddings, their cosines, a few million pairs, and the ids.

    Args:
        output: an output of pooled features.
        pairs_path: of `PAIRS_SCHEMA`; a and b in the order of the output, pairs in that of a.
        threshold: least cosine, above 0 and up to 1.
        index: look among the nearest in this index of the output alone.
        block_rows: rows compared with as many others at once.
        most_near: neighbours of a row that an index is asked for at most.
        group_pattern: what an id and its true duplicates share: the first group of this regular expression.

    Raises:
        OutputError: no output, or an index that does not hold it.
        SettingsError: a threshold, pattern or metric that cannot be used.
        OSError: the disk of `scratch` or of the pairs is full, or the like.
    """
    if not 0.0 < threshold <= 1.0:
        raise SettingsError(f"threshold must be above 0 and at most 1, got {threshold}")
    group_of = _grouping(group_pattern)
    source = open_output(output)
    with tempfile.TemporaryDirectory(prefix="duplicates-", dir=scratch) as folder:
        rows, ids = _collect(source, index, Path(folder), on_progress)
        groups = None if group_of is None else np.array(group_of(ids.column(IMAGE_ID).to_pylist()))
        truncated: list[int] = []
        found = (
            _compare_all(rows, threshold, block_rows, on_progress)
            if index is None
            else _compare_nearest(rows, index, threshold, most_near, truncated, Path(folder), on_progress)
        )
        num_pairs, num_right = 0, 0
        with _written_whole(Path(pairs_path)) as writer:
            for a, b, cosines in found:
                for start in range(0, len(a), _WRITE_ROWS):
                    some = slice(start, start + _WRITE_ROWS)
                    writer.write_table(_table(ids, a[some], b[some], cosines[some]))
                num_pairs += len(a)
                if groups is not None:
                    num_right += int((groups[a] == groups[b]).sum())
        if groups is None:
            return Found(len(ids), num_pairs, len(truncated))
        num_true = sum(count * (count - 1) // 2 for count in Counter(groups.tolist()).values())
        return Found(len(ids), num_pairs, len(truncated), num_true, num_right)


def _grouping(pattern: str | None) -> Callable[[list[str]], list[int]] | None:
    """A function from ids to the numbers of their groups; an id that does not match is alone in its group."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise SettingsError(f"the group pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise SettingsError(f"the group pattern must have a group in parentheses, got {pattern!r}")

    def numbers(ids: list[str]) -> list[int]:
        known: dict[str, int] = {}
        found = []
        for row, image_id in enumerate(ids):
            match = compiled.search(image_id)
            group = None if match is None else match[1]
            found.append(-1 - row if group is None else known.setdefault(group, len(known)))
        return found

    return numbers


def _collect(
    source: Output, index: Index | None, folder: Path, on_progress: Progress
) -> tuple[np.ndarray[Any, Any], pa.Table]:
    """Every embedding scaled to length 1, in a file [N, C], and whose it is: in the order of the index, if any."""
    parts = with_facts(source, list_stored(source)) if index is None else _indexed(source, index)
    total = sum(part.num_rows for part in parts)
    if not total:
        raise OutputError(f"{source.url} has no embeddings: there is nothing to compare")
    rows = _reserved(folder / "unit.npy", (total, source.num_features))
    ids: list[pa.Table] = []
    done = 0
    for piece in stream(source, parts):
        rows[done : done + len(piece.vectors)] = unit(piece.vectors)
        ids.append(piece.ids)
        done += len(piece.vectors)
        on_progress("rows read", done, total)
    rows.flush()
    return rows, pa.concat_tables(ids)


def _reserved(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """A new array in a file that has its space on the disk: without, to write where there is none is death."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with _named(path), path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return rows


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name `path` in an error of its disk: which of two disks is full, the system itself does not say."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _indexed(source: Output, index: Index) -> list[Any]:
    if index.facts.made.digest != source.made.digest or index.facts.metric != "cosine":
        raise OutputError(f"the index must be of {source.url} with metric cosine; make one with jobs/index.py")
    parts = read_parts(index.folder)
    if {part.name for part in parts} != {part.name for part in list_stored(source)}:
        raise OutputError(f"the index does not hold the parts of {source.url} as they are: run jobs/index.py again")
    return parts


def _compare_all(
    rows: np.ndarray[Any, Any], threshold: float, block_rows: int, on_progress: Progress
) -> Iterator[Pairs]:
    """Pairs of each block with itself and those after it."""
    starts = range(0, len(rows), block_rows)
    total, done = len(starts) * (len(starts) + 1) // 2, 0
    for number, start in enumerate(starts):
        yield from _compare_block(rows, range(start, min(start + block_rows, len(rows))), threshold, block_rows)
        done += len(starts) - number
        on_progress("blocks compared", done, total)


def _compare_block(rows: np.ndarray[Any, Any], block: range, threshold: float, block_rows: int) -> Iterator[Pairs]:
    """Pairs of some rows with each other and those after them; where these are too many at once, by halves."""
    first = np.array(rows[block.start : block.stop])
    found: list[Pairs] = []
    num_found = 0
    for other in range(block.start, len(rows), block_rows):
        cosines = first @ np.array(rows[other : other + block_rows]).T
        is_near = cosines >= threshold - _ROUNDING
        num_found += int(np.count_nonzero(is_near))
        if num_found > _PAIRS_AT_ONCE and len(block) > 1:
            # One image a thousand times, such as what a shop shows where it has none, is half a million pairs.
            del found, cosines, is_near
            half = len(block) // 2
            yield from _compare_block(rows, block[:half], threshold, block_rows)
            yield from _compare_block(rows, block[half:], threshold, block_rows)
            return
        a, b = np.nonzero(is_near)
        keep = a + block.start < b + other
        found.append((a[keep] + block.start, b[keep] + other, cosines[a[keep], b[keep]]))
    yield _ordered(found)


def _compare_nearest(
    rows: np.ndarray[Any, Any],
    index: Index,
    threshold: float,
    most_near: int,
    truncated: list[int],
    folder: Path,
    on_progress: Progress,
) -> Iterator[Pairs]:
    """Pairs of each row with its nearest, once each, though both or only one of the two may find the other.

    Until all are found they lie in files below `folder`, each of a range of rows.
    """
    for start in range(0, len(rows), _QUERY_ROWS):
        block = np.array(rows[start : start + _QUERY_ROWS])
        count = min(_FIRST_COUNT, len(rows))
        while True:
            cosines, near = index.search_rows(block, count)
            is_near = (cosines >= threshold - _ROUNDING) & (near >= 0)
            full = is_near[:, -1]
            if not full.any() or count == min(len(rows), most_near):
                break
            count = min(4 * count, len(rows), most_near)
        if count < len(rows):
            truncated.extend((np.flatnonzero(full) + start).tolist())
        position, rank = np.nonzero(is_near)
        a, b = position + start, near[position, rank]
        pairs = np.empty(len(a), _FOUND)
        pairs["key"] = np.minimum(a, b) * len(rows) + np.maximum(a, b)
        pairs["cosine"] = cosines[position, rank]
        _spill(pairs[a != b], len(rows), folder)
        on_progress("rows searched for", min(start + _QUERY_ROWS, len(rows)), len(rows))
    for number in range(_NUM_RANGES):
        path = folder / f"pairs-{number}"
        if path.exists():
            pairs = np.fromfile(path, _FOUND)
            path.unlink()
            both, first = np.unique(pairs["key"], return_index=True)
            yield both // len(rows), both % len(rows), pairs["cosine"][first]


def _spill(pairs: np.ndarray[Any, Any], num_rows: int, folder: Path) -> None:
    """Append pairs to the files of the ranges that their first rows are in."""
    ranges = pairs["key"] // num_rows * _NUM_RANGES // num_rows
    order = np.argsort(ranges, kind="stable")
    numbers, starts = np.unique(ranges[order], return_index=True)
    for number, some in zip(numbers, np.split(pairs[order], starts)[1:], strict=True):
        path = folder / f"pairs-{number}"
        with _named(path), path.open("ab") as file:
            file.write(some.tobytes())


def _ordered(pairs: list[Pairs]) -> Pairs:
    a, b, cosines = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
    order = np.lexsort((b, a))
    return a[order], b[order], cosines[order]


def _table(ids: pa.Table, a: Any, b: Any, cosines: Any) -> pa.Table:
    columns = [column for rows in (a, b) for column in ids.take(pa.array(rows)).columns]
    scores = pa.array(np.minimum(cosines, 1.0), pa.float32())
    return pa.Table.from_arrays([*columns, scores], schema=PAIRS_SCHEMA)


@contextlib.contextmanager
def _written_whole(path: Path) -> Iterator[pq.ParquetWriter]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _named(path), pq.ParquetWriter(temporary, PAIRS_SCHEMA, compression="zstd") as writer:
            yield writer
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Duplicates(NamedTuple):
    """A row and those near it."""

    image_id: str
    place: Place
    near: list[Neighbour]


def draw_duplicates(pairs_path: str | Path, count: int, most_near: int) -> list[Duplicates]:
    """Some of all rows that are first in a pair, drawn at random, each with the nearest of its pairs.

    Memory holds those drawn, and some pairs: the file is read twice.
    """
    file = pq.ParquetFile(pairs_path)
    total = 0
    for _, numbers in _numbered(file, ["shard_a", "sample_index_a"]):
        total = int(numbers[-1]) + 1
    drawn = random.Random(0).sample(range(total), min(count, total))
    found: dict[int, Duplicates] = {}
    for batch, numbers in _numbered(file, PAIRS_SCHEMA.names):
        chosen = np.flatnonzero(np.isin(numbers, drawn))
        for number, row in zip(numbers[chosen].tolist(), batch.take(pa.array(chosen)).to_pylist(), strict=True):
            one = found.setdefault(number, Duplicates(row["id_a"], (row["shard_a"], row["sample_index_a"]), []))
            one.near.append(Neighbour(row["id_b"], row["shard_b"], row["sample_index_b"], row["score"]))
        for one in found.values():
            one.near.sort(key=lambda neighbour: -neighbour.score)
            del one.near[most_near:]
    return [found[number] for number in drawn]


def _numbered(file: pq.ParquetFile, columns: list[str]) -> Iterator[tuple[pa.RecordBatch, np.ndarray[Any, Any]]]:
    """Pairs, some at a time, and which of the rows that are first in a pair is first in each, counted from 0."""
    number, last = -1, None
    for batch in file.iter_batches(_WRITE_ROWS, columns=columns):
        shards, rows = batch.column("shard_a"), batch.column("sample_index_a")
        is_new = np.ones(len(batch), bool)
        is_new[0] = (shards[0].as_py(), rows[0].as_py()) != last
        is_new[1:] = pc.or_(pc.not_equal(shards[1:], shards[:-1]), pc.not_equal(rows[1:], rows[:-1]))
        numbers = number + np.cumsum(is_new)
        yield batch, numbers
        number, last = int(numbers[-1]), (shards[-1].as_py(), rows[-1].as_py())


def tags_of(output: str) -> dict[str, str]:
    """The version of each shard that an output holds, by its name."""
    return {part.shard: part.tag for part in list_stored(open_output(output))}
