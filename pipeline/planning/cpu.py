"""What this machine's processor is and can do, as Linux tells it; torch, which could too, takes seconds to import."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_MODEL = "model name"
_FLAGS = "flags"


def cpu_has_bf16() -> bool:
    """Whether this machine's processor computes bf16 natively (AVX512-BF16 or AMX)."""
    flags = _facts().get(_FLAGS, "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cpu_name() -> str:
    """The processor's model and what it can do, as far as the system tells: two that differ may round otherwise."""
    facts = _facts()
    return f"{platform.machine()} {facts.get(_MODEL, platform.processor())} {facts.get(_FLAGS, '')}".strip()


def _facts() -> dict[str, str]:
    """What Linux says of the first processor; nothing on other systems."""
    try:
        first = _CPUINFO.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
