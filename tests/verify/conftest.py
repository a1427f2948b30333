"""An output of two shards that is whole, and copies of it and of its shards to plant faults in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import write_tar
from tests.outputs import embed
from tests.verify.planting import shard_members


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "shards"
    for shard in range(2):
        write_tar(folder / f"photos-{shard:05d}.tar", shard_members(shard))
    return folder


@pytest.fixture(scope="session")
def good(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole output: two shards of parts 0, 1 (one embedding, two errors) and 2."""
    output = tmp_path_factory.mktemp("good") / "out"
    embed(shards, output, keep=["cls", "json:caption"])
    return output


@pytest.fixture
def planted(good: Path, tmp_path: Path) -> Path:
    """A copy of the whole output, to plant a fault in."""
    return Path(shutil.copytree(good, tmp_path / "out"))


# Faults that only the tars show.


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards to change, of the same version where it is not changed."""
    return Path(shutil.copytree(shards, tmp_path / "shards"))
