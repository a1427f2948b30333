"""Tries of work that may end its process are counted where they fail, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shard_embedder.pipeline.embedding.tries import counted_try


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


def test_a_folder_that_is_anothers_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "another").mkdir()
    (tmp_path / f"shard-embedder-{os.getuid()}").symlink_to(tmp_path / "another")
    assert [fail("a"), fail("a")] == [0, 0]
    assert list((tmp_path / "another").iterdir()) == []
