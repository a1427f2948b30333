"""A source of runners in Ray's object store: put there once, and read in place by every actor of a node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from shard_embedder.pipeline.embedding.embedder import Runner, Source
from shard_embedder.pipeline.embedding.network import Network, Placement


@dataclass(frozen=True)
class StoredSource:
    """Stands for the `Source` that was put; `ref` is its `ObjectRef`."""

    ref: Any
    has_own_batch_size: bool

    @classmethod
    def put(cls, source: Source) -> StoredSource:
        """Put a source into the object store. Its arrays are not copied when it is read."""
        return cls(ray.put(source), source.has_own_batch_size)

    def runner(self, network: Network, placement: Placement) -> Runner:
        """As `Source.runner`."""
        source: Source = ray.get(self.ref)
        return source.runner(network, placement)
