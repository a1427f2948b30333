"""What the processor of this machine computes: many have no bf16."""

from __future__ import annotations

import pytest


def openvino_computes(precision: str) -> bool:
    """Whether OpenVINO computes in a precision here. Where it does not, jobs take torch, which computes in each."""
    runner = pytest.importorskip(
        "shard_embedder.pipeline.embedding.openvino_runner", reason="OpenVINO has no wheel for this machine"
    )
    computes: bool = runner.computes(precision)
    return computes


def require_openvino(precision: str) -> None:
    """Skip the test where OpenVINO does not compute in a precision."""
    if not openvino_computes(precision):
        pytest.skip(f"OpenVINO computes no {precision} on this processor: jobs take torch")
