"""What this machine's processor can do, from Linux: torch knows too, and takes seconds to import."""

from __future__ import annotations

import re
from pathlib import Path


def cpu_has_bf16() -> bool:
    """Whether this machine's processor computes bf16 natively (AVX512-BF16 or AMX)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # no Linux
        return False
    return bool(re.search(r"^flags\s*:.*\b(avx512_bf16|amx_bf16)\b", text, re.MULTILINE))


def cpu_precisions() -> tuple[str, ...]:
    """The reduced precisions that this machine's processor computes faster than fp32."""
    return ("bf16",) if cpu_has_bf16() else ()
