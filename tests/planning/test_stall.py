"""A flow in which nothing moves says what the cluster has free, and is ended."""

from __future__ import annotations

import re
from pathlib import Path

from shard_embedder.pipeline.embedding.torch_runner import SharedWeights
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.nodes import StallWatch
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.planning.stored_source import StoredSource
from tests.conftest import write_shards
from tests.outputs import job_for


def test_where_nothing_is_stored_it_says_for_how_long_and_what_is_free(ray_session: None) -> None:
    said: list[str] = []
    patient, hasty = StallWatch(said.append), StallWatch(said.append, quiet_s=0.0)
    patient.check()
    assert said == []
    hasty.check()
    # Once a minute.
    hasty.check()
    (line,) = said
    assert re.match(r"for a part to be stored, none was for 0\.0 s; of the cluster are free [\d.]+ of \d+ CPUs", line)


def test_a_flow_that_stands_still_is_ended_after_an_hour(ray_session: None, tmp_path: Path) -> None:
    job = job_for(write_shards(tmp_path / "in", num_shards=1), tmp_path / "out")
    plan = make_plan(job.shards, job.config.output)
    source = StoredSource.put(SharedWeights.of(job.weights))
    flow = make_flow(plan.pending, job, source, plan_resources(job.config, lambda why: None))
    assert flow.context.execution_no_progress_timeout_s == 3600
