"""Weights files for tests, and whether a backbone gets what is in one."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import torch
from torchvision import models

from shard_embedder.pipeline.backbones import build_backbone
from shard_embedder.pipeline.backbones.weights import StateDict
from tests.backbones.models import filled_model

NAME = "squeezenet1_1"  # small: 5 MB


def torchvision_state(name: str = NAME, seed: int = 0, **options: Any) -> StateDict:
    """State dict of torchvision's own model with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state: StateDict = models.get_model(name, weights=None, **options).state_dict()
    return state


def filled_state(name: str, **options: Any) -> StateDict:
    """The same with values that cost little, and of the classifier only its auxiliary ones."""
    model = filled_model(name, **options)
    return {key: value for key, value in model.state_dict().items() if not value.is_meta}


def saved(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def write(path: Path, content: Any) -> str:
    path.write_bytes(content if isinstance(content, bytes) else saved(content))
    return str(path)


def assert_loads(name: str, spec: str, wanted: StateDict) -> None:
    """`spec` gives backbone `name` the parameters `wanted`, all of them, in fp32."""
    state = build_backbone(name, spec).state_dict()
    assert state
    for key, value in state.items():
        assert value.device.type == "cpu"
        assert value.dtype == wanted[key].dtype
        assert torch.equal(value, wanted[key]), key


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.canary}",))
