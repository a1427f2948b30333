"""What computes the embeddings, and in which precision: tried on the first images of the input, not assumed.

How far bf16 moves an embedding depends on the architecture and the weights: random ResNets keep a cosine
of 0.99999 with fp32, a trained MobileNetV2 falls to 0.98. So `auto` tries the fast precisions of the device,
on the driver's CPU, and takes the first that is close enough to fp32. On a CPU the network is converted for
OpenVINO, and taken only where it then gives what eager torch gives in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.embedder import Runner, Source
from pipeline.isolated import IsolatedDecoder
from pipeline.prepare import Job
from pipeline.samples import Pending, SampleReader
from pipeline.schema import PIXELS, REASON, part_rows
from pipeline.torch_runner import Network, SharedWeights, TorchRunner, make_network

openvino_runner: ModuleType | None
try:
    from pipeline import openvino_runner
except ImportError:  # it has no wheel for this machine
    openvino_runner = None

NUM_IMAGES = 16
# The promise is 0.999 on every image; the margin is for those not seen here.
MIN_COSINE = 0.9995
# Of the length of an embedding: how far another program may be from eager torch in fp32. A cosine of 0.9999
# is 0.014.
MAX_DISTANCE = 0.002

_TORCH = f"torch {torch.__version__}"

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Engine:
    """What the actors are to load. `note` says why it is not the fastest, where it is not."""

    name: str
    precision: str
    source: Source
    note: str | None = None


def choose_engine(job: Job, shard: Pending, device: str, candidates: tuple[str, ...]) -> Engine:
    """The engine for `device` with its precision: the job's own, else the first of `candidates` close to fp32.

    Close is a cosine of at least `MIN_COSINE` on each of the first images of `shard`. Where none of these can
    be decoded the precision is fp32, which needs no trial.
    """
    asked = job.precision
    plain = SharedWeights.local(job.weights)
    if device == "cuda" and (asked != "auto" or not candidates):
        return Engine(_TORCH, "fp32" if asked == "auto" else asked, plain)
    trial = _Trial(job, shard)
    network = make_network(job.backbone, job.weights, job.config.features, job.preprocess, job.config.normalize)
    eager = TorchRunner(
        network, precision="fp32", crop=job.preprocess.crop, device="cpu", batch_size=None, num_threads=None
    )
    expected = trial.run(eager)
    graph, note = (None, None) if device == "cuda" else _converted(job, trial, network, expected)
    source = graph or plain
    precision = asked
    if asked == "auto":
        close = (name for name in candidates if trial.is_real and _is_close(expected, trial.embed(source, name)))
        precision = next(close, "fp32")
    if graph is not None:
        return Engine(f"openvino {version('openvino')}", precision, graph)
    return Engine(_TORCH, precision, plain, note)


def _converted(job: Job, trial: _Trial, network: Network, expected: Vectors) -> tuple[Source | None, str | None]:
    """The job's network for OpenVINO, or None and why not."""
    if openvino_runner is None:
        return None, "OpenVINO is not installed"
    try:
        graph = openvino_runner.convert(network, job.preprocess.crop)
        found = trial.embed(graph, "fp32")
    except Exception as error:
        return None, f"OpenVINO cannot take {job.backbone}: {type(error).__name__}: {str(error).strip()[:200]}"
    distance = _distance(expected, found)
    if not distance <= MAX_DISTANCE:
        return None, f"OpenVINO is {distance:.2g} of the length from eager torch for {job.backbone}"
    return graph, None


class _Trial:
    """The first images of a shard, decoded; noise where none can be."""

    def __init__(self, job: Job, shard: Pending) -> None:
        self._job = job
        config = job.config
        reader = SampleReader(replace(config, part_rows=NUM_IMAGES))
        # No image shall kill the driver.
        decoder = IsolatedDecoder(
            job.preprocess, max_pixels=config.max_pixels, ignore_orientation=config.ignore_orientation
        )
        part = decoder(next(iter(reader.parts(shard._replace(stored_parts=())))))
        self._pixels = _pixels(part, job.preprocess.crop)
        self.is_real = len(self._pixels) > 0
        if not self.is_real:
            noise = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, *job.preprocess.crop, 3), np.uint8)
            self._pixels = noise

    def embed(self, source: Source, precision: str) -> Vectors:
        """Embeddings [N, C] on this process's CPU (feature maps flattened)."""
        config = self._job.config
        runner = source.runner(
            backbone=self._job.backbone,
            features=config.features,
            preprocess=self._job.preprocess,
            normalize=config.normalize,
            precision=precision,
            device="cpu",
            batch_size=None,
            num_threads=None,
        )
        return self.run(runner)

    def run(self, runner: Runner) -> Vectors:
        """The same by a runner that is loaded."""
        rows = np.arange(len(self._pixels))
        embedded: Vectors = runner.embed(self._pixels, rows).reshape(len(rows), -1)
        return embedded


def _pixels(part: pa.Table, crop: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    ((_, samples),) = part_rows(part)
    good = samples.filter(samples.field(REASON).is_null())
    flat: np.ndarray[Any, np.dtype[np.uint8]] = good.field(PIXELS).flatten().to_numpy()
    return flat.reshape(-1, *crop, 3)


def _is_close(expected: Vectors, found: Vectors) -> bool:
    if not np.isfinite(found).all():
        return False
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    return float(((expected * found).sum(axis=1) / np.maximum(norms, 1e-12)).min()) >= MIN_COSINE


def _distance(expected: Vectors, found: Vectors) -> float:
    """The largest distance of two rows, as a share of the expected row's length."""
    lengths = np.maximum(np.linalg.norm(expected, axis=1), 1e-12)
    return float((np.linalg.norm(found - expected, axis=1) / lengths).max())
