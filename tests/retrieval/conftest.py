"""Outputs that several tests of this room index."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import write_shards
from tests.outputs import embed
from tests.retrieval.stored import Vectors, clusters, store


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("index") / "in", num_shards=2)


@pytest.fixture(scope="session")
def embedded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that the stages made of real shards: 14 images in two shards of three parts each."""
    output = tmp_path_factory.mktemp("embedded") / "out"
    embed(shards, output)
    return output


@pytest.fixture(scope="session")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vectors]:
    """An output of 3000 chosen embeddings in two shards, and these."""
    output = tmp_path_factory.mktemp("chosen") / "out"
    values = clusters(3000)
    store(output, "a", values[:1800])
    store(output, "b", values[1800:])
    return output, values
