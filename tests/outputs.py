"""Outputs for tests, made as the job makes them, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from shard_embedder.pipeline.core.config import Config, parse
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.embedding.embedder import Embedder
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, TorchRunner
from shard_embedder.pipeline.output.fingerprint import write_fingerprint
from shard_embedder.pipeline.output.parts import PartWriter
from shard_embedder.pipeline.planning.engine import Engine
from shard_embedder.pipeline.planning.job import Job, prepare_job
from shard_embedder.pipeline.run.in_process import InProcess
from shard_embedder.pipeline.run.passes import Watcher
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import SampleReader

SETTINGS = {"backbone": "squeezenet1_1", "weights": "random:3", "image_size": "64", "precision": "fp32"}
UNHEARD = Watcher(lambda *_: None, lambda *_: None, lambda *_: None)


_RUNNER: dict[Any, TorchRunner] = {}


class _KeptRunner(SharedWeights):
    """Whose runner is that of the run before, where it has the same settings: to build it takes longest."""

    def runner(self, network: Network, placement: Placement) -> TorchRunner:
        asked = self.name, self.sha256, self.seed, network, placement
        if asked not in _RUNNER:
            _RUNNER.clear()
            _RUNNER[asked] = super().runner(network, placement)
        return _RUNNER[asked]


def _torch_computes(job: Job, *_: Any) -> Engine:
    """Without a trial, which takes seconds and is told elsewhere."""
    return Engine(f"torch {torch.__version__}", "fp32", _KeptRunner.of(job.weights))


IN_PROCESS = InProcess(choose=_torch_computes)


def job_for(input: Path | str, output: Path | str, **settings: Any) -> Job:
    """A small job that is quick to compute."""
    return prepare_job(parse({"input": [str(input)], "output": str(output), **SETTINGS, **settings}))


def stored(folder: Path) -> dict[str, bytes]:
    """Every Parquet file below a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def rows(output: Path, folder: str = "embeddings") -> list[dict[str, Any]]:
    """Every row of a folder of the output, in the order of shards and samples."""
    found = [row for path in sorted((output / folder).rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: (row["shard"], -1 if row["sample_index"] is None else row["sample_index"]))


def embed(folder: Path | str, output: Path | str, **settings: Any) -> Config:
    """Make an output stage after stage in this process."""
    config = parse(
        {"backbone": "squeezenet1_1", "weights": "random:0", "image_size": "64", "precision": "fp32"}
        | {"part_rows": 3, "device": "cpu", "batch_size": 4, "input": [str(folder)], "output": str(output)}
        | settings
    )
    assert isinstance(config.batch_size, int)
    job = prepare_job(config)
    write_fingerprint(config.output, job.fingerprint)
    reader = SampleReader(config)
    decoder = Decoder(job.rules)
    placement = Placement(precision=config.precision, batch_size=config.batch_size)
    source = SharedWeights.of(job.weights)
    embedder = Embedder(source, job.network, placement, shape=job.shape, dtype=config.dtype)
    writer = PartWriter(config, job.fingerprint, job.shape)
    for shard in job.shards:
        for part in reader.parts(Pending(*shard)):
            for decoded in decoder(part):
                writer(embedder(decoded))
    return config
