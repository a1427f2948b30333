"""Tries of work that may end its process are counted where they fail, and nowhere else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from shard_embedder.pipeline.embedding.tries import counted_try


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def fail(name: str) -> int:
    with pytest.raises(ValueError, match="failed"), counted_try(name) as num_before:
        raise ValueError("failed")
    return num_before


def test_tries_that_fail_are_counted_until_one_comes_to_its_end() -> None:
    assert [fail("a"), fail("a"), fail("b")] == [0, 1, 0]
    with counted_try("a") as num_before:
        assert num_before == 2
    assert [fail("a"), fail("b")] == [0, 1]


def test_a_try_that_another_process_is_still_at_is_not_counted() -> None:
    with counted_try("a") as first, counted_try("a") as second:
        assert (first, second) == (0, 0)
    with counted_try("a") as third:
        assert third == 0


def test_a_folder_that_is_anothers_is_not_used(folder: Path) -> None:
    (folder / "another").mkdir()
    (folder / f"shard-embedder-{os.getuid()}").symlink_to(folder / "another")
    assert [fail("a"), fail("a")] == [0, 0]
    assert list((folder / "another").iterdir()) == []
