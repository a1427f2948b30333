"""Reads an output back and proves it, or names every fault: the Parquet alone, then against the tars.

The tars are walked with the standard library's `tarfile`, not with the reader that made the output, so
that a fault of that reader shows. What only another computation can show, whether an embedding is that
of its image, is computed again for a random sample with the plain backbone in fp32.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import json
import math
import random
import re
import tarfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import IO, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem

from pipeline.backbones import build_backbone, load_weights
from pipeline.config import Field
from pipeline.decode import Decoder, Preprocess
from pipeline.errors import OutputError, SampleError, SettingsError, ShardError, WeightsError
from pipeline.fingerprint import RUN_FILE, Fingerprint, read_fingerprint
from pipeline.parts import EMBEDDINGS, ERRORS, PartName, content_sha256, vectors, version_tag
from pipeline.samples import MAX_METADATA_BYTES, image_rank
from pipeline.schema import (
    EMBEDDING,
    END_BROKEN,
    END_NONE,
    ERRORS_SCHEMA,
    IMAGE_ID,
    REASON,
    SAMPLE_INDEX,
    SHARD,
    embeddings_schema,
)
from pipeline.shards import Shard, find_shards
from pipeline.storage import TEMPORARY_FOLDER, ShardStream, describe, join, list_files, locate, read_bytes

RULES = {
    "no-parts": "an output holds at least one part",
    "stray-file": "embeddings/ and errors/ hold parts and nothing else",
    "part-missing": "a shard's parts are 0 to k, the last marked as such",
    "part-twice": "a part is stored once, and none comes after the last",
    "two-versions": "a shard's parts are of one version of it",
    "old-version": "a shard's parts are of its present version in the input",
    "shard-missing": "every shard of the input is in the output",
    "shard-broken": "a shard was read to its proven end",
    "errors-missing": "a part that counts errors has its errors file",
    "errors-alone": "an errors file belongs to a part, which counts errors",
    "unreadable": "a file is Parquet, whole and readable to its last row group",
    "schema": "columns, types and the embedding's shape are as run.json says",
    "fingerprint": "every part was made with the settings of run.json",
    "metadata": "a file's metadata agrees with its name and its rows",
    "checksum": "rows are those that were written",
    "counts": "embeddings and errors of a part are as many as its samples",
    "sample-index": "sample_index counts on, each sample once, in the order of the shard",
    "id-repeated": "image_id is unique within a shard",
    "shard-column": "the shard column names the part's shard",
    "not-finite": "embeddings have no NaN and no infinite value",
    "length": "embeddings have the L2 length 1 where they were normalized",
    "constant": "the values within one embedding are not all the same",
    "all-alike": "the embeddings of a shard are not all the same",
    "tar-unreadable": "a shard of the input can be read",
    "tar-count": "a shard has as many samples as its tar",
    "tar-id": "image_id is that of the tar's sample at sample_index",
    "recompute": "an embedding is that of its image",
}

THREADS = 8
RECOMPUTE_IMAGES = 8
# Cosine of a stored embedding with the same computed again in fp32, by what the run computed and stored.
_COSINE = {("fp32", "float32"): 0.9999}
_COSINE_REDUCED = 0.999
# Another row this many times nearer than a row's own: the two are swapped, not merely alike.
_NEARER = 2.0
_LENGTH_TOLERANCE = {"float32": 1e-4, "float16": 2e-3}
_PIECE_BYTES = 32 * 2**20
# What tarfile raises on damage.
_TAR_ERRORS = (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError)
_VOLUME_LABEL = b"V"
_NAME = re.compile(r"((?:.*/)?[^/.]+)(?:\.([^/]*))?", re.DOTALL)
_EXPECTED_FILES = (RUN_FILE, "report.json", "report.html")

Progress = Callable[[str, int, int], None]


class Finding(NamedTuple):
    """One thing that is wrong: in which file, which of `RULES` it breaks, and with what value."""

    file: str
    rule: str
    value: str

    def __str__(self) -> str:
        return f"{_line(self.file)}: {self.rule}: {_line(self.value)}"


@dataclass
class Verdict:
    """What was read, and all that is wrong with it. `notes` tell what is unusual and not wrong."""

    output: str
    fingerprint: str
    shards: int = 0
    broken_shards: int = 0
    parts: int = 0
    samples: int = 0
    embedded: int = 0
    errors: int = 0
    num_bytes: int = 0
    tars_compared: int = 0
    recomputed: int = 0
    lowest_cosine: float | None = None
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything, with each finding's rule spelled out."""
        findings = [{**finding._asdict(), "means": RULES[finding.rule]} for finding in self.findings]
        return {"proven": self.proven, **asdict(self), "findings": findings}


@dataclass(frozen=True)
class Recompute:
    """How many embeddings to compute again (None: all), drawn by `seed`, and with which weights.

    Without `weights` those that run.json names are used. Where they cannot be had that is an error if
    they are `required`, else a note.
    """

    num_images: int | None = RECOMPUTE_IMAGES
    weights: str | None = None
    seed: int = 0
    required: bool = False


def verify(
    output: str,
    inputs: Sequence[str] = (),
    recompute: Recompute | None = None,
    *,
    threads: int = THREADS,
    on_progress: Progress = lambda what, done, total: None,
) -> Verdict:
    """Read every part of `output`, and compare it with the tars of `inputs` where any are named.

    Memory holds `threads` parts at a time, and the ids of one shard or so. `recompute` needs `inputs`.

    Raises:
        OutputError: no output, or its run.json is missing or broken.
        SettingsError: the input, or the weights of a required recomputation, cannot be had.
    """
    made, expected = _expectation(output)
    verdict = Verdict(output, made.digest)
    shards = _input(inputs, expected, verdict) if inputs else {}
    model = _model(made, recompute, verdict) if recompute is not None and inputs else None
    stored = _list(output, verdict)
    groups = _groups(stored, shards, bool(inputs), verdict)
    drawn_from: list[_Source] = []
    for group, parts, tar in _checked(output, expected, groups, threads, on_progress):
        _check_group(group, parts, verdict)
        if tar is not None and group.shard is not None:
            _compare(group, parts, tar, verdict)
            if tar.fault is None and not group.is_broken:
                drawn_from += [
                    _Source(part.name, group.shard, len(part.embedded.ids)) for part in parts if part.whole
                ]
    if model is not None and recompute is not None:
        _recompute(output, expected, model, _draw(drawn_from, recompute), verdict, on_progress)
    return verdict


# What run.json promises.


@dataclass(frozen=True)
class _Expected:
    """What every part must be like, by the settings in run.json."""

    digest: str
    settings: dict[str, Any]
    schema: pa.Schema
    piece_rows: int
    dtype: str
    normalize: bool
    part_rows: int
    id: Field | None
    image_member: str | None


def _expectation(output: str) -> tuple[Fingerprint, _Expected]:
    made = read_fingerprint(output)
    if made is None:
        raise OutputError(f"{output} is not an output: it has no {RUN_FILE}")
    settings = made.settings
    try:
        shape = tuple(int(size) for size in settings["embedding_shape"])
        keep = tuple(Field.parse(spec) for spec in settings["keep"])
        row_bytes = int(np.prod(shape)) * np.dtype(settings["dtype"]).itemsize
        return made, _Expected(
            digest=made.digest,
            settings=settings,
            schema=embeddings_schema(shape, settings["dtype"], tuple((item.column, item.type) for item in keep)),
            piece_rows=max(1, _PIECE_BYTES // max(1, row_bytes)),
            dtype=settings["dtype"],
            normalize=bool(settings["normalize"]),
            part_rows=int(settings["part_rows"]),
            id=None if settings["id"] == "key" else Field.parse(settings["id"]),
            image_member=settings["image_member"],
        )
    except (KeyError, TypeError, ValueError, SettingsError) as error:
        raise OutputError(f"{join(output, RUN_FILE)} is not a run.json of this pipeline: {error!r}") from error


def _input(inputs: Sequence[str], expected: _Expected, verdict: Verdict) -> dict[str, Shard]:
    found = find_shards(inputs)
    prefix = expected.settings.get("input_prefix")
    if found.prefix != prefix:
        verdict.notes.append(
            f"the input's prefix is {_line(found.prefix)}, the output was made of {_line(str(prefix))}"
        )
    return {shard.name: shard for shard in found.shards}


# What is stored, by listing.


@dataclass
class _Stored:
    """The parts below embeddings/ by shard and version, and those that have an errors file."""

    parts: dict[tuple[str, str], list[PartName]]
    errors: set[PartName]


def _list(output: str, verdict: Verdict) -> _Stored:
    """List the output once; a file that has no place there is told."""
    fs, base = locate(output)
    stored = _Stored(defaultdict(list), set())
    temporary: list[str] = []
    try:
        files = sorted(list_files(fs, base))
    except (OSError, ShardError) as error:
        raise OutputError(f"cannot list {output}: {describe(error)}") from error
    for info in files:
        path = info.path[len(base) :].lstrip("/")
        folder, _, rest = path.partition("/")
        name = PartName.parse(rest)
        if folder == TEMPORARY_FOLDER:
            temporary.append(path)
        elif folder not in (EMBEDDINGS, ERRORS):
            if path not in _EXPECTED_FILES:
                verdict.notes.append(f"{_line(path)} is no file of an output")
        elif name is None or str(name) != rest:
            verdict.findings.append(Finding(path, "stray-file", "not named as a part is"))
        else:
            verdict.num_bytes += info.num_bytes
            if folder == EMBEDDINGS:
                stored.parts[name.shard, name.tag].append(name)
            else:
                stored.errors.add(name)
    if temporary:
        verdict.notes.append(
            f"{len(temporary)} temporary files in {TEMPORARY_FOLDER}/: a run died, which the next clears, or goes on"
        )
    if not stored.parts:
        verdict.findings.append(Finding(f"{EMBEDDINGS}/", "no-parts", "there is none"))
    present = {name for names in stored.parts.values() for name in names}
    verdict.findings.extend(
        Finding(f"{ERRORS}/{name}", "errors-alone", f"{EMBEDDINGS}/{name} is not there")
        for name in sorted(stored.errors - present)
    )
    return stored


@dataclass(frozen=True)
class _Group:
    """The parts of one version of one shard. `shard` is set where the input has just that version."""

    name: str
    tag: str
    parts: list[PartName]
    with_errors: frozenset[PartName]
    shard: Shard | None

    @property
    def is_broken(self) -> bool:
        """Whether the shard could not be read to its proven end."""
        return self.parts[-1].end == END_BROKEN

    @property
    def where(self) -> str:
        """What stands for all its parts in a finding."""
        return f"{EMBEDDINGS}/{self.name}.{self.tag}-*"


def _groups(stored: _Stored, shards: dict[str, Shard], compared: bool, verdict: Verdict) -> list[_Group]:
    """The shard versions to check, in the order of their names; versions that should not be there are told."""
    groups: list[_Group] = []
    tags: dict[str, list[str]] = defaultdict(list)
    elsewhere = 0
    for (name, tag), parts in sorted(stored.parts.items()):
        shard = shards.get(name)
        present = shard is not None and version_tag(shard.num_bytes, shard.version) == tag
        with_errors = frozenset(stored.errors.intersection(parts))
        group = _Group(name, tag, sorted(parts), with_errors, shard if present else None)
        groups.append(group)
        tags[name].append(tag)
        if shard is not None and not present:
            value = f"the input's {shard.url} is now {shard.num_bytes} bytes, version {shard.version}"
            verdict.findings.append(Finding(group.where, "old-version", value))
        elsewhere += compared and shard is None
    for name, found in tags.items():
        if len(found) > 1 and name not in shards:
            value = f"{len(found)} versions, so its samples come {len(found)} times: {', '.join(found)}"
            verdict.findings.append(Finding(f"{EMBEDDINGS}/{name}.*", "two-versions", value))
    verdict.findings.extend(
        Finding(f"{EMBEDDINGS}/{name}.*", "shard-missing", f"no part of {shard.url}")
        for name, shard in sorted(shards.items())
        if name not in tags
    )
    if elsewhere:
        verdict.notes.append(f"{elsewhere} shards are stored and not in this input: not compared with their tars")
    verdict.shards = len(tags)
    return groups


# One part, read whole.


class _Rows(NamedTuple):
    """Which samples the rows of a file are: their indices (-1 for null) and ids."""

    indices: np.ndarray[Any, Any]
    ids: list[str | None]

    def named(self, rows: Iterable[int]) -> str:
        """`rows` in a few words."""
        found = list(rows)
        first = ", ".join(f"sample {self.indices[row]} ({self.ids[row]!a})" for row in found[:3])
        return f"{len(found)} rows: {first}{' ...' if len(found) > 3 else ''}"


_NO_ROWS = _Rows(np.zeros(0, np.int64), [])


@dataclass
class _Part:
    """What was found in one part. `whole` is false where its rows could not be read or are not known."""

    name: PartName
    findings: list[Finding] = field(default_factory=list)
    whole: bool = False
    first_index: int | None = None
    num_samples: int = 0
    embedded: _Rows = _NO_ROWS
    errors: _Rows = _NO_ROWS
    fault: str | None = None
    # The only embedding there is in it, where all its rows are alike.
    alike: bytes | None = None

    def find(self, folder: str, rule: str, value: str) -> None:
        """Add a finding about the part's file in `folder`."""
        self.findings.append(Finding(f"{folder}/{self.name}", rule, value))


class _File(NamedTuple):
    """One Parquet file, read: its metadata, who its rows are, and why they are errors."""

    metadata: dict[str, str]
    rows: _Rows
    reasons: list[str]


class _VectorCheck:
    """What is wrong with the embeddings of a part, told piece by piece."""

    def __init__(self, expected: _Expected) -> None:
        self._tolerance = _LENGTH_TOLERANCE[expected.dtype] if expected.normalize else None
        self._num_rows = 0
        self._first: np.ndarray[Any, Any] | None = None
        self._alike = True
        self.bad: dict[str, list[int]] = {"not-finite": [], "length": [], "constant": []}

    def add(self, values: np.ndarray[Any, Any]) -> None:
        """The next rows, [N, C] or [N, C, H, W]."""
        if not len(values):
            return
        flat = values.reshape(len(values), -1)
        finite = np.isfinite(flat).all(axis=1)
        self._tell("not-finite", ~finite)
        if flat.shape[1] > 1:
            self._tell("constant", finite & (flat == flat[:, :1]).all(axis=1))
        if self._tolerance is not None:
            lengths = np.linalg.norm(flat.astype(np.float32), axis=1)
            self._tell("length", finite & (np.abs(lengths - 1.0) > self._tolerance))
        if self._first is None:
            self._first = flat[0].copy()
        self._alike = self._alike and bool((flat == self._first).all())
        self._num_rows += len(flat)

    def _tell(self, rule: str, wrong: np.ndarray[Any, Any]) -> None:
        self.bad[rule].extend((np.flatnonzero(wrong) + self._num_rows).tolist())

    @property
    def alike(self) -> bytes | None:
        """The one embedding that all rows have; None where they differ, or there are none."""
        return self._first.tobytes() if self._first is not None and self._alike else None


def _check_part(output: str, expected: _Expected, name: PartName, has_errors: bool) -> _Part:
    """Read one part and its errors to the last row, and hold them against each other."""
    part = _Part(name)
    check = _VectorCheck(expected)
    embeddings = _read(output, expected, part, EMBEDDINGS, check)
    errors = _read(output, expected, part, ERRORS, check) if has_errors else None
    if embeddings is None:
        return part
    for rule, rows in check.bad.items():
        if rows:
            part.find(EMBEDDINGS, rule, embeddings.rows.named(rows))
    part.embedded, part.alike = embeddings.rows, check.alike
    _check_metadata(expected, part, embeddings)
    counted = embeddings.metadata.get("num_errors")
    if not has_errors and counted not in ("0", None):
        part.find(ERRORS, "errors-missing", f"it is not there, and the part counts {counted} errors")
    elif has_errors and counted == "0":
        part.find(ERRORS, "errors-alone", "it is there, and the part counts no errors")
    if errors is not None:
        part.errors = errors.rows
        _check_errors(part, embeddings, errors)
    if part.first_index is not None and (errors is not None) == (counted != "0"):
        part.whole = True
        _check_samples(part)
    return part


def _read(output: str, expected: _Expected, part: _Part, folder: str, check: _VectorCheck) -> _File | None:
    """One file of a part, read to its last row; None with findings where that cannot be."""
    schema = expected.schema if folder == EMBEDDINGS else ERRORS_SCHEMA
    try:
        file = pq.ParquetFile(pa.BufferReader(read_bytes(join(output, f"{folder}/{part.name}"))))
        metadata = {
            key.decode().removeprefix("embed."): value.decode()
            for key, value in (file.metadata.metadata or {}).items()
            if key.startswith(b"embed.")
        }
        _check_fingerprint(expected, part, folder, metadata)
        if not file.schema_arrow.equals(schema):
            part.find(folder, "schema", _schema_difference(file.schema_arrow, schema))
            return None
        pieces = _Pieces(file, expected.piece_rows, check)
        checksum = content_sha256(pieces)
    except (pa.ArrowException, OSError, ValueError, ShardError) as error:
        part.find(folder, "unreadable", describe(error))
        return None
    said = metadata.pop("content_sha256", None)
    if said != checksum:
        value = f"rows hash to {checksum[:12]}, written were {said[:12]}" if said else "it has no content_sha256"
        part.find(folder, "checksum", value)
    wrong = sorted(pieces.shards - {part.name.shard})
    if wrong:
        part.find(folder, "shard-column", f"{wrong[0]!a} in a part of {part.name.shard!a}")
    return _File(metadata, pieces.rows, pieces.reasons)


class _Pieces:
    """A Parquet's rows a few at a time, looked at as they go by."""

    def __init__(self, file: pq.ParquetFile, piece_rows: int, check: _VectorCheck) -> None:
        self._file = file
        self._piece_rows = piece_rows
        self._check = check
        self._indices: list[int | None] = []
        self._ids: list[str | None] = []
        self.shards: set[str] = set()
        self.reasons: list[str] = []

    def __iter__(self) -> Iterator[pa.Table]:
        yield self._file.schema_arrow.empty_table()
        for batch in self._file.iter_batches(batch_size=self._piece_rows, use_threads=False):
            piece = pa.Table.from_batches([batch])
            self._indices += piece.column(SAMPLE_INDEX).to_pylist()
            self._ids += piece.column(IMAGE_ID).to_pylist()
            self.shards.update(piece.column(SHARD).unique().to_pylist())
            if EMBEDDING in piece.column_names:
                self._check.add(vectors(piece))
            else:
                self.reasons += piece.column(REASON).to_pylist()
            yield piece

    @property
    def rows(self) -> _Rows:
        return _Rows(np.array([-1 if index is None else index for index in self._indices], np.int64), self._ids)


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


def _check_fingerprint(expected: _Expected, part: _Part, folder: str, metadata: dict[str, str]) -> None:
    digest = metadata.get("fingerprint")
    try:
        settings = json.loads(metadata.get("settings", "null"))
    except ValueError:
        settings = None
    if digest == expected.digest and settings == expected.settings:
        return
    if not isinstance(settings, dict):
        part.find(folder, "fingerprint", f"{digest}, run.json has {expected.digest}, and it names no settings")
        return
    differences = [
        f"{name} {json.dumps(settings.get(name))} instead of {json.dumps(expected.settings.get(name))}"
        for name in sorted(settings.keys() | expected.settings.keys())
        if settings.get(name) != expected.settings.get(name)
    ]
    part.find(folder, "fingerprint", "; ".join(differences) or f"{digest}, run.json has {expected.digest}")


def _check_metadata(expected: _Expected, part: _Part, file: _File) -> None:
    """The part's own metadata against its name and rows; sets where the part begins and how long it is."""
    name, metadata = part.name, file.metadata
    numbers: dict[str, int] = {}
    for key in ("part", "first_index", "num_samples", "num_embedded", "num_errors", "shard_bytes"):
        text = metadata.get(key, "")
        if not re.fullmatch(r"\d{1,18}", text):
            part.find(EMBEDDINGS, "metadata", f"{key} is {metadata.get(key)!a}, no count")
            return
        numbers[key] = int(text)
    tag = version_tag(numbers["shard_bytes"], metadata.get("shard_version", ""))
    rules = [
        (numbers["part"] == name.part, f"part is {numbers['part']}, by its name {name.part}"),
        (metadata.get("end") == name.end, f"end is {metadata.get('end')!a}, by its name {name.end!a}"),
        (tag == name.tag, f"the shard's version gives the tag {tag}, by its name {name.tag}"),
        (
            numbers["num_embedded"] == len(file.rows.ids),
            f"num_embedded is {numbers['num_embedded']}, it has {len(file.rows.ids)} rows",
        ),
        (
            numbers["num_samples"] <= expected.part_rows,
            f"num_samples is {numbers['num_samples']}, a part holds at most {expected.part_rows}",
        ),
    ]
    for holds, value in rules:
        if not holds:
            part.find(EMBEDDINGS, "metadata", value)
    if numbers["num_samples"] <= expected.part_rows:
        part.first_index, part.num_samples = numbers["first_index"], numbers["num_samples"]


def _check_errors(part: _Part, embeddings: _File, errors: _File) -> None:
    """An errors file against its part. A broken shard's fault is a row of its own, and no sample."""
    for key in sorted(errors.metadata.keys() | embeddings.metadata.keys()):
        found, wanted = errors.metadata.get(key), embeddings.metadata.get(key)
        if found != wanted and key not in ("fingerprint", "settings", "versions"):
            part.find(ERRORS, "metadata", f"{key} is {found!a}, its part has {wanted!a}")
    counted = embeddings.metadata.get("num_errors")
    if counted not in (str(len(errors.rows.ids)), "0"):
        part.find(ERRORS, "metadata", f"num_errors is {counted}, it has {len(errors.rows.ids)} rows")
    faults = np.flatnonzero(errors.rows.indices < 0)
    num_faults = 1 if part.name.end == END_BROKEN else 0
    if len(faults) != num_faults:
        part.find(ERRORS, "counts", f"{len(faults)} rows without sample_index, it must be {num_faults}")
    if len(faults):
        part.fault = errors.reasons[int(faults[0])]
    empty = sum(not reason for reason in errors.reasons)
    if empty:
        part.find(ERRORS, "metadata", f"{empty} rows without a reason")


def _check_samples(part: _Part) -> None:
    """Every sample that the part covers is one row, in order."""
    errors = part.errors.indices[part.errors.indices >= 0]
    num_embedded = len(part.embedded.indices)
    if num_embedded + len(errors) != part.num_samples:
        part.find(
            EMBEDDINGS, "counts", f"{num_embedded} embeddings and {len(errors)} errors for {part.num_samples} samples"
        )
    assert part.first_index is not None
    found, times = np.unique(np.concatenate([part.embedded.indices, errors]), return_counts=True)
    expected = np.arange(part.first_index, part.first_index + part.num_samples)
    faults = [
        (found[times > 1], "more than once"),
        (np.setdiff1d(expected, found), "missing"),
        (np.setdiff1d(found, expected), "not of this part"),
    ]
    for samples, what in faults:
        if len(samples):
            part.find(EMBEDDINGS, "sample-index", f"{_some(samples)} {what}")
    for folder, indices in ((EMBEDDINGS, part.embedded.indices), (ERRORS, errors)):
        back = np.flatnonzero(np.diff(indices) < 0)
        if len(back):
            at = int(back[0])
            part.find(folder, "sample-index", f"not in order: {indices[at + 1]} follows {indices[at]}")


def _some(samples: np.ndarray[Any, Any]) -> str:
    shown = ", ".join(map(str, samples[:5].tolist()))
    return f"sample{'s' if len(samples) > 1 else ''} {shown}{' ...' if len(samples) > 5 else ''}"


# One shard, part after part.


def _checked(
    output: str, expected: _Expected, groups: list[_Group], threads: int, on_progress: Progress
) -> Iterator[tuple[_Group, list[_Part], _Tar | None]]:
    """Read all parts and the tars beside them in threads, and give them shard by shard, in order."""
    waiting: deque[tuple[_Group, list[Future[_Part]], Future[_Tar] | None]] = deque()
    total, submitted, done = sum(len(group.parts) for group in groups), 0, 0
    pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
    try:
        for group in [*groups, None]:
            if group is not None:
                futures = [
                    pool.submit(_check_part, output, expected, name, name in group.with_errors)
                    for name in group.parts
                ]
                tar = None if group.shard is None else pool.submit(_walk, group.shard, expected)
                waiting.append((group, futures, tar))
                submitted += len(futures)
            while waiting and (group is None or submitted - done > 8 * threads):
                oldest, futures, tar = waiting.popleft()
                parts = []
                for future in futures:
                    parts.append(future.result())
                    done += 1
                    on_progress("parts", done, total)
                yield oldest, parts, None if tar is None else tar.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_group(group: _Group, parts: list[_Part], verdict: Verdict) -> None:
    """The parts of one shard version as a whole."""
    findings = verdict.findings
    last = parts[-1].name
    missing = _gaps([part.name.part for part in parts])
    if missing:
        value = f"part {', '.join(missing)} of {last.part + 1} is missing"
        findings.append(Finding(group.where, "part-missing", value))
    if last.end == END_NONE:
        findings.append(
            Finding(group.where, "part-missing", f"the last part is missing: {last.part} is not the last")
        )
    for part, following in itertools.pairwise(parts):
        name = part.name
        if following.name.part == name.part:
            value = f"part {name.part} is stored twice, also as {following.name}"
            findings.append(Finding(f"{EMBEDDINGS}/{name}", "part-twice", value))
        elif name.end != END_NONE:
            value = f"part {following.name.part} comes after the last, {name.part}"
            findings.append(Finding(f"{EMBEDDINGS}/{following.name}", "part-twice", value))
        elif part.whole and following.whole and following.name.part == name.part + 1:
            assert part.first_index is not None
            end = part.first_index + part.num_samples
            if following.first_index != end:
                value = f"begins at sample {following.first_index}, the part before ends at {end}"
                findings.append(Finding(f"{EMBEDDINGS}/{following.name}", "sample-index", value))
    if parts[0].whole and parts[0].name.part == 0 and parts[0].first_index != 0:
        value = f"begins at sample {parts[0].first_index}, the first part begins at 0"
        findings.append(Finding(f"{EMBEDDINGS}/{parts[0].name}", "sample-index", value))
    if group.is_broken:
        verdict.broken_shards += 1
        value = parts[-1].fault or "it was not read to its end"
        findings.append(Finding(f"{EMBEDDINGS}/{last}", "shard-broken", value))
    for part in parts:
        findings.extend(part.findings)
        verdict.samples += part.num_samples
        verdict.embedded += len(part.embedded.ids)
        verdict.errors += int((part.errors.indices >= 0).sum())
    verdict.parts += len(parts)
    _check_ids(group, parts, findings)
    _check_alike(group, parts, findings)


def _gaps(numbers: list[int]) -> list[str]:
    """What lacks between 0 and the last of sorted `numbers`, as `N` and `N to M`."""
    around = itertools.pairwise([-1, *numbers])
    return [f"{low + 1}" if high - low == 2 else f"{low + 1} to {high - 1}" for low, high in around if high - low > 1]


def _check_ids(group: _Group, parts: list[_Part], findings: list[Finding]) -> None:
    seen: set[str | None] = set()
    repeated: list[str | None] = []
    for image_id in itertools.chain.from_iterable(part.embedded.ids for part in parts):
        if image_id in seen:
            repeated.append(image_id)
        seen.add(image_id)
    if repeated:
        value = f"{len(repeated)} rows have the image_id of an earlier one: {_listed(repeated)}"
        findings.append(Finding(group.where, "id-repeated", value))


def _listed(names: list[str | None]) -> str:
    return ", ".join(f"{name!a}" for name in names[:3]) + (" ..." if len(names) > 3 else "")


def _check_alike(group: _Group, parts: list[_Part], findings: list[Finding]) -> None:
    filled = [part for part in parts if len(part.embedded.ids)]
    num_rows = sum(len(part.embedded.ids) for part in filled)
    if num_rows > 1 and filled[0].alike is not None and all(part.alike == filled[0].alike for part in filled):
        findings.append(Finding(group.where, "all-alike", f"its {num_rows} embeddings are one and the same"))


# The tars, as the standard library reads them.


@dataclass
class _Tar:
    """What `tarfile` finds in a shard: the key of each sample and, where ids are a field, that field."""

    keys: list[str] = field(default_factory=list)
    ids: list[str | None] | None = None
    fault: str | None = None


def _walk(shard: Shard, expected: _Expected) -> _Tar:
    """The samples of a tar to the end of the file, read on after an end of the archive, and after damage."""
    found = _Tar(ids=None if expected.id is None else [])
    try:
        with _opened(shard) as file:
            tar = _TarReader(file)
            for key, members in tar.samples():
                found.keys.append(_printable(key))
                if found.ids is not None and expected.id is not None:
                    found.ids.append(_user_id(tar, members, expected.id))
            found.fault = tar.fault
    except (OSError, ShardError) as error:
        found.fault = describe(error)
    return found


@contextlib.contextmanager
def _opened(shard: Shard) -> Iterator[IO[bytes]]:
    fs, path = locate(shard.url)
    if isinstance(fs, LocalFileSystem):
        with open(path, "rb") as file:
            yield file
    else:
        with ShardStream(shard.url, shard.num_bytes, shard.version) as stream:
            yield cast(IO[bytes], _StreamFile(stream))


class _StreamFile(io.RawIOBase):
    """A shard on object storage as a file: in chunks that are retried."""

    def __init__(self, stream: ShardStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._stream.position, io.SEEK_END: self._stream.num_bytes}[whence]
        self._stream.position = base + offset
        return self._stream.position

    def tell(self) -> int:
        return self._stream.position


_Members = list[tuple[str, tarfile.TarInfo]]  # (extension, member)


class _TarReader:
    """A shard as `tarfile` reads it with `ignore_zeros`, up to the first fault, which is then in `fault`."""

    def __init__(self, file: IO[bytes]) -> None:
        self.fault: str | None = None
        self._tar: tarfile.TarFile | None = None
        try:
            self._tar = tarfile.open(  # noqa: SIM115 - it holds nothing but the caller's file
                fileobj=file, mode="r:", ignore_zeros=True, encoding="utf-8", errors="surrogateescape"
            )
        except _TAR_ERRORS as error:
            self.fault = describe(error)

    def samples(self) -> Iterator[tuple[str, _Members]]:
        """Each run of members of one key, by WebDataset's rule."""
        files = (member for member in self._members() if not member.isdir() and member.type != _VOLUME_LABEL)
        named = ((_NAME.fullmatch(member.name), member) for member in files)
        keyed = ((match[1], match[2] or "", member) for match, member in named if match is not None)
        for key, members in itertools.groupby(keyed, key=lambda item: item[0]):
            yield key, [(extension, member) for _, extension, member in members]

    def _members(self) -> Iterator[tarfile.TarInfo]:
        reached = -1
        while self._tar is not None:
            try:
                member = self._tar.next()
            except _TAR_ERRORS as error:
                self.fault = describe(error)
                return
            if member is None:
                return
            if self._tar.offset <= reached:
                self.fault = f"it goes back to byte {self._tar.offset}"
                return
            reached = self._tar.offset
            # tarfile keeps all members, which is gigabytes for millions.
            self._tar.members.clear()  # type: ignore[attr-defined]
            yield member

    def read(self, member: tarfile.TarInfo) -> bytes | None:
        """The data of a member; None for links and other members without data."""
        file = self._tar.extractfile(member) if self._tar is not None and member.isreg() else None
        return None if file is None else file.read()


def _user_id(tar: _TarReader, members: _Members, field: Field) -> str | None:
    """The id that the user's field names, None where the sample has none."""
    wanted = field.member.lower()
    named = next((member for extension, member in members if extension.lower() == wanted), None)
    data = tar.read(named) if named is not None and named.size <= MAX_METADATA_BYTES else None
    if data is None:
        return None
    if not field.path and wanted != "json":
        return data.decode("utf-8", "backslashreplace").strip("\r\n")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    for name in field.path:
        value = value.get(name) if isinstance(value, dict) else None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _printable(text: str) -> str:
    """A name as rows hold it: bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _compare(group: _Group, parts: list[_Part], tar: _Tar, verdict: Verdict) -> None:
    """The rows of a shard against its tar: of a whole one at their place, of a broken one in their order.

    Past damage a tar may be read on in more than one way, so there `tarfile` must only not find more.
    """
    assert group.shard is not None
    if group.is_broken:
        verdict.tars_compared += 1
        lost = _lost(parts, tar) if _are_whole(parts) else []
        if lost:
            value = f"{len(lost)} samples that tarfile finds in its tar are not stored: {_listed(lost)}"
            verdict.findings.append(Finding(group.where, "tar-count", value))
        return
    if tar.fault is not None:
        verdict.findings.append(Finding(group.shard.url, "tar-unreadable", tar.fault))
        return
    verdict.tars_compared += 1
    num_samples = sum(part.num_samples for part in parts)
    if _are_whole(parts) and num_samples != len(tar.keys):
        value = f"{num_samples} samples are stored, its tar has {len(tar.keys)}"
        verdict.findings.append(Finding(group.where, "tar-count", value))
    for part in parts:
        for folder, rows in ((EMBEDDINGS, part.embedded), (ERRORS, part.errors)):
            wrong = [
                (index, image_id, allowed)
                for index, image_id in zip(rows.indices.tolist(), rows.ids, strict=True)
                if index >= 0 and image_id not in (allowed := _allowed(tar, index, folder))
            ]
            if wrong:
                index, image_id, allowed = wrong[0]
                has = " or ".join(f"{name!a}" for name in allowed) or "no such sample"
                value = f"{len(wrong)} rows: sample {index} is {image_id!a}, the tar has {has}"
                verdict.findings.append(Finding(f"{folder}/{part.name}", "tar-id", value))


def _are_whole(parts: list[_Part]) -> bool:
    return all(part.whole and part.name.part == number for number, part in enumerate(parts))


def _lost(parts: list[_Part], tar: _Tar) -> list[str | None]:
    """Keys in the tar that no row has after the row of the key before."""
    rows = [
        (index, image_id)
        for part in parts
        for rows in (part.embedded, part.errors)
        for index, image_id in zip(rows.indices.tolist(), rows.ids, strict=True)
        if index >= 0
    ]
    places: dict[str | None, list[int]] = defaultdict(list)
    for index, image_id in sorted(rows):
        places[image_id].append(index)
    lost: list[str | None] = []
    reached = -1
    for number, key in enumerate(tar.keys):
        after = [
            found[at]
            for found in (places.get(name, []) for name in _allowed(tar, number, ERRORS))
            if (at := bisect.bisect_right(found, reached)) < len(found)
        ]
        if after:
            reached = min(after)
        else:
            lost.append(key)
    return lost


def _allowed(tar: _Tar, index: int, folder: str) -> list[str]:
    """Ids that the sample at `index` may have: an error may be told by its key before its id is known."""
    if index >= len(tar.keys):
        return []
    if tar.ids is None:
        return [tar.keys[index]]
    user_id = tar.ids[index]
    return ([] if user_id is None else [user_id]) + ([tar.keys[index]] if folder == ERRORS else [])


# Embeddings computed again.


class _Source(NamedTuple):
    """A part to draw rows from, and the shard that it was made of."""

    name: PartName
    shard: Shard
    num_rows: int


class _Model:
    """An encoded image to features, with plain eager torch in fp32 on CPU, one step after the other."""

    def __init__(self, made: Fingerprint, spec: str | None) -> None:
        settings = made.settings
        name = made.versions["weights"]
        # torchvision's own are told as ResNet50_Weights.IMAGENET1K_V2, and asked for by the last part.
        weights = load_weights(settings["backbone"], spec or name.partition("_Weights.")[2] or name)
        if weights.sha256 != settings["weights_sha256"]:
            raise WeightsError(
                f"weights {weights.name} have sha256 {weights.sha256[:12]}, the output was made with {name} "
                f"of sha256 {settings['weights_sha256'][:12]}"
            )
        preprocess = Preprocess(**{key: _tuple(value) for key, value in settings["preprocess"].items()})
        self._decoder = Decoder(
            preprocess, max_pixels=settings["max_pixels"], ignore_orientation=settings["ignore_orientation"]
        )
        self._backbone = build_backbone(settings["backbone"], weights, settings["features"]).eval()
        self._mean = torch.tensor(preprocess.mean)[:, None, None]
        self._std = torch.tensor(preprocess.std)[:, None, None]
        self._normalize = bool(settings["normalize"])
        self.least_cosine = _COSINE.get((settings["precision"], settings["dtype"]), _COSINE_REDUCED)

    def embed(self, image: bytes) -> np.ndarray[Any, Any]:
        """float32 features [C] of an encoded image, a feature map's as [C * H * W]. Raises `SampleError`."""
        pixels = torch.from_numpy(np.array(self._decoder.decode(image)))
        with torch.inference_mode():
            scaled = (pixels.permute(2, 0, 1).float() / 255.0 - self._mean) / self._std
            features = self._backbone(scaled[None]).flatten()
        values: np.ndarray[Any, Any] = (features / features.norm() if self._normalize else features).numpy()
        return values


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _model(made: Fingerprint, recompute: Recompute, verdict: Verdict) -> _Model | None:
    try:
        return _Model(made, recompute.weights)
    except (SettingsError, KeyError, TypeError) as error:
        if recompute.required:
            raise SettingsError(f"cannot compute embeddings again: {error}") from error
        verdict.notes.append(f"no embedding was computed again: {error}")
        return None


def _draw(sources: list[_Source], recompute: Recompute) -> list[tuple[_Source, list[int]]]:
    """Rows to compute again, each as likely as any other, by part."""
    ends = list(itertools.accumulate(source.num_rows for source in sources))
    total = ends[-1] if ends else 0
    count = total if recompute.num_images is None else min(recompute.num_images, total)
    rows: dict[int, list[int]] = defaultdict(list)
    for number in sorted(random.Random(recompute.seed).sample(range(total), count)):
        position = bisect.bisect_right(ends, number)
        rows[position].append(number - (ends[position] - sources[position].num_rows))
    return [(sources[position], found) for position, found in rows.items()]


def _recompute(
    output: str,
    expected: _Expected,
    model: _Model,
    drawn: list[tuple[_Source, list[int]]],
    verdict: Verdict,
    on_progress: Progress,
) -> None:
    """Compute the drawn rows again, part by part."""
    total = sum(len(rows) for _, rows in drawn)
    for source, rows in drawn:
        file = f"{EMBEDDINGS}/{source.name}"
        try:
            stored = _Embedded.read(output, file)
            images = _images(source.shard, expected, {stored.indices[row] for row in rows})
        except (pa.ArrowException, OSError, ShardError) as error:
            verdict.findings.append(Finding(file, "recompute", f"cannot be read again: {describe(error)}"))
            continue
        faults: list[str] = []
        for row in rows:
            fault, cosine = _disagreement(model, images.get(stored.indices[row]), stored, row)
            if fault is not None:
                faults.append(f"image_id {stored.ids[row]!a}: {fault}")
            if cosine is not None:
                verdict.lowest_cosine = (
                    cosine if verdict.lowest_cosine is None else min(cosine, verdict.lowest_cosine)
                )
            verdict.recomputed += 1
            on_progress("recomputed", verdict.recomputed, total)
        if faults:
            value = f"{len(faults)} of {len(rows)} rows: {'; '.join(faults[:3])}{' ...' if len(faults) > 3 else ''}"
            verdict.findings.append(Finding(file, "recompute", value))


class _Embedded(NamedTuple):
    """The rows of a part under embeddings/; `values` are [N, C], feature maps flat."""

    ids: list[str]
    indices: list[int]
    values: np.ndarray[Any, Any]

    @classmethod
    def read(cls, output: str, file: str) -> _Embedded:
        table = pq.read_table(
            pa.BufferReader(read_bytes(join(output, file))), columns=[IMAGE_ID, SAMPLE_INDEX, EMBEDDING]
        )
        values = vectors(table).reshape(len(table), -1)
        return cls(table.column(IMAGE_ID).to_pylist(), table.column(SAMPLE_INDEX).to_pylist(), values)


def _disagreement(model: _Model, image: bytes | None, stored: _Embedded, row: int) -> tuple[str | None, float | None]:
    """How a stored row differs from the embedding of its image (None where it does not), and their cosine.

    Cosine alone does not tell images apart where all embeddings are nearly alike, as those of random
    weights are; so no other row of the part may be much nearer either.
    """
    if image is None:
        return "its sample has no image in the tar", None
    try:
        embedded = model.embed(image)
    except SampleError as error:
        return f"its image cannot be decoded: {error}", None
    own = stored.values[row].astype(np.float32)
    lengths = float(np.linalg.norm(own) * np.linalg.norm(embedded))
    cosine = float(own @ embedded) / lengths if 0.0 < lengths < math.inf else 0.0
    distances = _distances(stored.values, embedded)
    nearest = int(distances.argmin())
    if distances[row] > _NEARER * distances[nearest]:
        return f"its image's embedding is that of {stored.ids[nearest]!a}", cosine
    if not cosine >= model.least_cosine:
        return f"cosine {cosine:.6f} with its image's, not {model.least_cosine} or more", cosine
    return None, cosine


def _distances(values: np.ndarray[Any, Any], embedded: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """L2 distances of rows [N, C] to one embedding [C]; infinite where a row is not finite."""
    rows = max(1, _PIECE_BYTES // embedded.nbytes)
    pieces = [
        np.linalg.norm(values[start : start + rows].astype(np.float32) - embedded, axis=1)
        for start in range(0, len(values), rows)
    ]
    distances: np.ndarray[Any, Any] = np.nan_to_num(np.concatenate(pieces), nan=np.inf, posinf=np.inf)
    return distances


def _images(shard: Shard, expected: _Expected, wanted: set[int]) -> dict[int, bytes]:
    """The encoded images of the `wanted` samples of a shard."""
    found: dict[int, bytes] = {}
    with _opened(shard) as file:
        tar = _TarReader(file)
        for index, (_, members) in enumerate(tar.samples()):
            if index in wanted:
                data = _image(tar, members, expected)
                if data is not None:
                    found[index] = data
            if index >= max(wanted):
                break
    return found


def _image(tar: _TarReader, members: _Members, expected: _Expected) -> bytes | None:
    """The sample's image: of the member whose extension comes first in the documented order."""
    ranked = [(image_rank(extension, expected.image_member), member) for extension, member in members]
    known = [(rank, member) for rank, member in ranked if rank is not None]
    return tar.read(min(known, key=lambda item: item[0])[1]) if known else None


def _line(text: str) -> str:
    """`text` on one line, with what a terminal would act on escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
