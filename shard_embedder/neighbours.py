"""Indexes of embeddings from Python: built, opened, and searched by images or by vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shard_embedder.images import Images
from shard_embedder.pipeline.backbones.transform import ImageLike
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import Index, Neighbour
from shard_embedder.pipeline.retrieval.index import open_index as open_stored


class ImageIndex:
    """An index of an output, open for searches. Images are embedded as those of the output were."""

    def __init__(self, index: Index, weights: str | None = None) -> None:
        self.index = index
        self._weights = weights

    @cached_property
    def _images(self) -> Images:
        return Images.as_made(self.index.facts.made, self._weights)

    def search(self, images: ImageLike | Sequence[ImageLike], k: int = 5) -> list[list[Neighbour]]:
        """The `k` nearest rows of each image, nearest first.

        Args:
            images: paths, PIL images or uint8 arrays [H, W, 3]; or one of these.
            k: how many neighbours.

        Raises:
            SampleError: an image cannot be decoded.
            WeightsError: the weights of the output cannot be had.
        """
        _, vectors = self._images(images)
        return self.search_vectors(vectors, k)

    def search_vectors(self, vectors: np.ndarray[Any, Any], k: int = 5) -> list[list[Neighbour]]:
        """The `k` nearest rows of each vector, float32 [N, C]."""
        return self.index.search(np.ascontiguousarray(vectors, np.float32), k)


def build_index(output: str | Path, index: str | Path, *, weights: str | None = None, **options: Any) -> ImageIndex:
    """Make the index of an output in a local folder, or add to it what is new, and open it.

    Args:
        output: what `embed` wrote.
        index: a local folder.
        weights: where those of the output are, if they came from a file or a URL.
        **options: `metric` (cosine, ip, l2), `kind` (flat, hnsw, ivf), `memory_bytes`.

    Raises:
        SettingsError: FAISS is not installed, or an option has a wrong value.
        OutputError: no output, or an index of other settings.
    """
    build(str(output), index, Options(**options))
    return open_index(index, weights)


def open_index(index: str | Path, weights: str | None = None) -> ImageIndex:
    """Open an index. `weights` say where those of the output are, if not under the name that its run gave them.

    Raises:
        OutputError: no index, or a damaged one.
    """
    return ImageIndex(open_stored(index), weights)
