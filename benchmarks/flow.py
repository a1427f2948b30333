"""What needs Ray, each in a process of its own: the whole job, and the flow up to decode.

Run as `python -m benchmarks.flow NAME SETTINGS`. It is what `jobs/embed.py` does, with a watcher that measures.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from benchmarks.cores import CoreWatch
from benchmarks.memory import WORKERS
from benchmarks.runs import Settings, print_result
from shard_embedder.jobs.support.connection import connect
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.schema import STAGE_DECODE
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.flow import read_and_decode
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.samples import SampleReader

# Workers send the events of their tasks once a second.
_EVENTS_S = 2.5
_PAGE_MIB = resource.getpagesize() / 2**20


@contextmanager
def _ray_session() -> Iterator[None]:
    """Ray, ended after the block where it was not there before."""
    was_there = ray.is_initialized()
    connect()
    try:
        yield
    finally:
        if not was_there:
            ray.shutdown()


def job(settings: Settings) -> dict[str, Any]:
    """The whole job on the photos."""
    with _ray_session():
        since = time.time()
        result = _run(settings.config(settings.shards, str(settings.fresh("job"))))
        return {**result, "decode_tasks": _decode_tasks(since)}


def tiny(settings: Settings) -> dict[str, Any]:
    """The whole job on the tiny shards."""
    with _ray_session():
        return _run(settings.config(settings.tiny, str(settings.fresh("tiny"))))


def _run(config: Config) -> dict[str, Any]:
    """One run; `memory` is of this process as it goes: [shards done, MiB resident]."""
    prepared = prepare_job(config)
    first_plan = make_plan(prepared.shards, prepared.config.output)
    memory: list[tuple[int, float]] = []
    step = max(1, len(first_plan.pending) // 200)

    def on_part(tally: Tally) -> None:
        if tally.num_parts % step == 0:
            memory.append((tally.num_shards, _resident_mib()))

    report = run(prepared, first_plan, Watcher(lambda *_: None, lambda *_: None, on_part), OnRay())
    if not report["balanced"] or report["errors"] or report["problems"]:
        raise RuntimeError(f"the job did not embed every image: {report}")
    memory.append((report["shards"]["done_now"], _resident_mib()))
    told = {name: report[name] for name in ("precision", "slowest_stage", "stage_busy")}
    return {"memory": memory, **told}


def _resident_mib() -> float:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_MIB
    except OSError:
        # Without /proc there is only the most that it ever was, in bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _decode_tasks(since: float) -> list[tuple[float, float]]:
    """When each task that decoded after `since` (`time.time`) began and ended, from Ray's timeline."""
    time.sleep(_EVENTS_S)
    tasks = [
        (event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in ray.timeline()
        if event["cat"].startswith("task::") and WORKERS[STAGE_DECODE] in event["cat"] and event["ts"] / 1e6 > since
    ]
    if not tasks:
        raise RuntimeError(f"Ray's timeline has no task of the name {WORKERS[STAGE_DECODE]}")
    return tasks


def _count(table: pa.Table) -> pa.Table:
    """The sink: pixels go no further, only when they came and how many there were."""
    images = sum(table.column("num_samples").to_pylist())
    return pa.table({"time": [time.time()], "images": [images]})


def no_model(settings: Settings) -> dict[str, Any]:
    """Read and decode on Ray as the flow does them, and count what comes out."""
    config = settings.config(settings.shards, str(settings.fresh("no_model")))
    prepared = prepare_job(config)
    pending = make_plan(prepared.shards, prepared.config.output).pending
    decoder = Decoder(prepared.rules)
    with _ray_session():
        since = time.time()
        resources = plan_resources(config)
        whole: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
        decoded = read_and_decode(pending, SampleReader(config), decoder, resources)
        counted = decoded.map_batches(_count, num_cpus=resources.write_cpus, **whole)
        with CoreWatch() as watch:
            rows = [row for batch in counted.iter_batches(prefetch_batches=0, **whole) for row in batch.to_pylist()]
        parts = [(row["time"], row["images"]) for row in rows]
        return {"parts": parts, "decode_tasks": _decode_tasks(since), "looks": watch.looks}


_MEASUREMENTS = {"job": job, "tiny": tiny, "no_model": no_model}


if __name__ == "__main__":
    print_result(_MEASUREMENTS[sys.argv[1]](Settings.parse(sys.argv[2])))
