"""torch.compile, whose cache on disk may hold what a killed process has left there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# How the loader names a library that it cannot load, in whatever torch makes of that.
_BROKEN = re.compile(r"(/[^\n]*?\.so): ")
# Libraries that one process left unfinished at most: it compiles some at once.
_MOST_BROKEN = 64


def compiled(network: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """The network, compiled when it is first called with some shape.

    torch writes a library in place, and takes any that is there for whole. One that cannot be loaded is removed here
    and made again: else a process that was killed while it compiled would break all that come after it.
    """
    call: Callable[..., Any] = torch.compile(network, mode=mode, dynamic=False)

    def mended(*inputs: Any) -> Any:
        for _ in range(_MOST_BROKEN):
            try:
                return call(*inputs)
            except RuntimeError as error:
                broken = _broken_library(str(error))
                if broken is None:
                    raise
                broken.unlink(missing_ok=True)
        return call(*inputs)

    return mended


def _broken_library(message: str) -> Path | None:
    """The library in torch's cache that an error is about, if it is there."""
    found = _BROKEN.search(message)
    # torch sets it when it first looks there.
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if found is None or cache is None:
        return None
    library = Path(found[1])
    return library if library.is_relative_to(cache) and library.is_file() else None
