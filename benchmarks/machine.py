"""The machine that is measured, and what is installed on it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "torchvision", "openvino", "ray", "pillow", "cykooz-resizer", "pyarrow", "numpy", "webdataset")


def hardware() -> dict[str, Any]:
    """The machine, as far as it tells."""
    facts: dict[str, Any] = {"machine": platform.machine(), "system": platform.platform(), "cores": num_cores()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        flags = set(values.get("flags", values.get("Features", "")).split())
        facts["cpu"] = values.get("model name", platform.processor())
        facts["cpu_family_model_stepping"] = [values.get(key) for key in ("cpu family", "model", "stepping")]
        facts["cpu_flags"] = sorted(flags & {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"})
    except OSError:
        facts["cpu"] = platform.processor()
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        facts["gpus"] = done.stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        facts["gpus"] = []
    return facts


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """What is installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found
