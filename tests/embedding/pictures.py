"""Small pictures without files, and networks of torchvision for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torchvision import models

from shard_embedder.pipeline.backbones import library_of
from shard_embedder.pipeline.decoding.preprocess import Preprocess

SIDE = 64


def preprocess(backbone: str, side: int = SIDE) -> Preprocess:
    own: Preprocess = library_of(backbone).preprocess_for(backbone, "random")
    return own.with_size((side, side))


def pictures(count: int, seed: int = 0, side: int = SIDE) -> list[Any]:
    """uint8 RGB of shape [side, side, 3], no two alike."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return list(np.kron(base, np.ones((1, side // 4, side // 4, 1), np.uint8)))


def torch_state(name: str) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state: dict[str, torch.Tensor] = models.get_model(name, weights=None).state_dict()
    return state
