"""Checks one stored part, to its last row, against run.json, its name, its metadata and its errors."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.config import Field
from shard_embedder.pipeline.core.errors import OutputError, StoredDataError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.schema import (
    EMBEDDING,
    END_BROKEN,
    ERRORS_SCHEMA,
    IMAGE_ID,
    REASON,
    SAMPLE_INDEX,
    SHARD,
    embeddings_schema,
)
from shard_embedder.pipeline.core.storage import join, read_bytes
from shard_embedder.pipeline.output.fingerprint import Fingerprint, read_fingerprint
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, RUN_FILE, PartName, version_tag
from shard_embedder.pipeline.output.parts import content_sha256, fingerprint_of, vectors
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.verify.findings import Finding, first_few

PIECE_BYTES = 32 * 2**20
_LENGTH_TOLERANCE = {"float32": 1e-4, "float16": 2e-3}


@dataclass(frozen=True)
class Expected:
    """What the settings in run.json promise of every part."""

    made: Fingerprint
    digest: str
    schema: pa.Schema
    piece_rows: int
    length_tolerance: float | None
    part_rows: int
    id: Field | None
    naming: Naming


def read_expected(output: str) -> Expected:
    """Read what run.json promises. Raises `OutputError` if it is missing or broken."""
    made = read_fingerprint(output)
    if made is None:
        raise OutputError(f"{output} is not an output: it has no {RUN_FILE}")
    settings = made.settings
    keep = tuple((item.column, item.type) for item in settings.keep)
    row_bytes = math.prod(settings.embedding_shape) * np.dtype(settings.dtype).itemsize
    return Expected(
        made=made,
        digest=made.digest,
        schema=embeddings_schema(settings.embedding_shape, settings.dtype, keep),
        piece_rows=max(1, PIECE_BYTES // max(1, row_bytes)),
        length_tolerance=_LENGTH_TOLERANCE[settings.dtype] if settings.normalize else None,
        part_rows=settings.part_rows,
        id=settings.id,
        naming=settings.naming,
    )


class Rows(NamedTuple):
    """The samples of a file's rows: their indices (-1 for null) and ids."""

    indices: np.ndarray[Any, Any]
    ids: list[str | None]

    def samples(self) -> Iterator[tuple[int, str | None]]:
        """Index and id of each row that is a sample. The row with a broken shard's fault is none."""
        rows = zip(self.indices.tolist(), self.ids, strict=True)
        return ((index, image_id) for index, image_id in rows if index >= 0)

    def describe(self, rows: list[int]) -> str:
        """How many `rows` there are, and the first of them."""
        return f"{len(rows)} rows: {first_few(f'sample {self.indices[row]} ({self.ids[row]!a})' for row in rows)}"


_NO_ROWS = Rows(np.zeros(0, np.int64), [])


@dataclass
class CheckedPart:
    """The content of one part, and its findings. `whole` is false if its rows are not known."""

    name: PartName
    findings: list[Finding] = field(default_factory=list)
    whole: bool = False
    first_index: int = 0
    num_samples: int = 0
    embedded: Rows = _NO_ROWS
    errors: Rows = _NO_ROWS
    fault: str | None = None
    # The embedding that all its rows have, if they are the same.
    alike: bytes | None = None
    # Image members that no row stands for, and one of them.
    unused_images: int = 0
    unused_example: str | None = None

    @property
    def end_index(self) -> int:
        """The first sample of the next part."""
        return self.first_index + self.num_samples

    def add_finding(self, folder: str, rule: str, value: str) -> None:
        """Add a finding about the part's file in `folder`."""
        self.findings.append(Finding(f"{folder}/{self.name}", rule, value))


def check_part(output: str, expected: Expected, name: PartName, has_errors: bool) -> CheckedPart:
    """Read one part and its errors to the last row, and compare them with each other."""
    part = CheckedPart(name)
    embeddings = _read(output, expected, part, EMBEDDINGS)
    errors = _read(output, expected, part, ERRORS) if has_errors else None
    if embeddings is None:
        return part
    part.embedded, part.alike = embeddings.rows, embeddings.check.alike
    for rule, rows in embeddings.check.bad.items():
        if rows:
            part.add_finding(EMBEDDINGS, rule, part.embedded.describe(rows))
    is_known = _check_metadata(expected, part, embeddings.metadata)
    counted = embeddings.metadata.get("num_errors")
    if not has_errors and counted not in ("0", None):
        part.add_finding(ERRORS, "errors-missing", f"it is missing, and the part counts {counted} errors")
    elif has_errors and counted == "0":
        part.add_finding(ERRORS, "errors-alone", "it is there, and the part counts no errors")
    if errors is not None:
        part.errors = errors.rows
        _check_errors(part, embeddings, errors)
    if is_known and (errors is not None) == (counted != "0"):
        part.whole = True
        _check_samples(part)
    return part


class _File:
    """One Parquet file of a part: its metadata, and what its rows say once `pieces` was read to its end."""

    def __init__(self, data: bytes, expected: Expected) -> None:
        self._file = pq.ParquetFile(pa.BufferReader(data))
        self._piece_rows = expected.piece_rows
        self._indices: list[int] = []
        self._ids: list[str | None] = []
        self.schema = self._file.schema_arrow
        self.metadata = {
            key.decode().removeprefix("embed."): value.decode()
            for key, value in (self._file.metadata.metadata or {}).items()
            if key.startswith(b"embed.")
        }
        self.check = _VectorCheck(expected.length_tolerance)
        self.shards: set[str] = set()
        self.reasons: list[str] = []

    def pieces(self) -> Iterator[pa.Table]:
        """The rows, some at a time; each is checked on the way."""
        yield self.schema.empty_table()
        for batch in self._file.iter_batches(batch_size=self._piece_rows, use_threads=False):
            piece = pa.Table.from_batches([batch])
            self._indices += piece.column(SAMPLE_INDEX).fill_null(-1).to_pylist()
            self._ids += piece.column(IMAGE_ID).to_pylist()
            self.shards.update(piece.column(SHARD).unique().to_pylist())
            if EMBEDDING in piece.column_names:
                self.check.add(vectors(piece))
            else:
                self.reasons += piece.column(REASON).to_pylist()
            yield piece

    @property
    def rows(self) -> Rows:
        return Rows(np.array(self._indices, np.int64), self._ids)


class _VectorCheck:
    """What is wrong with the embeddings of a part, which are added piece by piece."""

    def __init__(self, length_tolerance: float | None) -> None:
        self._tolerance = length_tolerance
        self._num_rows = 0
        self._first: np.ndarray[Any, Any] | None = None
        self._alike = True
        self.bad: dict[str, list[int]] = {"not-finite": [], "length": [], "constant": []}

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """Check the next rows, [N, C] or [N, C, H, W]."""
        if not len(values):
            return
        flat = values.reshape(len(values), -1)
        finite = np.isfinite(flat).all(axis=1)
        self._record("not-finite", ~finite)
        if flat.shape[1] > 1:
            self._record("constant", finite & (flat == flat[:, :1]).all(axis=1))
        if self._tolerance is not None:
            lengths = np.linalg.norm(flat.astype(np.float32), axis=1)
            self._record("length", finite & (np.abs(lengths - 1.0) > self._tolerance))
        if self._first is None:
            self._first = flat[0].copy()
        self._alike = self._alike and bool((flat == self._first).all())
        self._num_rows += len(flat)

    def _record(self, rule: str, wrong: np.ndarray[Any, Any]) -> None:
        self.bad[rule].extend((np.flatnonzero(wrong) + self._num_rows).tolist())

    @property
    def alike(self) -> bytes | None:
        """The embedding that all rows have, or None if they differ or there are none."""
        return self._first.tobytes() if self._first is not None and self._alike else None


def _read(output: str, expected: Expected, part: CheckedPart, folder: str) -> _File | None:
    """One file of a part, read to its last row, or None with findings if that is impossible."""
    schema = expected.schema if folder == EMBEDDINGS else ERRORS_SCHEMA
    try:
        file = _File(read_bytes(join(output, f"{folder}/{part.name}")), expected)
        _check_fingerprint(expected, part, folder, file.metadata)
        if not file.schema.equals(schema):
            part.add_finding(folder, "schema", _schema_difference(file.schema, schema))
            return None
        checksum = content_sha256(file.pieces())
    except (pa.ArrowException, OSError, ValueError) as error:
        part.add_finding(folder, "unreadable", describe(error))
        return None
    said = file.metadata.pop("content_sha256", None)
    if said != checksum:
        value = f"rows hash to {checksum[:12]}, written were {said[:12]}" if said else "it has no content_sha256"
        part.add_finding(folder, "checksum", value)
    wrong = sorted(file.shards - {part.name.shard})
    if wrong:
        part.add_finding(folder, "shard-column", f"{wrong[0]!a} in a part of {part.name.shard!a}")
    return file


def _schema_difference(found: pa.Schema, expected: pa.Schema) -> str:
    for name in expected.names:
        if name not in found.names:
            return f"no column {name}"
        if found.names.count(name) > 1:
            return f"column {name} twice"
        if not found.field(name).equals(expected.field(name)):
            return f"column {_field(found.field(name))} instead of {_field(expected.field(name))}"
    extra = [name for name in found.names if name not in expected.names]
    return f"unknown columns {', '.join(extra)}" if extra else f"columns in the order {', '.join(found.names)}"


def _field(field: pa.Field) -> str:
    return f"{field.name} {field.type}{'' if field.nullable else ' not null'}"


def _check_fingerprint(expected: Expected, part: CheckedPart, folder: str, metadata: dict[str, str]) -> None:
    try:
        made = fingerprint_of(metadata)
    except StoredDataError as error:
        part.add_finding(folder, "fingerprint", str(error))
        return
    differences = made.settings.differences(expected.made.settings)
    if differences:
        value = "; ".join(f"{name} {own} instead of {wanted}" for name, own, wanted in differences)
        part.add_finding(folder, "fingerprint", value)


def _check_metadata(expected: Expected, part: CheckedPart, metadata: dict[str, str]) -> bool:
    """Compare the part's metadata with its name and rows, and set its samples. False if they are not known."""
    name, num_rows = part.name, len(part.embedded.ids)
    numbers: dict[str, int] = {}
    for key in ("part", "first_index", "num_samples", "num_embedded", "num_errors", "unused_images", "shard_bytes"):
        text = metadata.get(key, "")
        if not re.fullmatch(r"\d{1,18}", text):
            part.add_finding(EMBEDDINGS, "metadata", f"{key} is {metadata.get(key)!a}, no count")
            return False
        numbers[key] = int(text)
    end, num_embedded, num_samples = metadata.get("end"), numbers["num_embedded"], numbers["num_samples"]
    tag = version_tag(numbers["shard_bytes"], metadata.get("shard_version", ""))
    is_known = num_samples <= expected.part_rows
    rules = [
        (numbers["part"] == name.part, f"part is {numbers['part']}, by its name {name.part}"),
        (end == name.end, f"end is {end!a}, by its name {name.end!a}"),
        (tag == name.tag, f"the shard's version gives the tag {tag}, by its name {name.tag}"),
        (num_embedded == num_rows, f"num_embedded is {num_embedded}, it has {num_rows} rows"),
        (is_known, f"num_samples is {num_samples}, a part holds at most {expected.part_rows}"),
    ]
    for holds, value in rules:
        if not holds:
            part.add_finding(EMBEDDINGS, "metadata", value)
    if is_known:
        part.first_index, part.num_samples = numbers["first_index"], num_samples
        part.unused_images, part.unused_example = numbers["unused_images"], metadata.get("unused_example")
    return is_known


def _check_errors(part: CheckedPart, embeddings: _File, errors: _File) -> None:
    """Compare an errors file with its part. A broken shard's fault is a row, but no sample."""
    for key in sorted(errors.metadata.keys() | embeddings.metadata.keys()):
        found, wanted = errors.metadata.get(key), embeddings.metadata.get(key)
        if found != wanted and key not in ("fingerprint", "settings", "versions"):
            part.add_finding(ERRORS, "metadata", f"{key} is {found!a}, its part has {wanted!a}")
    num_rows, counted = len(part.errors.ids), embeddings.metadata.get("num_errors")
    if counted not in (str(num_rows), "0"):
        part.add_finding(ERRORS, "metadata", f"num_errors is {counted}, it has {num_rows} rows")
    faults = np.flatnonzero(part.errors.indices < 0)
    num_faults = 1 if part.name.end == END_BROKEN else 0
    if len(faults) != num_faults:
        part.add_finding(ERRORS, "counts", f"{len(faults)} rows without sample_index, it must be {num_faults}")
    if len(faults):
        part.fault = errors.reasons[int(faults[0])]
    empty = sum(not reason for reason in errors.reasons)
    if empty:
        part.add_finding(ERRORS, "metadata", f"{empty} rows without a reason")


def _check_samples(part: CheckedPart) -> None:
    """Check that every sample of the part is one row, in order."""
    embedded, errors = part.embedded.indices, part.errors.indices[part.errors.indices >= 0]
    if len(embedded) + len(errors) != part.num_samples:
        value = f"{len(embedded)} embeddings and {len(errors)} errors for {part.num_samples} samples"
        part.add_finding(EMBEDDINGS, "counts", value)
    found, times = np.unique(np.concatenate([embedded, errors]), return_counts=True)
    expected = np.arange(part.first_index, part.end_index)
    faults = [
        (found[times > 1], "more than once"),
        (np.setdiff1d(expected, found), "missing"),
        (np.setdiff1d(found, expected), "not of this part"),
    ]
    for samples, what in faults:
        if len(samples):
            some = first_few(map(str, samples.tolist()), 5)
            part.add_finding(EMBEDDINGS, "sample-index", f"sample{'s' if len(samples) > 1 else ''} {some} {what}")
    for folder, indices in ((EMBEDDINGS, embedded), (ERRORS, errors)):
        back = np.flatnonzero(np.diff(indices) < 0)
        if len(back):
            at = int(back[0])
            part.add_finding(folder, "sample-index", f"not in order: {indices[at + 1]} follows {indices[at]}")
