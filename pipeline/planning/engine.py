"""What computes the embeddings, and in which precision: tried on images of the input, not assumed.

How far bf16 moves an embedding depends on the architecture and the weights: random ResNets keep a cosine
of 0.99999 with fp32, a trained MobileNetV2 falls to 0.98. So `auto` tries the fast precisions of the device,
on the driver's CPU, and takes the first that is close enough to fp32. On a CPU the network is converted for
OpenVINO, and taken only where it then gives what eager torch gives in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from types import ModuleType

import numpy as np
import pyarrow as pa

from pipeline.core.errors import PrecisionError
from pipeline.core.schema import PIXELS, REASON, part_rows
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.rules import DecodingRules
from pipeline.embedding.embedder import Runner, Source
from pipeline.planning.cpu import cpu_has_bf16
from pipeline.planning.job import Job, loaded
from pipeline.planning.known import Kept, Known, Pixels
from pipeline.shards.find import Pending
from pipeline.shards.samples import SampleReader

openvino_runner: ModuleType | None
try:
    from pipeline.embedding import openvino_runner
except ImportError:  # it has no wheel for this machine
    openvino_runner = None

# Of the fronts of shards all over the input: a shard may be of one class, and its images alike.
NUM_IMAGES = 32
NUM_SHARDS = 8
# The promise is 0.999 on every image; the margin is for those not seen here: of a trained MobileNetV2 in fp16 the
# least of 102 images is four times as far from 1 as that of the first 16.
MIN_COSINE = 0.9998
# Of the length of an embedding: how far another program may be from eager torch in fp32. A cosine of 0.9999
# is 0.014.
MAX_DISTANCE = 0.002

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]


@dataclass(frozen=True)
class Engine:
    """What the actors are to load. `note` says why it is not the fastest, where it is not."""

    name: str
    precision: str
    source: Source
    note: str | None = None


Choose = Callable[[Job, Sequence[Pending], str, tuple[str, ...]], Engine]


def choose_engine(job: Job, pending: Sequence[Pending], device: str, candidates: tuple[str, ...]) -> Engine:
    """The engine for `device` with its precision: the job's own, else the first of `candidates` close to fp32.

    Close is a cosine of at least `MIN_COSINE` on each of `NUM_IMAGES` images of the `pending` shards. Where none of
    these can be decoded the precision is fp32, which needs no trial. A graph that the job's cache has needs none
    against eager torch either, and its own fp32 is what a reduced precision is held against, whether it was kept or
    made just now; what came of that on the same images is in the cache too.

    Raises:
        WeightsError: the weights changed since the job was prepared.
    """
    trial = _Trial(job, pending)
    note = None
    if device != "cuda":
        kept = _kept_graph(job)
        graph, fp32, note = (kept, None, None) if kept is not None else _converted(loaded(job), trial)
        if graph is not None:
            precision = trial.precision(graph, candidates, fp32, job.kept)
            return Engine(f"openvino {version('openvino')}", precision, graph, trial.doubt(candidates))
    # torch takes seconds to import, and a graph that was kept needs it not.
    from pipeline.embedding.torch_runner import SharedWeights  # noqa: PLC0415

    weights = SharedWeights.of(loaded(job).weights)
    name = f"torch {job.fingerprint.versions['torch']}{', compiled' if job.config.compile else ''}"
    return Engine(name, trial.precision(weights, candidates), weights, note or trial.doubt(candidates))


@contextmanager
def foreseen_engine(job: Job, pending: list[Pending]) -> Iterator[Choose]:
    """`choose_engine`, begun in a thread for this machine's CPU while Ray starts, if an earlier run kept the graph.

    Otherwise, and where the cluster turns out to have GPUs, the engine is chosen when it is asked for.
    """
    if not pending or job.kept is None or job.kept.entry is None:
        yield choose_engine
        return
    foreseen = (job, pending, "cpu", ("bf16",) if cpu_has_bf16() else ())
    with ThreadPoolExecutor(1) as pool:
        engine = pool.submit(choose_engine, *foreseen)
        yield lambda *asked: engine.result() if asked == foreseen else choose_engine(*asked)


def _kept_graph(job: Job) -> Source | None:
    """The graph that an earlier run kept; its facts and the weights were compared when the job was prepared."""
    if openvino_runner is None or job.kept is None or not _openvino_computes(job.precision):
        return None
    parts = job.kept.graph()
    return None if parts is None else openvino_runner.SharedGraph(*parts)


def _openvino_computes(precision: str) -> bool:
    return precision == "auto" or (openvino_runner is not None and openvino_runner.computes(precision))


def _converted(job: Job, trial: _Trial) -> tuple[Source | None, Vectors | None, str | None]:
    """The job's network for OpenVINO and what it gives in fp32, or None and why not."""
    if openvino_runner is None:
        return None, None, "OpenVINO is not installed"
    if not _openvino_computes(job.precision):
        return None, None, f"OpenVINO computes no {job.precision} on this processor"
    from pipeline import backbones  # noqa: PLC0415  as above
    from pipeline.embedding import torch_runner  # noqa: PLC0415  as above

    network = torch_runner.make_network(
        job.backbone, job.weights, job.config.features, job.preprocess, job.config.normalize
    )
    eager = torch_runner.TorchRunner(
        network, precision="fp32", crop=job.preprocess.crop, device="cpu", batch_size=None, num_threads=None
    )
    expected = trial.run(eager)
    try:
        from pipeline.embedding.openvino_graph import convert  # noqa: PLC0415  as above

        graph = convert(network, job.preprocess.crop)
        found = trial.embed(graph, "fp32")
    except Exception as error:
        return None, None, f"OpenVINO cannot take {job.backbone}: {type(error).__name__}: {str(error).strip()[:200]}"
    distance = _distance(expected, found)
    if not distance <= MAX_DISTANCE:
        return None, None, f"OpenVINO is {distance:.2g} of the length from eager torch for {job.backbone}"
    if job.kept is not None and trial.is_real:
        known = Known(job.backbone, job.weights, job.preprocess, job.shape, backbones.versions(job.backbone))
        job.kept.keep(known, graph.graph, graph.constants)
    return graph, found, None


class _Trial:
    """The first images of some shards, decoded; noise where none can be."""

    def __init__(self, job: Job, shards: Sequence[Pending]) -> None:
        self._job = job
        self._shards = _spread(shards, NUM_SHARDS)

    @cached_property
    def _images(self) -> Pixels:
        config = self._job.config
        reader = SampleReader(replace(config, part_rows=-(-NUM_IMAGES // len(self._shards))))
        decoder = Decoder(DecodingRules.of(config, self._job.preprocess))
        with ThreadPoolExecutor(len(self._shards)) as pool:
            fronts = pool.map(lambda shard: next(reader.parts(shard._replace(stored_parts=()))), self._shards)
            return _pixels(pa.concat_tables(decoder(pa.concat_tables(fronts))), self._job.preprocess.crop)

    @property
    def is_real(self) -> bool:
        """Whether there is an image."""
        return len(self._images) > 0

    def doubt(self, candidates: tuple[str, ...]) -> str | None:
        """Why fp32 was taken though it may be slower than need be; None where it was tried, or asked for."""
        if self._job.precision != "auto" or not candidates or self.is_real:
            return None
        return (
            f"no image could be decoded at the front of {len(self._shards)} of the shards, so that the precision is "
            f"fp32, as none was tried; --precision {candidates[0]} takes that"
        )

    def precision(
        self, source: Source, candidates: tuple[str, ...], fp32: Vectors | None = None, kept: Kept | None = None
    ) -> str:
        """The job's precision; for `auto` the first of `candidates` that is close to what `source` gives in fp32.

        `kept` is where an earlier run left which one that was, if `source` is the graph of that place.
        """
        if self._job.precision != "auto":
            return self._job.precision
        if not candidates or not self.is_real:
            return "fp32"
        asked = (self._job.weights, self._images, candidates)
        remembered = kept.verdict(*asked) if kept is not None else None
        if remembered is not None:
            return remembered
        expected = self.embed(source, "fp32") if fp32 is None else fp32
        precision = next((name for name in candidates if self._is_close(expected, source, name)), "fp32")
        if kept is not None:
            kept.keep_verdict(*asked, precision)
        return precision

    def _is_close(self, expected: Vectors, source: Source, precision: str) -> bool:
        try:
            return _is_close(expected, self.embed(source, precision))
        except PrecisionError:
            return False

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
        pixels = self._images
        if not len(pixels):
            pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, *self._job.preprocess.crop, 3), np.uint8)
        rows = np.arange(len(pixels))
        embedded: Vectors = runner.embed(pixels, rows).reshape(len(rows), -1)
        return embedded


def _spread(shards: Sequence[Pending], most: int) -> list[Pending]:
    """At most so many of the shards, the first and the last among them, at even distances."""
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
