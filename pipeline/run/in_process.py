"""A pass in this process: one stage after the other, part by part, without Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.schema import STAGE_EMBED
from shard_embedder.pipeline.flow import Stages
from shard_embedder.pipeline.planning.engine import Choose, choose_engine
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.nodes import DeviceTime, Request
from shard_embedder.pipeline.planning.probe import precisions_here
from shard_embedder.pipeline.planning.resources import Resources
from shard_embedder.pipeline.run.executor import PassError, Prepared, Say
from shard_embedder.pipeline.shards.find import Pending


class InProcess:
    """Runs the stages on one device of this process."""

    def __init__(self, device: str = "cpu", choose: Choose = choose_engine) -> None:
        self._device = device
        self._choose = choose

    def prepare(self, job: Job, pending: list[Pending], since: float, on_wait: Say) -> Prepared:
        """As `Executor.prepare`. The batch size is the one asked for, or the runner's own: none is measured."""
        cores = os.cpu_count() or 1
        asked = job.config.batch_size
        resources = Resources(
            device=self._device,
            num_actors=(1, 1),
            actor_cpus=1.0,
            actor_gpus=1.0 if self._device == "cuda" else 0.0,
            actor_resource=None,
            num_threads=None if self._device == "cuda" else cores,
            batch_size=asked if isinstance(asked, int) else None,
            total_cpus=float(cores),
            num_nodes=1,
            decode_cpus=1.0,
            read_memory=None,
            decode_memory=None,
            num_readers=1.0,
        )
        candidates = precisions_here(self._device)
        engine = self._choose(job, pending, self._device, candidates, None)
        job = job.with_engine(engine.name, engine.precision).with_batch_size(self._device, resources.batch_size)
        devices = DeviceTime(Request(STAGE_EMBED, 1.0), 1, since, [{"CPU": 1.0}])
        return Prepared(job, engine.source, resources, devices, engine.problems)

    def receipts(self, prepared: Prepared, pending: list[Pending], on_wait: Say) -> Iterator[Any]:
        """As `Executor.receipts`."""
        stages = Stages.of(prepared.job, prepared.source, prepared.resources)
        embedder = stages.embedder()
        try:
            for shard in pending:
                for samples in stages.reader.parts(shard):
                    for decoded in stages.decoder(samples):
                        receipts: pa.Table = stages.writer(embedder(decoded))
                        yield from receipts.to_pylist()
        except Exception as error:
            # Whatever a stage raises, as Ray has it: the next pass tries again what is not stored.
            raise PassError(describe(error)) from error
