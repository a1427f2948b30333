"""The simulated scaling of `benchmarks/bench.py scaling`, sized down: what it sees, not how fast."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.scaling import Batch, Scaled, light_shards, num_ahead, scaled
from tests.conftest import encode, photo, write_tar


def overlap(run: Scaled) -> int:
    """The most actors that were at work at the same time."""
    moments = [batch.begin for batch in run.batches]
    return max(sum(one.begin <= moment < one.end for one in run.batches) for moment in moments)


@pytest.mark.usefixtures("ray_session")
def test_all_actors_work_at_the_same_time_and_the_slowest_stage_is_theirs(tmp_path: Path) -> None:
    num_actors = 2
    # Before all have begun, those that came first may hold three parts each.
    light_shards(tmp_path / "in", 3 * num_actors)
    # Two seconds a part: two busy cores decode the next in less.
    run = scaled(tmp_path / "in", tmp_path / "out", num_actors, 256 / 2)
    assert sum(batch.num_images for batch in run.batches) == 3 * num_actors * 256
    assert run.num_actors == num_actors
    assert overlap(run) == num_actors
    # While an actor computes it already has the next part.
    assert num_ahead(run.batches) > 0
    assert run.slowest_stage == "embed"


@pytest.mark.usefixtures("ray_session")
def test_where_actors_have_little_to_do_the_slowest_stage_is_decode(tmp_path: Path) -> None:
    images = [encode(photo(seed, (1600, 1200))) for seed in range(2)]
    for shard in range(4):
        members = [(f"{i:03d}.jpg", images[i % 2]) for i in range(24)]
        write_tar(tmp_path / "in" / f"s-{shard}.tar", members)
    run = scaled(tmp_path / "in", tmp_path / "out", 1, 1e9)
    assert run.slowest_stage == "decode"
    assert run.busy["decode"] > run.busy["embed"]


def test_the_rate_is_that_while_all_actors_have_work() -> None:
    # The second actor starts late, and has no more to do early: only 10 s to 20 s count, in which both were busy
    # but for one second.
    batches = [Batch(1, 0, 0, 10, 100), Batch(1, 9, 10, 20, 100), Batch(1, 12, 20, 30, 100), Batch(2, 2, 10, 15, 50)]
    run = Scaled([*batches, Batch(2, 16, 16, 20, 40)], "embed", {})
    assert run.window == (10, 20)
    assert run.images_per_s == pytest.approx(19)
    assert num_ahead(run.batches) == 2
