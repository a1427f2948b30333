"""Writes groups of near-duplicates: the group of every image, and the ids of those that are not kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.errors import SettingsError, ShardError
from shard_embedder.pipeline.core.progress import Progress
from shard_embedder.pipeline.core.schema import IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.core.writing import write_whole
from shard_embedder.pipeline.output.names import version_tag
from shard_embedder.pipeline.output.stored import Output, list_stored
from shard_embedder.pipeline.retrieval.groups import Components, Flags, Rows, choose_kept
from shard_embedder.pipeline.shards.find import Shard, shards_below
from shard_embedder.pipeline.shards.peek import image_sizes

KEEP_ONE = ("first", "largest")
GROUPS_SCHEMA = pa.schema(
    [
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field(SHARD, pa.string(), nullable=False),
        pa.field(SAMPLE_INDEX, pa.int32(), nullable=False),
        pa.field("group", pa.int64(), nullable=False),
        pa.field("keep", pa.bool_(), nullable=False),
    ]
)
_WRITE_ROWS = 65536


@dataclass(frozen=True, kw_only=True)
class GroupFiles:
    """Where to write `groups` (Parquet) and `drop` (text), and which image of a group to keep.

    The largest image has the most encoded bytes. Its size comes from `shards`, or, without any, from those in the
    place where they were embedded.
    """

    groups: str | Path | None = None
    drop: str | Path | None = None
    keep_one: str = KEEP_ONE[0]
    shards: Sequence[Shard] = ()

    def __post_init__(self) -> None:
        if self.keep_one not in KEEP_ONE:
            raise SettingsError(f"keep_one must be one of {', '.join(KEEP_ONE)}, got {self.keep_one!r}")


@dataclass(frozen=True)
class GroupCounts:
    """How many groups of two images and more there are, and what they hold.

    `num_others` images are not kept. `num_unlisted` of them are not in the list to drop, `num_unsized` images have an
    unknown size.
    """

    num_groups: int
    num_others: int
    num_unlisted: int
    num_unsized: int


def shards_to_measure(stored: Output, files: GroupFiles) -> Sequence[Shard]:
    """The shards that say how large images are. Raises `InputError` if there are none."""
    if files.keep_one == "first":
        return []
    return files.shards or shards_below(stored.made.input_prefix)


def write_groups(
    stored: Output,
    files: GroupFiles,
    shards: Sequence[Shard],
    ids: pa.Table,
    components: Components,
    on_progress: Progress,
) -> GroupCounts:
    """Write the files. `ids` are those of the connected rows, `shards` come from `shards_to_measure`."""
    numbers = components.numbers()
    in_group = np.bincount(numbers)[numbers] > 1
    sizes = _read_sizes(stored, shards, ids, in_group, on_progress) if files.keep_one == "largest" else None
    keep = choose_kept(numbers, sizes)
    if files.groups is not None:
        _write_table(Path(files.groups), ids, numbers, keep)
    return GroupCounts(
        num_groups=int(np.count_nonzero(np.bincount(numbers) > 1)),
        num_others=int(np.count_nonzero(~keep)),
        num_unlisted=0 if files.drop is None else _write_drop_list(Path(files.drop), ids, keep),
        num_unsized=0 if sizes is None else int(np.count_nonzero(sizes[in_group] < 0)),
    )


def _read_sizes(
    stored: Output,
    shards: Sequence[Shard],
    ids: pa.Table,
    in_group: Flags,
    on_progress: Progress,
) -> Rows:
    """Encoded bytes of the image of each row in a group; -1 if its shard changed or cannot be read."""
    sizes = np.full(len(ids), -1, np.int64)
    found = {shard.name: shard for shard in shards}
    tags = {part.shard: part.tag for part in list_stored(stored)}
    rows = np.flatnonzero(in_group)
    some = ids.take(pa.array(rows))
    places: dict[str, dict[int, int]] = defaultdict(dict)
    for row, name, index in zip(
        rows.tolist(), some.column(SHARD).to_pylist(), some.column(SAMPLE_INDEX).to_pylist(), strict=True
    ):
        places[name][index] = row
    for number, (name, by_index) in enumerate(places.items(), 1):
        shard = found.get(name)
        if shard is not None and version_tag(shard.num_bytes, shard.version) == tags.get(name):
            try:
                for index, size in image_sizes(shard, stored.made.settings.naming, set(by_index)).items():
                    sizes[by_index[index]] = size
            except (OSError, ShardError):
                pass  # the caller counts images of unknown size
        on_progress("shards measured", number, len(places))
    return sizes


def _write_table(path: Path, ids: pa.Table, numbers: Rows, keep: Flags) -> None:
    with write_whole(path) as temporary, pq.ParquetWriter(temporary, GROUPS_SCHEMA, compression="zstd") as writer:
        for start in range(0, len(ids), _WRITE_ROWS):
            some = slice(start, start + _WRITE_ROWS)
            columns = [*ids.slice(start, _WRITE_ROWS).columns, numbers[some], keep[some]]
            writer.write_table(pa.Table.from_arrays(columns, schema=GROUPS_SCHEMA))


def _write_drop_list(path: Path, ids: pa.Table, keep: Flags) -> int:
    """Write the ids of images that are not kept, one a line, and return how many cannot be listed.

    An id that a kept image has, too, would drop that image as well; and an id with a line break is no line.
    """
    names = ids.column(IMAGE_ID)
    others = names.filter(pa.array(~keep))
    unsafe = pc.or_(
        pc.is_in(others, value_set=names.filter(pa.array(keep)).combine_chunks()),
        pc.match_substring_regex(others, "[\r\n]"),
    )
    with write_whole(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for chunk in others.filter(pc.invert(unsafe)).chunks:
            file.writelines(f"{name}\n" for name in chunk.to_pylist())
    return int(pc.sum(unsafe).as_py() or 0)
