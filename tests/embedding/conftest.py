"""What several tests of this room need."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.memory import _memory_given_back_after_each_test

__all__ = ["_memory_given_back_after_each_test"]


@pytest.fixture(autouse=True)
def no_tries_of_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that were killed leave tries behind (`pipeline.embedding.tries`): each test has its own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many JPEGs torchcodec is given in each call."""
    from shard_embedder.pipeline.embedding import device_decode

    numbers: list[int] = []
    decode = device_decode.decode_jpeg

    def counted(images: list[Any], **options: Any) -> Any:
        numbers.append(len(images))
        return decode(images, **options)

    monkeypatch.setattr(device_decode, "decode_jpeg", counted)
    return numbers
