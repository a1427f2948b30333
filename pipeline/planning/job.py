"""Everything that a config names, looked up before Ray starts."""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass, field, replace

from pipeline.backbones.weights_spec import Weights
from pipeline.core.config import Config
from pipeline.core.errors import StoredDataError, WeightsError
from pipeline.core.storage import locate, to_url
from pipeline.decoding.jpeg_forwarder import require_device_resize
from pipeline.decoding.preprocess import Preprocess
from pipeline.output.fingerprint import Fingerprint, follow, make_fingerprint, read_fingerprint
from pipeline.output.ledger import list_parts
from pipeline.output.names import EMBEDDINGS, RUN_FILE
from pipeline.output.parts import read_facts
from pipeline.planning.cache import Cache
from pipeline.planning.known import Kept, Known, look_up
from pipeline.shards.find import Shard, find_shards

# Of an output without run.json, so many parts at most are asked for what made them.
_MAX_PARTS_ASKED = 100


@dataclass(frozen=True)
class Job:
    """A config with all that it names at hand.

    `shape` is that of one embedding, (C,) or (C, H, W). `precision` is still `auto` where nothing has
    decided it: the device is known only when Ray is up. `weights` may be known and not loaded (`loaded`): then
    `kept` has a graph.
    """

    config: Config
    backbone: str
    weights: Weights
    preprocess: Preprocess
    shape: tuple[int, ...]
    fingerprint: Fingerprint
    is_new: bool
    shards: list[Shard]
    kept: Kept | None = None
    # Names this run in its lease, its report, its metrics and what it prints.
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    @property
    def precision(self) -> str:
        """`fp32`, `bf16`, `fp16`, or `auto`."""
        return str(self.fingerprint.settings["precision"])

    @property
    def engine(self) -> str | None:
        """Name and version of what computes the embeddings; None before it is chosen."""
        return self.fingerprint.versions.get("engine")

    def with_engine(self, engine: str, precision: str) -> Job:
        """The job with its engine, and with `precision` in place of `auto`."""
        settings = {**self.fingerprint.settings, "precision": precision}
        versions = {**self.fingerprint.versions, "engine": engine}
        return replace(self, fingerprint=replace(self.fingerprint, settings=settings, versions=versions))


def prepare(config: Config, cache: Cache | None = None) -> Job:
    """Look up backbone, weights, preprocessing, shards, and what the output was made with.

    Of backbone and weights an earlier run may have left in `cache` all that there is to know.

    Raises:
        SettingsError: one of these does not allow the run.
    """
    # Workers have other working directories than the caller.
    config = replace(config, output=to_url(*locate(config.output)))
    known, kept = look_up(config, cache)
    named = None if known else _named(config)
    found = find_shards(config.input)
    if named is not None:
        known = _known(config, *named)
    assert known is not None
    if config.decode == "gpu":
        require_device_resize(known.preprocess)
    asked = make_fingerprint(
        config,
        backbone=known.backbone,
        weights_name=known.weights.name,
        weights_sha256=known.weights.sha256,
        preprocess=known.preprocess,
        embedding_shape=known.shape,
        precision=config.precision,
        input_prefix=found.prefix,
        versions=known.versions,
    )
    return follow_output(
        Job(config, known.backbone, known.weights, known.preprocess, known.shape, asked, True, found.shards, kept)
    )


def _named(config: Config) -> tuple[str, Preprocess]:
    """The backbone's own name and the preprocessing, from its library: what is soon told, and first mistyped."""
    from pipeline import backbones  # noqa: PLC0415  imports torch, which takes seconds; who knows needs it not

    backbone = backbones.find(config.backbone)
    preprocess = backbones.preprocess_for(backbone, config.weights, config.preprocess)
    return backbone, preprocess if config.image_size is None else preprocess.with_size(config.image_size)


def _known(config: Config, backbone: str, preprocess: Preprocess) -> Known:
    """What is to be known of a backbone, with its weights loaded."""
    from pipeline import backbones  # noqa: PLC0415  as above

    weights = backbones.load_weights(backbone, config.weights)
    shape = backbones.output_shape(backbone, config.features, preprocess.crop, weights)
    return Known(backbone, weights, preprocess, shape, backbones.versions(backbone))


def loaded(job: Job) -> Job:
    """The job with its weights loaded, if an earlier run knew them and this one has not had to load them.

    Raises:
        WeightsError: they are no longer those that the job began with.
    """
    if job.weights.is_loaded:
        return job
    from pipeline import backbones  # noqa: PLC0415  as above

    weights = backbones.load_weights(job.backbone, job.config.weights)
    if weights.sha256 != job.weights.sha256:
        raise WeightsError(
            f"weights {weights.name} changed while the run began: their sha256 was {job.weights.sha256[:12]}, and is "
            f"{weights.sha256[:12]} now"
        )
    return replace(job, weights=weights)


def follow_output(job: Job) -> Job:
    """The job as its output allows it now; another run may have begun that since the job was prepared.

    Raises:
        OtherSettingsError: the output was made with another setting.
        StoredDataError: it does not say with which.
    """
    made = read_fingerprint(job.config.output)
    fingerprint = follow(job.fingerprint, made or _made_parts(job.config.output))
    return replace(job, fingerprint=fingerprint, is_new=made is None)


def _made_parts(output: str) -> Fingerprint | None:
    """What made the parts of an output whose run.json is gone; None where it has none."""
    problem: StoredDataError | None = None
    for part, info in itertools.islice(list_parts(output, EMBEDDINGS), _MAX_PARTS_ASKED):
        try:
            return read_facts(output, f"{EMBEDDINGS}/{part}", info.num_bytes).fingerprint()
        except StoredDataError as error:
            problem = error
    if problem is not None:
        raise StoredDataError(f"{output} has parts and no {RUN_FILE}, and they do not tell what made them: {problem}")
    return None
