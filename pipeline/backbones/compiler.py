"""torch's compiler stays out of a process that does not compile."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo.utils"


class _Later(ModuleType):
    """Stands for `torch._dynamo.utils` until something of it is used."""

    @staticmethod
    def is_compile_supported(device_type: str) -> bool:
        """Forward, to a module that is imported for it."""
        supported: bool = importlib.import_module(_NAME).is_compile_supported(device_type)
        return supported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _take_back(self)
        return getattr(importlib.import_module(_NAME), name)


def _take_back(stand_in: ModuleType) -> None:
    if sys.modules.get(_NAME) is stand_in:
        del sys.modules[_NAME]


@contextmanager
def imported_when_used() -> Iterator[None]:
    """What imports torchvision within this does not import `torch._dynamo`.

    torchvision (0.29) imports it for one function, by which `roi_align` decides whether to compile. With all that it
    imports in turn it takes a process 2 s of processor time, as long as torch itself.
    """
    if _NAME in sys.modules:
        yield
        return
    sys.modules[_NAME] = stand_in = _Later(_NAME)
    try:
        yield
    finally:
        _take_back(stand_in)
