"""What each process of `decode_all` does. It loads no torch, as the job's own workers, so that they start soon."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import SampleReader

_decoding: list[Any] = []


def num_samples(tables: Iterable[pa.Table]) -> int:
    """How many samples parts have."""
    return sum(sum(table.column("num_samples").to_pylist()) for table in tables)


def read_samples(reader: SampleReader, pending: Iterable[Pending], most: int) -> list[pa.Table]:
    """Parts of the first shards as they leave the reader, with about `most` images in all."""
    tables: list[pa.Table] = []
    left = most
    for table in itertools.chain.from_iterable(map(reader.parts, pending)):
        tables.append(table)
        left -= num_samples([table])
        if left <= 0:
            break
    return tables


def prepare_decoding(reader: SampleReader, decoder: Decoder, pending: list[Pending], most: int, barrier: Any) -> None:
    """In each process that decodes: what it needs, and one part decoded, before any begins."""
    tables = read_samples(reader, pending, most)
    list(decoder(tables[0]))
    _decoding[:] = [decoder, tables]
    barrier.wait()


def decode_part(number: int) -> tuple[int, float]:
    """How many images it decoded, and the core-seconds that this took."""
    decoder, tables = _decoding
    table = tables[number % len(tables)]
    start = time.process_time()
    list(decoder(table))
    return num_samples([table]), time.process_time() - start
