"""Images that are in no shard, embedded as those of an output were: the queries of a search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.embedding.embedder import Embedder
from shard_embedder.pipeline.embedding.network import Placement
from shard_embedder.pipeline.embedding.recipe import recipe_of
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, device_here
from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.stored import PIECE_BYTES
from shard_embedder.pipeline.shards.keys import printable

BATCH_SIZE = 16
_NOT_FINITE = "not finite: the embedding has NaN or infinite values"


class Query(NamedTuple):
    """An image file with its embedding, float32 [C], or the reason why it has none."""

    path: Path
    embedding: np.ndarray[Any, np.dtype[np.float32]] | None
    reason: str = ""

    @property
    def name(self) -> str:
        """The path as text: bytes that are not UTF-8 are \\xNN, as in ids."""
        return printable(str(self.path))


class QueryEmbedder:
    """Embeds images with the backbone, weights, preprocessing and precision that a fingerprint names.

    Batches are of `batch_size`: one that has fewer images takes as long.

    Raises:
        SettingsError: the device is cuda, and there is none.
        WeightsError: the weights cannot be had, or have another sha256 than those of the run.
    """

    def __init__(
        self, made: Fingerprint, weights: str | None = None, device: str = "auto", batch_size: int = BATCH_SIZE
    ) -> None:
        device = device_here(device)
        recipe = recipe_of(made, weights)
        settings = recipe.settings
        self._decoder = Decoder(settings.rules)
        self._crop = settings.preprocess.crop
        self._stored = np.dtype(settings.dtype)
        self._embedder = Embedder(
            SharedWeights.of(recipe.weights),
            recipe.network,
            Placement(device=device, precision=settings.precision, batch_size=batch_size),
            shape=settings.embedding_shape,
            dtype=settings.dtype,
        )

    def __call__(self, paths: Iterable[Path]) -> Iterator[Query]:
        """A query for each path, in order; one that cannot be embedded has the reason."""
        # As many pixels at once as the rest of the package takes of embeddings.
        most = max(BATCH_SIZE, PIECE_BYTES // (self._crop[0] * self._crop[1] * 3) // BATCH_SIZE * BATCH_SIZE)
        waiting: list[Path] = []
        for path in paths:
            waiting.append(path)
            if len(waiting) == most:
                yield from self._embed(waiting)
                waiting = []
        if waiting:
            yield from self._embed(waiting)

    def embed(self, image: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The embedding, float32 [C], of one encoded image.

        Raises:
            SampleError: it has none.
        """
        pixels = self._decoder.decode(image)[None]
        (embedding,) = self._values(pixels, np.zeros(1, np.int64))
        if not np.isfinite(embedding).all():
            raise SampleError(_NOT_FINITE)
        return embedding

    def _embed(self, paths: list[Path]) -> Iterator[Query]:
        pixels = np.zeros((len(paths), *self._crop, 3), np.uint8)
        reasons: list[str] = []
        for row, path in enumerate(paths):
            reason = ""
            try:
                pixels[row] = self._decoder.decode(path.read_bytes())
            except (OSError, SampleError) as error:
                reason = str(error)
            reasons.append(reason)
        good = np.flatnonzero([not reason for reason in reasons])
        embedded = dict(zip(good.tolist(), self._values(pixels, good), strict=True)) if len(good) else {}
        for row, path in enumerate(paths):
            embedding = embedded.get(row)
            reason = reasons[row]
            if embedding is not None and not np.isfinite(embedding).all():
                embedding, reason = None, _NOT_FINITE
            yield Query(path, embedding, reason)

    def _values(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        """As the run would have stored them: rounded to its dtype."""
        with np.errstate(over="ignore"):
            values = self._embedder.embed(pixels, rows).astype(self._stored)
        yield from values.reshape(len(rows), -1).astype(np.float32)
