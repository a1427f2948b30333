"""Counts the work of a job without touching it: a line in KILLS_WORK_LOG for each part that a stage begins.

Every Python that starts with this folder in PYTHONPATH loads it. It wraps what decodes and what embeds one
part, in whatever process that happens, so that work which a death undid is counted too.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = {
    "shard_embedder.pipeline.decoding.decoder": ("Decoder", "decode"),
    "shard_embedder.pipeline.embedding.embedder": ("Embedder", "embed"),
}


def _counted(stage: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def begin(self: Any, values: dict[str, Any], *rest: Any) -> Any:
        part = f"{values['name']}:{values['part']}"
        line = f"{time.time():.3f} {os.getpid()} {stage} {part} {values['num_samples']}\n"
        file = os.open(os.environ["KILLS_WORK_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)
        return method(self, values, *rest)

    return begin


class _Finder(MetaPathFinder):
    """Finds nothing itself: wraps what others find."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _WATCHED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            name_of_class, stage = _WATCHED[name]
            kind = getattr(module, name_of_class)
            kind._part = _counted(stage, kind._part)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "KILLS_WORK_LOG" in os.environ:
    sys.meta_path.insert(0, _Finder())
