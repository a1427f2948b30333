"""The actor of the embed stage: one backbone on one device, pixels to embeddings."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from pipeline.decode import Preprocess
from pipeline.schema import (
    EMBEDDING,
    PIXELS,
    REASON,
    STAGE,
    STAGE_EMBED,
    embedding_field,
    part_row,
    part_rows,
    with_payload,
)


class Runner(Protocol):
    """What computes embeddings."""

    def embed(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`.

        Args:
            pixels: uint8 of shape [N, H, W, 3].
            rows: which of the N to embed, in order.

        Returns:
            float32 of shape [len(rows), C] or [len(rows), C, H', W'].
        """
        ...


class Source(Protocol):
    """What a runner is made of, in whatever process it is to run."""

    def runner(
        self, *, backbone: str, features: str, preprocess: Preprocess, normalize: bool, precision: str, device: str,
        batch_size: int | None, num_threads: int | None,
    ) -> Runner:  # fmt: skip
        """Load it. A `batch_size` or `num_threads` of None is the runner's to choose."""
        ...

    def share(self) -> Source:
        """The same with what is large in Ray's object store, for actors."""
        ...


class Embedder:
    """Embeds parts: `__call__` takes and gives the tables between the stages.

    Batches never cross parts, so that a sample's embedding does not depend on what else runs.
    """

    def __init__(
        self, *, source: Source, backbone: str, features: str, preprocess: Preprocess, shape: tuple[int, ...],
        dtype: str, precision: str, normalize: bool, device: str, batch_size: int | None, num_threads: int | None,
    ) -> None:  # fmt: skip
        self._crop = preprocess.crop
        self._field = embedding_field(shape, dtype)
        self._stored = np.dtype(dtype)
        self._runner = source.runner(
            backbone=backbone, features=features, preprocess=preprocess, normalize=normalize, precision=precision,
            device=device, batch_size=batch_size, num_threads=num_threads,
        )  # fmt: skip

    def embed(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`, as `Runner.embed` does."""
        return self._runner.embed(pixels, rows)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Parts with pixels in, the same parts with embeddings out."""
        return pa.concat_tables([self._part(values, samples) for values, samples in part_rows(table)])

    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = time.perf_counter()
        stages, reasons = samples.field(STAGE).to_pylist(), samples.field(REASON).to_pylist()
        rows = np.flatnonzero([reason is None for reason in reasons])
        shape = self._storage_shape()
        stored = np.zeros((len(samples), *shape), self._stored)
        if len(rows):
            pixels = samples.field(PIXELS).values.to_numpy().reshape(-1, *self._crop, 3)
            offset = samples.field(PIXELS).offset
            with np.errstate(over="ignore"):
                embedded = self.embed(pixels, rows + offset).astype(self._stored).reshape(len(rows), *shape)
            stored[rows] = embedded
            for row in rows[~np.isfinite(embedded).all(axis=1)]:
                stages[row] = STAGE_EMBED
                reasons[row] = f"not finite: the embedding has NaN or infinite values as {self._stored}"
        column = self._column(stored, [reason is not None for reason in reasons])
        result = with_payload(
            samples,
            pa.field(EMBEDDING, column.type),
            **{
                STAGE: pa.array(stages, pa.string()),
                REASON: pa.array(reasons, pa.string()),
                EMBEDDING: column,
            },
        )
        return part_row({**values, "embed_s": time.perf_counter() - start}, result)

    def _storage_shape(self) -> tuple[int]:
        kind = self._field.type
        return (getattr(kind, "storage_type", kind).list_size,)

    def _column(self, stored: np.ndarray[Any, Any], failed: list[bool]) -> pa.FixedSizeListArray:
        kind = getattr(self._field.type, "storage_type", self._field.type)
        mask = pa.array(failed, pa.bool_()) if failed else None
        return pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), type=kind, mask=mask)
