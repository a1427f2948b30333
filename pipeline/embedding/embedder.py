"""The actor of the embed stage: one backbone on one device, pixels to embeddings."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np
import pyarrow as pa

from shard_embedder.pipeline.core.errors import DeviceError
from shard_embedder.pipeline.core.schema import (
    EMBEDDING,
    PIXELS,
    REASON,
    STAGE,
    STAGE_DECODE,
    STAGE_EMBED,
    embedding_field,
    part_row,
    part_rows,
    with_payload,
)
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.embedding.network import Network, Placement

if TYPE_CHECKING:  # whoever computes without torch shall not load it
    from shard_embedder.pipeline.embedding.gpu import Gpu


# Parts that an actor has at once: while one is computed, another is fetched and taken apart.
PARTS_AT_ONCE = 2


class Runner(Protocol):
    """What computes embeddings."""

    @property
    def batch_size(self) -> int:
        """Images a batch, now: a runner may halve it where the memory does not hold a batch."""
        ...

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that it computes on, if any."""
        ...

    def embed(self, pixels: Any, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`; several threads may ask at once.

        Args:
            pixels: uint8 of shape [N, H, W, 3], as numpy has it; or as its device has it, where it is torch's.
            rows: which of the N to embed, in order.

        Returns:
            float32 of shape [len(rows), C] or [len(rows), C, H', W'].
        """
        ...


class PartPixels(NamedTuple):
    """What a runner embeds of a part.

    `values` are pixels for `Runner.embed`, `places` which of them are the part's rows without a reason, in order, and
    `faults` the rows that cannot be decoded, each with its reason. `num_refused` images were decoded on the CPU
    because the device refused them; `refusal` is what it said of the first.
    """

    values: Any
    places: np.ndarray[Any, Any]
    faults: dict[int, str]
    num_refused: int = 0
    refusal: str | None = None


class Intake(Protocol):
    """Where a runner's pixels come from."""

    def __call__(self, samples: pa.StructArray, rows: np.ndarray[Any, Any], part: str) -> PartPixels:
        """Pixels of the rows of `samples` that have no reason yet. `part` names them, and no others."""
        ...


class Source(Protocol):
    """What a runner is made of, in whatever process it is to run.

    `has_own_batch_size` says that its runner's own batch size is the best, so that none need be looked for.
    """

    @property
    def has_own_batch_size(self) -> bool: ...  # noqa: D102

    def runner(self, network: Network, placement: Placement) -> Runner:
        """Load it."""
        ...


class _BusyTime:
    """Seconds of `clock` that passed while at least one part was under way, none of them counted twice."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._turn = threading.Lock()
        self._under_way = 0
        self._since = 0.0

    def begin(self) -> None:
        with self._turn:
            if not self._under_way:
                self._since = self._clock()
            self._under_way += 1

    def end(self) -> float:
        """What has passed that no part which ended has counted."""
        with self._turn:
            now = self._clock()
            counted, self._since = now - self._since, now
            self._under_way -= 1
            return counted


class Embedder:
    """Embeds parts: `__call__` takes and gives the tables between the stages.

    Calls may come from several threads: while one part is computed, the next is taken apart and the one before put
    together. Batches never cross parts, so that a sample's embedding does not depend on what else runs. With a
    `decoder` the samples come as `pipeline.decoding.jpeg_forwarder` gives them, are decoded on the device, and what
    that refuses by `decoder`; the time that takes is this stage's.

    With `ends_process`, an error that leaves the GPU useless to this process ends it, so that another takes its
    place; but not before it has embedded a part: then each new process would end as this one, without end.
    """

    def __init__(
        self,
        source: Source,
        network: Network,
        placement: Placement,
        *,
        shape: tuple[int, ...],
        dtype: str,
        decoder: Decoder | None = None,
        ends_process: bool = False,
    ) -> None:
        self._crop = network.preprocess.crop
        self._field = embedding_field(shape, dtype)
        self._stored = np.dtype(dtype)
        self._runner = source.runner(network, placement)
        gpu = self._runner.gpu
        self._intake = self._pixels if decoder is None else _device_intake(decoder, placement.device, gpu)
        self._busy = _BusyTime(time.perf_counter if gpu is None else lambda: gpu.busy_s)
        self._ends_process = ends_process
        self._has_embedded = False

    def embed(self, pixels: Any, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`, as `Runner.embed` does."""
        return self._runner.embed(pixels, rows)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Parts with pixels in, or with what a device is to decode; the same parts with embeddings out.

        Raises:
            DeviceError: the GPU is of no use to this process any more.
        """
        try:
            return pa.concat_tables([self._part(values, samples) for values, samples in part_rows(table)])
        except RuntimeError as error:
            if self._runner.gpu is None or not self._runner.gpu.is_broken():
                raise
            # torch's advice fills the lines below the first.
            cause, _, _ = str(error).partition("\n")
            reason = f"this process can use its GPU no more: {cause}"
            if self._ends_process and self._has_embedded:
                _end_process(reason)
            raise DeviceError(reason) from error

    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        self._busy.begin()
        try:
            pixels, embedded = self._embedded(samples, f"{values['url']} {values['version']} {values['part']}")
        finally:
            embed_s = self._busy.end()
        told = {"device_refused": pixels.num_refused, "device_refusal": pixels.refusal}
        return part_row({**values, "embed_s": embed_s, "batch_size": self._runner.batch_size, **told}, embedded)

    def _embedded(self, samples: pa.StructArray, part: str) -> tuple[PartPixels, pa.StructArray]:
        stages, reasons = samples.field(STAGE).to_pylist(), samples.field(REASON).to_pylist()
        rows = np.flatnonzero([reason is None for reason in reasons])
        shape = self._storage_shape()
        stored = np.zeros((len(samples), *shape), self._stored)
        pixels = self._intake(samples, rows, part)
        for row, reason in pixels.faults.items():
            stages[row], reasons[row] = STAGE_DECODE, reason
        rows = np.array([row for row in rows if int(row) not in pixels.faults], np.int64)
        if len(rows):
            embedded = self.embed(pixels.values, pixels.places).reshape(len(rows), *shape)
            self._has_embedded = True
            with np.errstate(over="ignore"):
                if len(rows) == len(samples):
                    stored = embedded.astype(self._stored, copy=False)
                else:
                    stored[rows] = embedded
            for row in np.flatnonzero(~np.isfinite(stored).all(axis=1)).tolist():
                stages[row] = STAGE_EMBED
                reasons[row] = f"not finite: the embedding has NaN or infinite values as {self._stored}"
        column = self._column(stored, [reason is not None for reason in reasons])
        return pixels, with_payload(
            samples,
            pa.field(EMBEDDING, column.type),
            **{
                STAGE: pa.array(stages, pa.string()),
                REASON: pa.array(reasons, pa.string()),
                EMBEDDING: column,
            },
        )

    def _pixels(self, samples: pa.StructArray, rows: np.ndarray[Any, Any], part: str) -> PartPixels:
        """What the decode stage has made, where it is."""
        column = samples.field(PIXELS)
        return PartPixels(column.values.to_numpy().reshape(-1, *self._crop, 3), rows + column.offset, {})

    def _storage_shape(self) -> tuple[int]:
        kind = self._field.type
        return (getattr(kind, "storage_type", kind).list_size,)

    def _column(self, stored: np.ndarray[Any, Any], failed: list[bool]) -> pa.FixedSizeListArray:
        kind = getattr(self._field.type, "storage_type", self._field.type)
        mask = pa.array(failed, pa.bool_()) if failed else None
        return pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), type=kind, mask=mask)


def _device_intake(decoder: Decoder, device: str, gpu: Gpu | None) -> Intake:
    from shard_embedder.pipeline.embedding.device_decode import DeviceDecoder  # noqa: PLC0415  whoever computes without torch shall not load it

    return DeviceDecoder(decoder, device, gpu)


def _end_process(reason: str) -> NoReturn:
    sys.stderr.write(f"{reason}; it ends, so that another takes its place\n")
    sys.stderr.flush()
    os._exit(1)
