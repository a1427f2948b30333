"""An index on disk, and its search.

    INDEX/
      index.json          what made it: the fingerprint of the output, metric, kind, sha256 of the files
      data-<number>/
        vectors.faiss     the FAISS index
        lists.ivfdata     the lists of an ivf index
        rows.parquet      row of the FAISS index -> image_id, shard, sample_index
        parts.parquet     which parts of the output are in it

index.json names the data folder that counts. A build replaces it last, so that a death at any moment leaves the
index as it was before.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.errors import OutputError, SettingsError, StoredDataError
from shard_embedder.pipeline.core.schema import IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.stored import StoredPart
from shard_embedder.pipeline.output.typed import check_types
from shard_embedder.pipeline.retrieval.kinds import (
    BUILD_AGAIN,
    KINDS,
    METRICS,
    Vectors,
    prepare_vectors,
    read_index,
    search_rows,
)

INDEX_FILE = "index.json"
VECTORS_FILE = "vectors.faiss"
LISTS_FILE = "lists.ivfdata"
ROWS_FILE = "rows.parquet"
PARTS_FILE = "parts.parquet"
DATA_NAME = "data-{:05d}"
FORMAT = 2
ROW = "row"
ROWS_SCHEMA = pa.schema(
    [
        pa.field(ROW, pa.int64(), nullable=False),
        pa.field(IMAGE_ID, pa.string(), nullable=False),
        pa.field(SHARD, pa.string(), nullable=False),
        pa.field(SAMPLE_INDEX, pa.int32(), nullable=False),
    ]
)
PARTS_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("num_rows", pa.int64(), nullable=False),
    ]
)


@dataclass(frozen=True, kw_only=True)
class IndexFacts:
    """What index.json says. `made` is what made the embeddings in it.

    A search of `width` has `recall` (at 10, measured on `recall_queries` rows). An ivf index has `lists` lists, made
    when it had `laid_out_rows` rows. `files` maps names to (bytes, sha256).
    """

    output: str
    made: Fingerprint
    metric: str
    kind: str
    kind_given: bool
    num_rows: int
    num_features: int
    lists: int
    laid_out_rows: int
    width: int
    recall: float
    recall_queries: int
    data: str
    files: dict[str, tuple[int, str]]
    made_with: dict[str, str]

    def as_json(self) -> bytes:
        """The content of index.json."""
        values = {"format": FORMAT, **vars(self), "made": self.made.to_json()}
        return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def data_number(name: str) -> int | None:
    """The number of a data folder, or None if the name is not exactly as `DATA_NAME` makes it."""
    digits = re.fullmatch(r"data-([0-9]{5,18})", name)
    number = int(digits[1]) if digits else -1
    return number if name == DATA_NAME.format(number) else None


class Neighbour(NamedTuple):
    """A row near a query. A higher `score` is nearer, except for l2, where it is the distance."""

    image_id: str
    shard: str
    sample_index: int
    score: float

    @property
    def place(self) -> tuple[str, int]:
        """Shard and sample_index."""
        return self.shard, self.sample_index


def read_index_facts(folder: Path) -> IndexFacts | None:
    """What index.json of `folder` says, or None if there is none.

    Raises:
        StoredDataError: it is damaged, or was changed by hand.
    """
    path = folder / INDEX_FILE
    try:
        values = json.loads(path.read_bytes())
        form = values.pop("format")
        if form != FORMAT:
            raise StoredDataError(f"{path} is of format {form}, this version reads {FORMAT}")
        values["files"] = {name: (int(size), str(sha256)) for name, (size, sha256) in values["files"].items()}
        values["made"] = Fingerprint.from_json(values["made"])
        facts = IndexFacts(**values)
        check_types(facts)
        for name, value in vars(facts).items():
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}")
        if facts.kind not in KINDS or facts.metric not in METRICS or data_number(facts.data) is None:
            raise ValueError("unknown kind, metric or data folder")
        lists = {LISTS_FILE} if facts.kind == "ivf" else set()
        if facts.files.keys() != {VECTORS_FILE, ROWS_FILE, PARTS_FILE} | lists:
            raise ValueError(f"unknown files of {facts.kind}: {', '.join(sorted(facts.files))}")
    except FileNotFoundError:
        return None
    except StoredDataError as error:
        raise StoredDataError(f"{path} cannot be used: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise StoredDataError(
            f"{path} is damaged, or not that of an index: {error!r}; name another folder"
        ) from error
    return facts


def find_damage(data: Path, facts: IndexFacts, names: Iterable[str]) -> str:
    """The first file of a data folder that is not as it was written, or an empty text.

    Compares the sizes of all files, and the contents of `names`.
    """
    for name, (num_bytes, _) in facts.files.items():
        path = data / name
        found = f"it has {path.stat().st_size}" if path.is_file() else "it is missing"
        if found != f"it has {num_bytes}":
            return f"{path} must have {num_bytes} bytes, {found}"
    changed = (data / name for name in names if sha256_of(data / name) != facts.files[name][1])
    return next((f"{path} has changed since it was written" for path in changed), "")


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Index:
    """An index, open for searches. It is in memory, except for the lists of an ivf index."""

    def __init__(self, folder: Path, facts: IndexFacts) -> None:
        self.facts = facts
        self.folder = folder / facts.data
        # Hashing the embeddings would take long. Damage of the other files loses rows, or crashes FAISS.
        embeddings = LISTS_FILE if facts.kind == "ivf" else VECTORS_FILE
        fault = find_damage(self.folder, facts, facts.files.keys() - {embeddings})
        if fault:
            raise StoredDataError(f"{fault}; {BUILD_AGAIN}")
        self._index = read_index(self.folder / VECTORS_FILE)
        self._rows = pq.ParquetFile(self.folder / ROWS_FILE)
        groups = (self._rows.metadata.row_group(number) for number in range(self._rows.num_row_groups))
        self._group_ends = np.cumsum([group.num_rows for group in groups])
        sizes = {self._index.ntotal, self._rows.metadata.num_rows, facts.num_rows}
        if len(sizes) > 1 or self._index.d != facts.num_features:
            raise StoredDataError(
                f"{folder} does not fit together: its files have {sorted(sizes)} rows; {BUILD_AGAIN}"
            )

    def search(self, queries: Vectors, count: int) -> list[list[Neighbour]]:
        """The `count` nearest rows of each query [Q, C], nearest first; fewer if the index has fewer rows."""
        if queries.ndim != 2 or queries.shape[1] != self.facts.num_features:
            raise SettingsError(f"queries must be [N, {self.facts.num_features}], got {list(queries.shape)}")
        count = min(count, self.facts.num_rows)
        scores, rows = self.search_rows(queries, count)
        names = self.names({int(row) for row in rows.reshape(-1) if row >= 0})
        return [
            [
                Neighbour(*names[row], score)
                for row, score in zip(found.tolist(), near.tolist(), strict=True)
                if row >= 0
            ]
            for found, near in zip(rows, scores, strict=True)
        ]

    def search_rows(self, queries: Vectors, count: int) -> tuple[Vectors, np.ndarray[Any, Any]]:
        """Scores and row numbers of the nearest, each [Q, count]. A row number is -1 if a search found fewer."""
        scores, rows = search_rows(self._index, prepare_vectors(queries, self.facts.metric), count, self.facts.width)
        found = rows >= 0
        if not np.isfinite(scores[found]).all() or (rows >= self.facts.num_rows).any():
            raise StoredDataError(
                f"{self.folder} gives rows or scores that cannot be: it is damaged, or was made of embeddings that "
                f"are no finite numbers; {BUILD_AGAIN}"
            )
        return scores, rows

    def names(self, rows: Iterable[int]) -> dict[int, tuple[str, str, int]]:
        """image_id, shard and sample_index of some rows."""
        wanted = np.array(sorted(rows), np.int64)
        found: dict[int, tuple[str, str, int]] = {}
        for group in np.unique(np.searchsorted(self._group_ends, wanted, side="right")).tolist():
            table = self._rows.read_row_group(group)
            table = table.filter(pc.is_in(table.column(ROW), pa.array(wanted)))
            names, numbers = table.select([IMAGE_ID, SHARD, SAMPLE_INDEX]), table.column(ROW).to_pylist()
            found |= dict(zip(numbers, zip(*names.to_pydict().values(), strict=True), strict=True))
        return found

    def tag(self, shard: str) -> str | None:
        """The version of a shard that is in the index (see `pipeline.output.names.version_tag`), if any."""
        return self._tags.get(shard)

    @cached_property
    def _tags(self) -> dict[str, str]:
        return {part.shard: part.tag for part in read_parts(self.folder)}


def open_index(path: str | Path) -> Index:
    """Open the index in a local folder.

    Raises:
        OutputError: no index, or a damaged one.
        SettingsError: FAISS is not installed.
    """
    folder = Path(path)
    facts = read_index_facts(folder)
    if facts is None:
        raise OutputError(f"{folder} is not an index: it has no {INDEX_FILE}; make one with the index command")
    return Index(folder, facts)


def read_parts(data: Path) -> list[StoredPart]:
    """The parts that are in an index, in the order of its rows."""
    table = pq.read_table(data / PARTS_FILE, schema=PARTS_SCHEMA)
    return [StoredPart(**row) for row in table.to_pylist()]
