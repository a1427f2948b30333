"""The pool of actors while a flow goes on: from the least that was asked for to the most, and back.

A backbone that sleeps stands for a device that computes; the rest of the flow is the job's.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from benchmarks.scaling import IMAGES_A_SHARD, light_shards
from benchmarks.sleep import SleepSource, Start
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources

_LOOK_EVERY_S = 0.2


def num_actors(name: str) -> int:
    """Actors of a class that live, or are started: on a busy machine that takes longer than their work."""
    actors = ray._private.state.actors().values()
    return sum(name in actor["ActorClassName"] and actor["State"] != "DEAD" for actor in actors)


@pytest.mark.usefixtures("ray_session")
def test_the_pool_grows_to_its_most_and_gives_actors_back_when_they_have_no_more_to_do(tmp_path: Path) -> None:
    light_shards(tmp_path / "in", 8)
    # In the order of their names the last: one actor has it while the others have nothing.
    light_shards(tmp_path / "in" / "long", 1, 3 * IMAGES_A_SHARD)
    # With its first part each waits for the others: there is more to do until there are three, however long it takes.
    met = tmp_path / "met"
    met.mkdir()
    config = parse({
        "input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), "backbone": "squeezenet1_1",
        "weights": "random:3", "image_size": "64", "precision": "fp32", "device": "cpu", "actors": "1:3",
        "part_rows": 3 * IMAGES_A_SHARD,
    })  # fmt: skip
    job = replace(prepare_job(config).with_engine("sleep", "fp32"), shape=(4,))
    pending = make_plan(job.shards, config.output).pending
    flow = make_flow(pending, job, SleepSource(192.0, time.time(), Start(met, 3)), plan_resources(config))
    looks: list[int] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_EVERY_S):
            looks.append(num_actors("Embedder"))

    looker = threading.Thread(target=look)
    looker.start()
    num_parts = 0
    try:
        for table in flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            num_parts += len(table)
    finally:
        ended.set()
        looker.join()
    assert num_parts == 9
    most = looks.index(3)
    assert 1 in looks[:most]
    assert max(looks) == 3
    assert 1 in looks[most:]
