"""A shard's parts and rows, as the reader gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from shard_embedder.pipeline.core.config import Config, Field
from shard_embedder.pipeline.core.schema import part_rows
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import SampleReader
from tests.conftest import encode, photo

PHOTO = encode(photo(1, (24, 20)))


def make_config(**settings: Any) -> Config:
    for name in ("keep", "id"):
        if name in settings:
            specs = settings[name]
            settings[name] = Field.parse(specs) if name == "id" else tuple(Field.parse(spec) for spec in specs)
    return Config(input=("x",), output="y", **settings)


def pending(path: Path, *stored: int) -> Pending:
    info = stat(*locate(str(path)))
    return Pending("shard", str(path), info.num_bytes, info.version, stored)


def parts(path: Path, *stored: int, **settings: Any) -> list[tuple[dict[str, Any], pa.StructArray]]:
    reader = SampleReader(make_config(**settings))
    return [part for table in reader.parts(pending(path, *stored)) for part in part_rows(table)]


def rows(path: Path, **settings: Any) -> list[dict[str, Any]]:
    return [row for _, samples in parts(path, **settings) for row in samples.to_pylist()]


def without_times(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if not name.endswith("_s")}
