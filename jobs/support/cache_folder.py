"""Where a run keeps on this machine what the next one need not find out again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.planning.cache import Cache

OFF = "none"
_NAME = "shard-embedder"
# Where libraries look for weights, and what decides how the processor is used: with others set, an entry is another.
_SURROUNDINGS = (
    "ATEN_", "DNNL_", "HF_", "HOME", "HUGGINGFACE_HUB_CACHE", "MKL_", "ONEDNN_", "OPENVINO_", "OV_", "TORCH_HOME",
    "XDG_CACHE_HOME",
)  # fmt: skip
_SECRET = "HF_TOKEN"


def find_cache(setting: str | None, environment: Mapping[str, str]) -> Cache | None:
    """The cache in the folder `setting`; without one in the user's own by the XDG convention, or None for `none`.

    The user's own is `$XDG_CACHE_HOME/shard-embedder`, where that variable is an absolute path, else
    `~/.cache/shard-embedder`.
    """
    if setting == OFF:
        return None
    surroundings = {
        name: value for name, value in environment.items() if name.startswith(_SURROUNDINGS) and name != _SECRET
    }
    if setting is not None:
        return Cache(Path(setting).absolute(), surroundings=surroundings)
    base = Path(environment.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError:  # a user without one
            return None
    return Cache(base / _NAME, surroundings=surroundings)
