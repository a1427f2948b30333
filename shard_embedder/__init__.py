"""Batch image embeddings for retrieval indexes: the same from Python as by the command.

It hands on what the rooms of `pipeline` do, under one name that no other project has. Nothing of it is loaded before
it is used, since torch takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shard_embedder.images import embed_images
    from shard_embedder.job import Run, embed
    from shard_embedder.neighbours import build_index, open_index
    from shard_embedder.pipeline.backbones import build_backbone, list_backbones
    from shard_embedder.pipeline.core.errors import PipelineError

__all__ = [
    "PipelineError", "Run", "build_backbone", "build_index", "embed", "embed_images", "list_backbones", "open_index",
]  # fmt: skip

_HOMES = {
    "PipelineError": "shard_embedder.pipeline.core.errors",
    "Run": "shard_embedder.job",
    "build_backbone": "shard_embedder.pipeline.backbones",
    "build_index": "shard_embedder.neighbours",
    "embed": "shard_embedder.job",
    "embed_images": "shard_embedder.images",
    "list_backbones": "shard_embedder.pipeline.backbones",
    "open_index": "shard_embedder.neighbours",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"shard_embedder has no {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)
