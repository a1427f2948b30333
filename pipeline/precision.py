"""Which reduced precision keeps the promise of a backbone's embeddings: measured, not assumed.

How far bf16 moves an embedding depends on the architecture and the weights: random ResNets keep a cosine
of 0.99999 with fp32, a trained MobileNetV2 falls to 0.98. So `auto` tries the fast precisions of the device
on the first images of the input, on the driver's CPU, and takes the first that is close enough to fp32.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.embedder import Embedder, SharedWeights
from pipeline.isolated import IsolatedDecoder
from pipeline.prepare import Job
from pipeline.samples import Pending, SampleReader
from pipeline.schema import EMBEDDING, REASON, part_rows

NUM_IMAGES = 16
# The promise is 0.999 on every image; the margin is for those not seen here.
MIN_COSINE = 0.9995


def choose_precision(job: Job, shard: Pending, candidates: tuple[str, ...]) -> str:
    """The first of `candidates` (`bf16`, `fp16`) whose embeddings agree with fp32, else `fp32`.

    They agree where the cosine is at least `MIN_COSINE` on each of the first images of `shard`. Where none
    of these can be decoded it is `fp32`, which needs no measuring.
    """
    if not candidates:
        return "fp32"
    reader = SampleReader(replace(job.config, part_rows=NUM_IMAGES))
    config = job.config
    # No image shall kill the driver.
    decoder = IsolatedDecoder(
        job.preprocess, max_pixels=config.max_pixels, ignore_orientation=config.ignore_orientation
    )
    part = decoder(next(iter(reader.parts(shard._replace(stored_parts=())))))
    expected = _embeddings(job, part, "fp32")
    for precision in candidates:
        if len(expected) and _min_cosine(expected, _embeddings(job, part, precision)) >= MIN_COSINE:
            return precision
    return "fp32"


def _embeddings(job: Job, part: pa.Table, precision: str) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Embeddings of a decoded part's good rows, as [N, C] (feature maps flattened)."""
    embedder = Embedder(
        backbone=job.backbone,
        weights=SharedWeights.local(job.weights),
        features=job.config.features,
        preprocess=job.preprocess,
        shape=job.shape,
        dtype="float32",
        precision=precision,
        normalize=False,
        device="cpu",
        batch_size=NUM_IMAGES,
        num_threads=None,
    )
    ((_, samples),) = part_rows(embedder(part))
    embedded: np.ndarray[tuple[int, int], np.dtype[np.float32]] = np.array(
        samples.filter(samples.field(REASON).is_null()).field(EMBEDDING).to_pylist(), np.float32
    )
    return embedded


def _min_cosine(
    expected: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    found: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> float:
    if found.shape != expected.shape:
        return -1.0  # some are not finite in this precision
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    return float(((expected * found).sum(axis=1) / np.maximum(norms, 1e-12)).min())
