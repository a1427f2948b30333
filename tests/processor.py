"""Which precisions this machine's processor supports: many have no bf16."""

from __future__ import annotations

import pytest


def openvino_computes(precision: str) -> bool:
    """Whether OpenVINO supports a precision on this processor. Jobs use torch for those that it does not support.

    Skips the test where OpenVINO is not installed.
    """
    runner = pytest.importorskip(
        "shard_embedder.pipeline.embedding.openvino_runner", reason="OpenVINO has no wheel for this machine"
    )
    computes: bool = runner.computes(precision)
    return computes


def require_openvino(precision: str) -> None:
    """Skip the test unless OpenVINO supports a precision on this processor."""
    if not openvino_computes(precision):
        pytest.skip(f"OpenVINO computes no {precision} on this processor: jobs take torch")
