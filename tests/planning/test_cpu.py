"""What this machine's processor is said to do is what torch finds that it does."""

from __future__ import annotations

import pytest

from shard_embedder.pipeline.planning.cpu import cpu_has_bf16


def test_a_processor_has_bf16_where_torch_says_so() -> None:
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch does not tell what a processor can do")
    capabilities = torch.cpu.get_capabilities()
    assert cpu_has_bf16() == bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
