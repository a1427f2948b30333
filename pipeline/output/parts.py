"""Writes parts as Parquet with metadata, each whole or not at all, and reads their footers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import StoredDataError, StoreError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.schema import (
    EMBEDDING,
    END_BROKEN,
    END_NONE,
    ERRORS_SCHEMA,
    IMAGE_ID,
    KEPT_PREFIX,
    MEMBER,
    REASON,
    RECEIPT_SCHEMA,
    SAMPLE_INDEX,
    SHARD,
    SHARD_FAULT,
    STAGE,
    STAGE_READ,
    UNKNOWN_INDEX,
    embeddings_schema,
    part_rows,
)
from shard_embedder.pipeline.core.storage import join, read_tail
from shard_embedder.pipeline.core.writing import delete, refuses_name, write_bytes
from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, METADATA_PREFIX, PartName, version_tag
from shard_embedder.pipeline.output.settings import canonical_json

ROW_GROUP_ROWS = 1024
_FOOTER_BYTES = 16 * 2**10
_MAGIC = b"PAR1"
_REMEDY = "delete it, and run the job again, which makes it anew"
_NOTHING_STORED = {"num_embedded": 0, "reasons": [], "error_ids": [], "written_bytes": 0, "write_s": 0.0}


class PartWriter:
    """Writes embedded parts below one output, and gives a receipt for each."""

    def __init__(
        self, config: Config, fingerprint: Fingerprint, shape: tuple[int, ...], limits: StoreLimits = LIMITS
    ) -> None:
        self._root = config.output
        self._limits = limits
        self._keep = config.kept_columns
        self._dtype = config.dtype
        self._schema = embeddings_schema(shape, config.dtype, self._keep)
        self._metadata = {
            "fingerprint": fingerprint.digest,
            "settings": canonical_json(fingerprint.settings.to_json()),
            "batch_size": canonical_json(fingerprint.batch_size),
            "versions": canonical_json(fingerprint.versions),
        }

    def __call__(self, table: pa.Table) -> pa.Table:
        """Embedded parts in, one receipt row (`RECEIPT_SCHEMA`) a part out, after it is stored."""
        receipts = [self._write(values, samples) for values, samples in part_rows(table)]
        return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)

    def _write(self, values: dict[str, Any], samples: pa.StructArray) -> dict[str, Any]:
        part = PartName(
            values["name"],
            version_tag(values["num_bytes"], values["version"]),
            values["part"],
            values["end"],
        )
        try:
            return self._store(part, values, samples)
        except StoredDataError as error:
            fault = str(error)
        except OSError as error:
            if not refuses_name(error):
                raise
            fault = describe(error)
            # No run can store the part, and errors must not stay without it.
            with contextlib.suppress(OSError):
                delete(self._root, [f"{ERRORS}/{part}"], self._limits)
        # The error is this shard's alone.
        return {
            **values,
            "num_samples": 0,
            "end": END_BROKEN,
            "fault": f"part {part.part} cannot be stored: {fault}",
            "fault_transient": False,
            **_NOTHING_STORED,
            "store_fault": fault,
        }

    def _store(self, part: PartName, values: dict[str, Any], samples: pa.StructArray) -> dict[str, Any]:
        start = time.perf_counter()
        name = str(part)
        if values["end"] == END_BROKEN and self._reached_further(name, values["num_samples"]):
            # An earlier run read more of the shard, and its part stays.
            return {**values, **_NOTHING_STORED}
        if values["first_index"] == UNKNOWN_INDEX:
            values = {**values, "first_index": self._end_before(part)}
        failed = samples.field(REASON).is_valid()
        embedded = self._embeddings(values["name"], samples.filter(pc.invert(failed)))
        errors = _errors(values, samples.filter(failed))
        metadata = self._metadata | {
            "shard_url": values["url"],
            "shard_bytes": str(values["num_bytes"]),
            "shard_version": values["version"],
            "part": str(values["part"]),
            "end": values["end"],
            "first_index": str(values["first_index"]),
            "num_samples": str(values["num_samples"]),
            "num_embedded": str(len(embedded)),
            "num_errors": str(len(errors)),
            "ignored_members": str(values["ignored_members"]),
            "unused_images": str(values["unused_images"]),
        }
        if values["device_refused"]:
            metadata["device_refused"] = str(values["device_refused"])
        if values["unused_example"]:
            metadata["unused_example"] = values["unused_example"]
        # Errors first: a part that is stored has its errors beside it.
        written = 0
        if len(errors):
            written += self._put(f"{ERRORS}/{name}", errors, metadata)
        written += self._put(f"{EMBEDDINGS}/{name}", embedded, metadata)
        return {
            **values,
            "num_embedded": len(embedded),
            "reasons": errors.column(REASON).to_pylist(),
            "error_ids": errors.column(IMAGE_ID).to_pylist(),
            "written_bytes": written,
            "write_s": time.perf_counter() - start,
        }

    def _reached_further(self, name: str, num_samples: int) -> bool:
        """Whether a part of that name is stored with more samples."""
        try:
            return read_facts(self._root, f"{EMBEDDINGS}/{name}").number("num_samples") > num_samples
        except StoredDataError:  # there is none, or it is damaged
            return False

    def _end_before(self, part: PartName) -> int:
        """The sample after the stored part that comes before `part`."""
        before = part._replace(part=part.part - 1, end=END_NONE)
        facts = read_facts(self._root, f"{EMBEDDINGS}/{before}")
        return facts.number("first_index") + facts.number("num_samples")

    def _embeddings(self, shard: str, samples: pa.StructArray) -> pa.Table:
        embeddings = samples.field(EMBEDDING)
        stored = self._schema.field(EMBEDDING).type
        storage = getattr(stored, "storage_type", stored)
        flat = pa.FixedSizeListArray.from_arrays(embeddings.flatten(), type=storage)
        column = pa.ExtensionArray.from_storage(stored, flat) if storage is not stored else flat
        columns = {
            IMAGE_ID: samples.field(IMAGE_ID),
            SHARD: pa.repeat(shard, len(samples)),
            SAMPLE_INDEX: samples.field(SAMPLE_INDEX),
            EMBEDDING: column,
            **{name: samples.field(KEPT_PREFIX + name) for name, _ in self._keep},
        }
        return pa.Table.from_arrays([columns[name] for name in self._schema.names], schema=self._schema)

    def _put(self, name: str, table: pa.Table, metadata: Mapping[str, str]) -> int:
        checked = {**metadata, "content_sha256": content_sha256([table])}
        keyed = {METADATA_PREFIX + key: value for key, value in checked.items()}
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **keyed})
        sink = io.BytesIO()
        few_values = EMBEDDING in table.column_names and self._dtype == "float32" and _is_half_precise(vectors(table))
        pq.write_table(
            table,
            sink,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            compression_level=1,
            # Encodings that every reader knows; BYTE_STREAM_SPLIT is not one (benchmarks/README.md).
            use_dictionary=[name for name in (SHARD, STAGE) if name in table.column_names]
            + ["embedding.list.element"] * few_values,
            write_statistics=[IMAGE_ID],
            store_schema=True,
        )
        data = sink.getvalue()
        write_bytes(self._root, name, data, self._limits)
        return len(data)


def _is_half_precise(values: np.ndarray[Any, np.dtype[np.float32]]) -> bool:
    """Whether bf16 or fp16 could hold all the float32 values, so that few of them are distinct."""
    return not np.bitwise_or.reduce(values.view(np.uint32), axis=None) & 0x1FFF


def _errors(values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
    columns = {
        IMAGE_ID: samples.field(IMAGE_ID),
        SHARD: pa.repeat(values["name"], len(samples)),
        SAMPLE_INDEX: samples.field(SAMPLE_INDEX),
        MEMBER: samples.field(MEMBER),
        STAGE: samples.field(STAGE),
        REASON: samples.field(REASON),
    }
    rows = pa.Table.from_arrays([columns[name] for name in ERRORS_SCHEMA.names], schema=ERRORS_SCHEMA)
    if values["fault"] is None:
        return rows
    fault = {SHARD: values["name"], STAGE: STAGE_READ, REASON: f"{SHARD_FAULT}: {values['fault']}"}
    return pa.concat_tables([rows, pa.Table.from_pylist([fault], schema=ERRORS_SCHEMA)])


@dataclass(frozen=True)
class PartFacts:
    """The footer of a stored Parquet. `name` is its path below the output."""

    name: str
    num_rows: int
    metadata: dict[str, str]

    def number(self, key: str) -> int:
        """A count of the metadata. Raises `StoredDataError` if it is missing or no number."""
        try:
            return int(self.metadata[key])
        except (KeyError, ValueError) as error:
            raise StoredDataError(f"{self.name}: its metadata has no number {key!r}; {_REMEDY}") from error

    def fingerprint(self) -> Fingerprint:
        """What made the part. Raises `StoredDataError` if its metadata does not say."""
        try:
            return fingerprint_of(self.metadata)
        except StoredDataError as error:
            raise StoredDataError(f"{self.name}: {error}; {_REMEDY}") from error


def fingerprint_of(metadata: Mapping[str, str]) -> Fingerprint:
    """What made a part, by its metadata.

    Raises:
        StoredDataError: it does not say.
    """
    try:
        values: dict[str, Any] = {key: json.loads(metadata[key]) for key in ("settings", "versions", "batch_size")}
        return Fingerprint.from_json({**values, "fingerprint": metadata["fingerprint"]})
    except (KeyError, ValueError, RecursionError) as error:
        raise StoredDataError(f"its metadata does not tell what made it: {error!r}") from error


def read_facts(output: str, name: str, size: int | None = None, limits: StoreLimits = LIMITS) -> PartFacts:
    """Read one stored Parquet's footer, and no more of it. `size` is the file's, where it is known.

    Raises:
        StoredDataError: it is missing, cut, or not Parquet.
        StoreError: it cannot be read.
    """
    url = join(output, name)
    try:
        tail = read_tail(url, _FOOTER_BYTES, size, limits)
        if tail[-4:] != _MAGIC:
            raise StoredDataError(f"{name} is not whole Parquet: its last bytes are {tail[-4:]!r}; {_REMEDY}")
        footer_bytes = int.from_bytes(tail[-8:-4], "little") + 8
        if footer_bytes > len(tail):
            tail = read_tail(url, footer_bytes, size, limits)
        footer = pq.read_metadata(io.BytesIO(tail))
        keyed = {key.decode(): value.decode(errors="replace") for key, value in (footer.metadata or {}).items()}
        if footer.num_rows < 0:
            raise ValueError(f"it counts {footer.num_rows} rows")
    except FileNotFoundError as error:
        raise StoredDataError(f"{name} is missing") from error
    except (PermissionError, StoreError) as error:
        raise StoreError(f"{name} cannot be read: {describe(error)}") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoredDataError(f"{name} is not whole Parquet: {error}; {_REMEDY}") from error
    ours = {key.removeprefix(METADATA_PREFIX): keyed[key] for key in keyed if key.startswith(METADATA_PREFIX)}
    return PartFacts(name, footer.num_rows, ours)


def vectors(table: pa.Table) -> np.ndarray[Any, Any]:
    """The embeddings of a table as [N, C], or [N, C, H, W] for feature maps; no copy for one chunk."""
    column = table.column(EMBEDDING)
    # Combining copies even a single chunk.
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column.type, pa.FixedShapeTensorType):
        values: np.ndarray[Any, Any] = column.to_numpy_ndarray()
    else:
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    return values


def content_sha256(pieces: Iterable[pa.Table]) -> str:
    """sha256 of every value of a stored table, whole or in pieces. Any edit or swap changes it."""
    columns: dict[str, Any] = {}
    for piece in pieces:
        for name in piece.column_names:
            digest = columns.setdefault(name, hashlib.sha256())
            if name == EMBEDDING:
                digest.update(np.ascontiguousarray(vectors(piece)).data)
            else:
                digest.update("".join(f"{json.dumps(value)}\n" for value in piece.column(name).to_pylist()).encode())
    return hashlib.sha256(json.dumps([(name, columns[name].hexdigest()) for name in columns]).encode()).hexdigest()
