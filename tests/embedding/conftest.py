"""What several tests of this room need."""

from __future__ import annotations

from typing import Any

import pytest


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
