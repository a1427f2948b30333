"""Near-duplicates: pairs of embeddings above a cosine, and the groups that they connect.

Without an index every pair is compared, block by block: exact, and work that grows with the square of the rows.
With an index each row is compared with its nearest only, for outputs of millions. An approximate index misses pairs,
above all of many equal rows, which crowd each other out of the lists and links that a search looks at.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.errors import OutputError, SettingsError
from shard_embedder.pipeline.core.progress import Progress, no_progress
from shard_embedder.pipeline.core.schema import IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.core.writing import name_in_errors, write_whole
from shard_embedder.pipeline.output.names import Place
from shard_embedder.pipeline.output.stored import (
    Output,
    StoredPart,
    list_stored,
    open_output,
    stream,
    unit,
    with_facts,
)
from shard_embedder.pipeline.retrieval.compare import (
    BLOCK_ROWS,
    MAX_PAIRS,
    Pairs,
    compare_all,
    compare_nearest,
    connect_all,
    connect_nearest,
)
from shard_embedder.pipeline.retrieval.group_files import GroupCounts, GroupFiles, shards_to_measure, write_groups
from shard_embedder.pipeline.retrieval.index import Index, Neighbour, read_parts

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
_WRITE_ROWS = 65536


@dataclass(frozen=True)
class DuplicateCounts:
    """How many pairs were written, of how many rows. `truncated` rows have more pairs than were written.

    `num_true` pairs share a group of ids, and `num_right` of these were written; None without a pattern. `groups` is
    None without group files.
    """

    num_rows: int
    num_pairs: int = 0
    truncated: int = 0
    num_true: int | None = None
    num_right: int | None = None
    groups: GroupCounts | None = None

    @property
    def precision(self) -> float | None:
        """Share of the written pairs that share a group of ids; None without a pattern, or a pair."""
        return None if self.num_right is None or not self.num_pairs else self.num_right / self.num_pairs

    @property
    def recall(self) -> float | None:
        """Share of the pairs of one group of ids that were written; None without a pattern, or such a pair."""
        return None if self.num_right is None or not self.num_true else self.num_right / self.num_true


def find_duplicates(
    output: str,
    pairs_path: str | Path | None,
    threshold: float,
    *,
    index: Index | None = None,
    group_pattern: str | None = None,
    group_files: GroupFiles | None = None,
    scratch: str | Path | None = None,
    block_rows: int = BLOCK_ROWS,
    max_pairs: int = MAX_PAIRS,
    on_progress: Progress = no_progress,
) -> DuplicateCounts:
    """Find the pairs of cosine `threshold` and above. Write them, or the groups that they connect, or both.

    Each file appears whole. The embeddings are on disk meanwhile, below `scratch`: 4 bytes a number, and with an
    index 24 bytes a pair. Memory holds two blocks of embeddings, their cosines, a few million pairs, and the ids.

    Args:
        output: an output of pooled features.
        pairs_path: Parquet of `PAIRS_SCHEMA`; a and b in the order of the output, pairs in that of a. Or None.
        threshold: least cosine, above 0 and up to 1.
        index: compare each row with its nearest in this index of the output only.
        group_pattern: what an id and its true duplicates share: the first group of this regular expression.
        group_files: where to write groups, and which image of each to keep.
        block_rows: rows compared with as many others at once.
        max_pairs: the most pairs that begin with the same row, the nearest of them; and the most neighbours of a row
            that an index is asked for.

    Raises:
        InputError: no shard says how large the images are.
        OutputError: no output, or an index that does not hold it.
        SettingsError: a threshold, pattern or metric that cannot be used.
        OSError: the disk of `scratch` or of a file is full, or the like.
    """
    if not 0.0 < threshold <= 1.0:
        raise SettingsError(f"threshold must be above 0 and at most 1, got {threshold}")
    if max_pairs < 1:
        raise SettingsError(f"max_pairs must be at least 1, got {max_pairs}")
    group_of = _grouping(group_pattern)
    stored = open_output(output)
    shards = [] if group_files is None else shards_to_measure(stored, group_files)
    with tempfile.TemporaryDirectory(prefix="duplicates-", dir=scratch) as folder:
        rows, ids = _collect(stored, index, Path(folder), on_progress)
        counts: dict[str, Any] = {}
        if pairs_path is not None:
            is_cut = np.zeros(len(ids), bool)
            pairs = (
                compare_all(rows, threshold, max_pairs, is_cut, block_rows, on_progress)
                if index is None
                else compare_nearest(rows, index, threshold, max_pairs, is_cut, Path(folder), on_progress)
            )
            groups = None if group_of is None else np.array(group_of(ids.column(IMAGE_ID).to_pylist()))
            counts = _write_pairs(Path(pairs_path), ids, pairs, groups)
            counts["truncated"] = int(is_cut.sum())
        if group_files is not None:
            components = (
                connect_all(rows, threshold, block_rows, on_progress)
                if index is None
                else connect_nearest(rows, index, threshold, max_pairs, on_progress)
            )
            counts["groups"] = write_groups(stored, group_files, shards, ids, components, on_progress)
        return DuplicateCounts(len(ids), **counts)


def _write_pairs(
    path: Path, ids: pa.Table, pairs: Iterable[Pairs], groups: np.ndarray[Any, Any] | None
) -> dict[str, Any]:
    """Write pairs, and count them: all, and those that share one of the `groups` [N] of ids."""
    num_pairs, num_right = 0, 0
    with write_whole(path) as temporary, pq.ParquetWriter(temporary, PAIRS_SCHEMA, compression="zstd") as writer:
        for a, b, cosines in pairs:
            for start in range(0, len(a), _WRITE_ROWS):
                some = slice(start, start + _WRITE_ROWS)
                writer.write_table(_table(ids, a[some], b[some], cosines[some]))
            num_pairs += len(a)
            if groups is not None:
                num_right += int((groups[a] == groups[b]).sum())
    if groups is None:
        return {"num_pairs": num_pairs}
    num_true = sum(count * (count - 1) // 2 for count in Counter(groups.tolist()).values())
    return {"num_pairs": num_pairs, "num_true": num_true, "num_right": num_right}


def _grouping(pattern: str | None) -> Callable[[list[str]], list[int]] | None:
    """A function from ids to the numbers of their groups. An id that does not match is a group of its own."""
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
    stored: Output, index: Index | None, folder: Path, on_progress: Progress
) -> tuple[np.ndarray[Any, Any], pa.Table]:
    """Every embedding scaled to length 1, in a file [N, C], and the ids: in the order of the index, if any."""
    parts = with_facts(stored, list_stored(stored)) if index is None else _indexed(stored, index)
    total = sum(part.num_rows for part in parts)
    if not total:
        raise OutputError(f"{stored.url} has no embeddings: there is nothing to compare")
    rows = _reserve(folder / "unit.npy", (total, stored.num_features))
    ids: list[pa.Table] = []
    done = 0
    for piece in stream(stored, parts):
        rows[done : done + len(piece.vectors)] = unit(piece.vectors)
        ids.append(piece.ids)
        done += len(piece.vectors)
        on_progress("rows read", done, total)
    rows.flush()
    return rows, pa.concat_tables(ids)


def _reserve(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """A new array in a file whose space is reserved: writing to a map of a full disk would kill the process."""
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    with name_in_errors(path), path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return rows


def _indexed(stored: Output, index: Index) -> list[StoredPart]:
    if index.facts.made.digest != stored.made.digest or index.facts.metric != "cosine":
        raise OutputError(f"the index must be of {stored.url} with metric cosine; make one with the index command")
    parts = read_parts(index.folder)
    if {part.name for part in parts} != {part.name for part in list_stored(stored)}:
        raise OutputError(
            f"the index does not hold the parts of {stored.url} as they are: run the index command again"
        )
    return parts


def _table(ids: pa.Table, a: Any, b: Any, cosines: Any) -> pa.Table:
    columns = [column for rows in (a, b) for column in ids.take(pa.array(rows)).columns]
    scores = pa.array(np.minimum(cosines, 1.0), pa.float32())
    return pa.Table.from_arrays([*columns, scores], schema=PAIRS_SCHEMA)


class Duplicates(NamedTuple):
    """A row and its near-duplicates."""

    image_id: str
    place: Place
    near: list[Neighbour]


def draw_duplicates(pairs_path: str | Path, count: int, most_near: int) -> list[Duplicates]:
    """Draw some of the rows that are first in a pair, each with the nearest of its pairs.

    Reads the file twice. Memory holds the drawn rows and some pairs.
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
    """Pairs, some at a time, and for each the number of its first row, counted over all first rows from 0."""
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
