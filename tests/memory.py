"""Give memory back after each test, for tests that build networks.

Networks and what computes them hold each other in cycles. Python looks for these by the number of objects, not by
their size, so that hundreds of MB can wait for it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _memory_given_back_after_each_test() -> Iterator[None]:
    yield
    gc.collect()
