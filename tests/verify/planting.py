"""How a fault is planted in an output, and what verify says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.schema import EMBEDDING
from shard_embedder.pipeline.output.parts import content_sha256, vectors
from shard_embedder.pipeline.verify.findings import Verdict
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import sample_members

ALL = Recompute(None, required=True)
Edit = Callable[[pa.Table], pa.Table]


def shard_members(shard: int) -> list[tuple[str, bytes]]:
    """Seven samples, of which the fifth has no image and the sixth a broken one."""
    samples = [sample_members(f"{shard:03d}-{i:04d}", 10 * shard + i) for i in range(7)]
    samples[4] = samples[4][1:]
    samples[5][0] = (samples[5][0][0], samples[5][0][1][:500])
    return [member for sample in samples for member in sample]


def part_path(output: Path, part: int, shard: int = 0, folder: str = "embeddings") -> Path:
    (path,) = (output / folder).glob(f"photos-{shard:05d}.*-{part:05d}*.parquet")
    return path


def rewrite(path: Path, edit: Edit, *, honest: bool = True, **metadata: str) -> None:
    """Edit the rows of a part. An honest edit has a checksum of its own, as of a fault before the write."""
    table = pq.read_table(path)
    before = table.schema.metadata
    edited = edit(table)
    changes = {f"embed.{key}".encode(): value.encode() for key, value in metadata.items()}
    if honest:
        changes[b"embed.content_sha256"] = content_sha256([edited]).encode()
    pq.write_table(edited.replace_schema_metadata({**before, **changes}), path)


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    position = table.column_names.index(name)
    column = values if isinstance(values, pa.Array) else pa.array(values, table.schema.field(name).type)
    return table.set_column(position, table.schema.field(name), column)


def set_vectors(edit: Callable[[np.ndarray[Any, Any]], None]) -> Edit:
    """An edit of the embeddings [N, C] in place."""

    def edited(table: pa.Table) -> pa.Table:
        values = vectors(table).copy()
        edit(values)
        kind = table.schema.field(EMBEDDING).type
        return set_column(
            table, EMBEDDING, pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
        )

    return edited


def swap(values: np.ndarray[Any, Any]) -> None:
    values[[0, 2]] = values[[2, 0]]


def found(verdict: Verdict) -> set[tuple[str, str]]:
    """The findings as (rule, file) pairs."""
    return {(finding.rule, finding.file) for finding in verdict.findings}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


# Damaged shards.


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def garbage_header(data: bytes) -> bytes:
    at = data.index(b"000-0003.jpg")
    return data[:at] + b"\x07" * 512 + data[at + 512 :]
