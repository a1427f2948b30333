"""What a network computes, and where it runs: values that travel together."""

from __future__ import annotations

from dataclasses import dataclass

from shard_embedder.pipeline.decoding.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class Network:
    """A backbone, what its weights ask of an image, and what of its output is stored.

    `features` is `pooled` for [N, C] or `map` for [N, C, H, W]; with `normalize` each row is scaled to L2 length 1.
    """

    backbone: str
    preprocess: Preprocess
    features: str = "pooled"
    normalize: bool = False


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a network runs, and how. A `batch_size` or `num_threads` of None is the runner's own choice."""

    device: str = "cpu"
    precision: str = "fp32"
    batch_size: int | None = None
    num_threads: int | None = None
    compiled: bool = False  # by torch.compile, on GPUs
