"""Reads an output: its parts by one listing, its embeddings as a stream."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.errors import OutputError, StoredDataError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.schema import EMBEDDING, END_NONE, IMAGE_ID, SAMPLE_INDEX, SHARD
from shard_embedder.pipeline.core.storage import join, read_bytes
from shard_embedder.pipeline.output.fingerprint import Fingerprint, read_fingerprint
from shard_embedder.pipeline.output.ledger import list_parts
from shard_embedder.pipeline.output.names import EMBEDDINGS, RUN_FILE, PartName
from shard_embedder.pipeline.output.parts import read_facts, vectors

ID_COLUMNS = (IMAGE_ID, SHARD, SAMPLE_INDEX)
# Embeddings in memory at once; a part may be larger.
PIECE_BYTES = 32 * 2**20
_FOOTER_THREADS = 32
_READ_THREADS = 2


class StoredPart(NamedTuple):
    """One part below `embeddings/`. `version` changes with the file, `sha256` with its content."""

    name: str
    num_bytes: int
    version: str
    sha256: str = ""
    num_rows: int = 0

    @property
    def shard(self) -> str:
        """The shard's name."""
        return _parsed(self.name).shard

    @property
    def tag(self) -> str:
        """The version of the shard that it was made from."""
        return _parsed(self.name).tag


class Piece(NamedTuple):
    """Some consecutive rows: their `ID_COLUMNS`, and their embeddings, float32 [N, C]."""

    ids: pa.Table
    vectors: np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Output:
    """An output and what made it."""

    url: str
    made: Fingerprint
    num_features: int


def open_output(url: str) -> Output:
    """An output of pooled features.

    Raises:
        OutputError: no output, or one of feature maps.
    """
    made = read_fingerprint(url)
    if made is None:
        raise OutputError(f"{url} is not an output: it has no {RUN_FILE}")
    shape = made.settings.embedding_shape
    if len(shape) != 1:
        raise OutputError(f"{url} has embeddings of shape {list(shape)}: only pooled features [C] can be compared")
    return Output(url, made, shape[0])


def list_stored(output: Output) -> list[StoredPart]:
    """The stored parts in the order of their names. A listing does not give `sha256` and `num_rows`.

    Raises:
        OutputError: it cannot be listed, or a shard is stored in two versions.
    """
    found = [
        (name, StoredPart(str(name), info.num_bytes, info.version))
        for name, info in list_parts(output.url, EMBEDDINGS)
    ]
    tags: dict[str, set[str]] = defaultdict(set)
    for name, _ in found:
        tags[name.shard].add(name.tag)
    twice = sorted(shard for shard, versions in tags.items() if len(versions) > 1)
    if twice:
        raise OutputError(
            f"{format_count(len(twice), 'shard')} stored in two versions, such as {twice[0]!r}: a run has replaced "
            "a shard and is not done; run the job to its end first"
        )
    return [part for _, part in sorted(found)]


def unfinished(parts: Iterable[StoredPart]) -> list[str]:
    """Shards whose last part is not stored yet, in the order of their names."""
    ended: dict[str, bool] = {}
    for part in parts:
        name = _parsed(part.name)
        ended[name.shard] = ended.get(name.shard, False) or name.end != END_NONE
    return sorted(shard for shard, is_ended in ended.items() if not is_ended)


def with_facts(output: Output, parts: Sequence[StoredPart]) -> list[StoredPart]:
    """The parts with `sha256` and `num_rows` from their footers.

    Raises:
        OutputError: a part is broken, or was made with other settings than run.json names.
    """

    def one(part: StoredPart) -> StoredPart:
        facts = read_facts(output.url, f"{EMBEDDINGS}/{part.name}", part.num_bytes)
        if facts.metadata.get("fingerprint") != output.made.digest:
            raise StoredDataError(f"{part.name} was made with other settings than {RUN_FILE} of {output.url} names")
        sha256 = facts.metadata.get("content_sha256")
        if not sha256:
            raise StoredDataError(f"{part.name} has no content_sha256 in its metadata")
        return part._replace(sha256=sha256, num_rows=facts.num_rows)

    with ThreadPoolExecutor(_FOOTER_THREADS, thread_name_prefix="footers") as pool:
        return list(pool.map(one, parts))


def stream(output: Output, parts: Sequence[StoredPart]) -> Iterator[Piece]:
    """The rows of `parts`, in order. Memory holds the files of three parts, and a piece.

    Raises:
        OutputError: a part cannot be read, or does not hold what its footer said.
    """
    waiting: deque[tuple[StoredPart, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read-parts")
    try:
        for part in [*parts, None]:
            if part is not None:
                waiting.append((part, pool.submit(read_bytes, join(output.url, f"{EMBEDDINGS}/{part.name}"))))
            while waiting and (part is None or len(waiting) > _READ_THREADS):
                oldest, data = waiting.popleft()
                yield from _pieces(output, oldest, data)
    finally:
        pool.shutdown(cancel_futures=True)


def _pieces(output: Output, part: StoredPart, data: Future[bytes]) -> Iterator[Piece]:
    rows = max(1, PIECE_BYTES // (4 * output.num_features))
    count = 0
    try:
        file = pq.ParquetFile(pa.BufferReader(data.result()))
        for batch in file.iter_batches(rows, columns=[*ID_COLUMNS, EMBEDDING]):
            table = pa.Table.from_batches([batch])
            values = vectors(table).astype(np.float32, copy=False)
            if values.shape != (len(table), output.num_features):
                raise StoredDataError(
                    f"{part.name} has embeddings of {values.shape[1:]}, not ({output.num_features},)"
                )
            count += len(table)
            yield Piece(table.select(ID_COLUMNS), values)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise StoredDataError(f"{part.name} cannot be read: {describe(error)}") from error
    if count != part.num_rows:
        raise StoredDataError(f"{part.name} has {count} rows now, and had {part.num_rows} when it was listed")


def unit(values: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Rows [N, C] scaled to L2 length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    scaled: np.ndarray[Any, np.dtype[np.float32]] = (values / np.where(lengths > 0, lengths, 1)).astype(np.float32)
    return scaled


def _parsed(name: str) -> PartName:
    parsed = PartName.parse(name)
    assert parsed is not None
    return parsed
