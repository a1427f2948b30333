"""What this machine's processor is said to do is what torch finds that it does."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.planning.cpu import cpu_has_bf16, cpu_name


def test_a_processor_has_bf16_where_torch_says_so() -> None:
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("this torch does not tell what a processor can do")
    capabilities = torch.cpu.get_capabilities()
    assert cpu_has_bf16() == bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def test_a_name_tells_processors_apart_by_model_and_flags() -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("only Linux tells the flags of a processor")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    for start in ("model name", "flags"):
        for line in [line for line in lines if line.startswith(f"{start}\t")][:1]:
            assert line.partition(":")[2].strip() in cpu_name()
