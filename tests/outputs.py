"""Outputs for tests, made as the job makes them, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.config import Config, parse
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.rules import DecodingRules
from pipeline.embedding.embedder import Embedder
from pipeline.embedding.torch_runner import SharedWeights
from pipeline.output.fingerprint import write_fingerprint
from pipeline.output.parts import PartWriter
from pipeline.planning.job import prepare
from pipeline.shards.find import Pending
from pipeline.shards.samples import SampleReader


def embed(folder: Path | str, output: Path | str, **settings: Any) -> Config:
    """Make an output stage after stage in this process."""
    config = parse(
        {"backbone": "squeezenet1_1", "weights": "random:0", "image_size": "64", "precision": "fp32"}
        | {"part_rows": 3, "device": "cpu", "batch_size": 4, "input": [str(folder)], "output": str(output)}
        | settings
    )
    assert config.batch_size is not None
    job = prepare(config)
    write_fingerprint(config.output, job.fingerprint)
    reader = SampleReader(config)
    decoder = Decoder(DecodingRules.of(config, job.preprocess))
    embedder = Embedder(
        backbone=job.backbone,
        source=SharedWeights.of(job.weights),
        features=config.features,
        preprocess=job.preprocess,
        shape=job.shape,
        dtype=config.dtype,
        precision=config.precision,
        normalize=config.normalize,
        device="cpu",
        batch_size=config.batch_size,
        num_threads=None,
    )
    writer = PartWriter(config, job.fingerprint, job.shape)
    for shard in job.shards:
        for part in reader.parts(Pending(*shard)):
            for decoded in decoder(part):
                writer(embedder(decoded))
    return config
