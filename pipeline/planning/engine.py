"""Chooses what computes the embeddings, and in which precision, by trying it on images of the input.

How far bf16 moves an embedding depends on the architecture and the weights: random ResNets keep a cosine
of 0.99999 with fp32, a trained MobileNetV2 falls to 0.98. So `auto` tries the fast precisions of the device,
and takes the first that is close enough to fp32. On a CPU the network is converted for OpenVINO, which is taken only
if it then gives what eager torch gives in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa

from shard_embedder.pipeline.core.errors import PrecisionError
from shard_embedder.pipeline.core.schema import PIXELS, REASON, part_rows
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.embedding.embedder import Runner, Source
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.planning.cpu import cpu_precisions
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import SampleReader

openvino_runner: ModuleType | None
try:
    from shard_embedder.pipeline.embedding import openvino_runner
except ImportError:  # there is no wheel for this machine
    openvino_runner = None

# Images to try, from the fronts of shards all over the input: the images of one shard may be alike.
NUM_IMAGES = 32
NUM_SHARDS = 8
# Eager torch embeds only one image in so many: it is slow, and few images show whether two programs agree.
_EAGER_EVERY = 4
# The promise is 0.999 on every image, and the margin is for images not seen here: with a trained MobileNetV2 in fp16,
# the lowest cosine of 102 images is four times as far from 1 as that of the first 16.
MIN_COSINE = 0.9998
# How far another program may be from eager torch in fp32, as a share of the embedding's length. A cosine of 0.9999
# is 0.014.
MAX_DISTANCE = 0.002

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Engine:
    """What the actors load. `note` says why it is not the fastest; None if it is."""

    name: str
    precision: str
    source: Source
    note: str | None = None

    @property
    def problems(self) -> list[str]:
        """The note, as the report has it."""
        return [] if self.note is None else [f"slower than it could be: {self.note}"]


Choose = Callable[[Job, Sequence[Pending], str, tuple[str, ...] | None, str | None], Engine]


def choose_engine(
    job: Job,
    pending: Sequence[Pending],
    device: str,
    candidates: tuple[str, ...] | None,
    without_openvino: str | None = None,
) -> Engine:
    """The engine for `device` with its precision: the job's own, else the first of `candidates` close to fp32.

    Close is a cosine of at least `MIN_COSINE` on each of `NUM_IMAGES` images of the `pending` shards. If none of
    these can be decoded, the precision is fp32. A reduced precision is compared with the network's own fp32 output,
    on this process's `device`. If `candidates` is None, the precision may stay `auto`, for a trial elsewhere.
    `without_openvino` says why the nodes cannot run OpenVINO; None if they can.
    """
    trial = Trial(job, pending)
    note = without_openvino if device != "cuda" else None
    if device != "cuda" and without_openvino is None and candidates is not None:
        graph, fp32, note = _converted(job, trial, candidates)
        if graph is not None:
            precision = trial.precision(graph, candidates, fp32)
            return Engine(f"openvino {version('openvino')}", precision, graph, trial.doubt(candidates))
    # torch takes seconds to import: --help does not need it.
    from shard_embedder.pipeline.embedding.torch_runner import SharedWeights  # noqa: PLC0415

    weights = SharedWeights.of(job.weights)
    name = f"torch {job.fingerprint.versions['torch']}{', compiled' if job.config.compile else ''}"
    if candidates is None:
        return Engine(name, job.precision, weights, note)
    precision = trial.precision(weights, candidates, device=device)
    return Engine(name, precision, weights, note or trial.doubt(candidates))


@contextmanager
def choose_meanwhile(job: Job, pending: list[Pending]) -> Iterator[Choose]:
    """`choose_engine`, started in a thread for this machine's CPU while Ray starts in other processes.

    If the job may get a GPU, nothing is started early.
    """
    if not pending or job.config.device == "cuda" or Path("/dev/nvidiactl").exists():
        yield choose_engine
        return
    foreseen = (job, pending, "cpu", cpu_precisions(), None)
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(choose_engine, *foreseen)
        yield lambda *asked: engine.result() if asked == foreseen else choose_engine(*asked)


def _converted(
    job: Job, trial: Trial, candidates: tuple[str, ...]
) -> tuple[Source | None, Vectors | None, str | None]:
    """The network for OpenVINO, and its fp32 embeddings if `candidates` are tried; or None, None and why not."""
    if openvino_runner is None:
        return None, None, "OpenVINO is not installed"
    if job.precision != "auto" and not openvino_runner.computes(job.precision):
        return None, None, f"OpenVINO computes no {job.precision} on this processor"
    from shard_embedder.pipeline.embedding import torch_runner  # noqa: PLC0415  as above

    backbone, crop = job.network.backbone, job.network.preprocess.crop
    network = torch_runner.build_network(job.network, job.weights)
    expected = run(torch_runner.TorchRunner(network, crop, Placement()), trial.images_or_noise, _EAGER_EVERY)
    try:
        from shard_embedder.pipeline.embedding.openvino_graph import convert  # noqa: PLC0415  as above

        graph = convert(network, crop)
        every = 1 if candidates and job.precision == "auto" else _EAGER_EVERY
        found = run(graph.runner(job.network, Placement()), trial.images_or_noise, every)
    except Exception as error:
        return None, None, f"OpenVINO cannot take {backbone}: {type(error).__name__}: {str(error).strip()[:200]}"
    distance = _distance(expected, found[:: _EAGER_EVERY // every])
    if not distance <= MAX_DISTANCE:
        return None, None, f"OpenVINO is {distance:.2g} of the length from eager torch for {backbone}"
    return graph, found, None


class Trial:
    """The first images of some shards, decoded on first use."""

    def __init__(self, job: Job, shards: Sequence[Pending]) -> None:
        self._job = job
        self._shards = _spread(shards, NUM_SHARDS)

    @cached_property
    def images(self) -> Pixels:
        """uint8 of shape [N, H, W, 3]: those that can be decoded."""
        config = self._job.config
        reader = SampleReader(replace(config, part_rows=-(-NUM_IMAGES // len(self._shards))), self._job.limits)
        decoder = Decoder(self._job.rules)
        with ThreadPoolExecutor(len(self._shards)) as pool:
            fronts = pool.map(lambda shard: next(reader.parts(shard._replace(stored_parts=()))), self._shards)
            return _pixels(pa.concat_tables(decoder(pa.concat_tables(fronts))), self._job.network.preprocess.crop)

    @property
    def images_or_noise(self) -> Pixels:
        """Noise, if there is no image."""
        if len(self.images):
            return self.images
        return np.random.default_rng(0).integers(
            0, 256, (NUM_IMAGES, *self._job.network.preprocess.crop, 3), np.uint8
        )

    def doubt(self, candidates: tuple[str, ...]) -> str | None:
        """Why fp32 is taken without a trial; None if the precision was tried, or asked for."""
        if self._job.precision != "auto" or not candidates or len(self.images):
            return None
        return (
            f"no image could be decoded at the front of {len(self._shards)} of the shards, so the precision is fp32 "
            f"and no other was tried; --precision {candidates[0]} takes that"
        )

    def precision(
        self, source: Source, candidates: tuple[str, ...], fp32: Vectors | None = None, device: str = "cpu"
    ) -> str:
        """The job's precision; for `auto` that of `first_close`, in this process."""
        if self._job.precision != "auto":
            return self._job.precision
        if not candidates or not len(self.images):
            return "fp32"
        return first_close(source, self._job.network, Placement(device=device), self.images, candidates, fp32)


def first_close(
    source: Source,
    network: Network,
    placement: Placement,
    images: Pixels,
    candidates: tuple[str, ...],
    fp32: Vectors | None = None,
) -> str:
    """The first of `candidates` that is close to fp32 on `images`, else fp32; `fp32` is what that gives, if known."""

    def embedded(precision: str) -> Vectors:
        return run(source.runner(network, replace(placement, precision=precision)), images)

    expected = embedded("fp32") if fp32 is None else fp32
    for precision in candidates:
        try:
            if _is_close(expected, embedded(precision)):
                return precision
        except PrecisionError:
            continue
    return "fp32"


def run(runner: Runner, images: Pixels, every: int = 1) -> Vectors:
    """Embeddings [N, C] of each image, or each `every`th; feature maps are flattened."""
    rows = np.arange(0, len(images), every)
    embedded: Vectors = runner.embed(images, rows).reshape(len(rows), -1)
    return embedded


def _spread(shards: Sequence[Pending], most: int) -> list[Pending]:
    """At most so many of the shards, evenly spread from the first to the last."""
    if len(shards) <= most:
        return list(shards)
    return [shards[number * (len(shards) - 1) // (most - 1)] for number in range(most)]


def _pixels(parts: pa.Table, crop: tuple[int, int]) -> Pixels:
    good = [samples.filter(samples.field(REASON).is_null()) for _, samples in part_rows(parts)]
    flat: Pixels = np.concatenate([samples.field(PIXELS).flatten().to_numpy() for samples in good])
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
