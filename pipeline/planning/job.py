"""A job: everything that a config names, looked up before Ray starts."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from shard_embedder.pipeline.backbones import library_of
from shard_embedder.pipeline.backbones.weights_spec import Weights
from shard_embedder.pipeline.core.config import Config, device_share
from shard_embedder.pipeline.core.errors import InputError, StoredDataError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.progress import Progress, no_progress
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.storage import join, locate, to_url
from shard_embedder.pipeline.decoding.jpeg_forwarder import require_device_decoding
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.decoding.versions import INSTALL_HEIF, heif_version, require_decoders, torchcodec_version
from shard_embedder.pipeline.embedding.network import Network
from shard_embedder.pipeline.output.fingerprint import (
    Fingerprint,
    check_against_output,
    make_fingerprint,
    read_fingerprint,
)
from shard_embedder.pipeline.output.ledger import list_parts
from shard_embedder.pipeline.output.names import EMBEDDINGS, RUN_FILE
from shard_embedder.pipeline.output.parts import read_facts
from shard_embedder.pipeline.output.settings import OutputSettings
from shard_embedder.pipeline.shards.find import Refused, Shard, ShardSet, find_shards, shards_below
from shard_embedder.pipeline.shards.keys import HEIF_EXTENSIONS, printable
from shard_embedder.pipeline.shards.photos import (
    PACKED,
    PATH,
    PackingRules,
    Photos,
    compare_again,
    find_photos,
    find_shards_or_images,
    local_folder,
    pack_photos,
)
from shard_embedder.pipeline.shards.samples import bound_part_rows

# If run.json is missing, at most so many parts are read for what made the output.
_MAX_PARTS_ASKED = 100


@dataclass(frozen=True)
class Job:
    """A config with everything that it names, looked up.

    `shape` is that of one embedding, (C,) or (C, H, W). `precision` stays `auto` until the cluster is known, and with
    it the device.
    """

    config: Config
    network: Network
    weights: Weights
    shape: tuple[int, ...]
    fingerprint: Fingerprint
    is_new: bool
    shards: list[Shard]
    # Files of the input that are no shards, by kind.
    left_out: Mapping[str, int]
    # Shards that cannot be embedded: no part can have their name, or their server reads no ranges.
    refused: tuple[Refused, ...] = ()
    # The folder of the input when the output was begun; None if it is the same now.
    moved_from: str | None = None
    # If the input is a folder of images; `config.input` is then where they are packed.
    photos: Photos | None = None
    # The id of this run in its lease, report, metrics and lines.
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    # When its stages give up the store.
    limits: StoreLimits = LIMITS

    @property
    def precision(self) -> str:
        """`fp32`, `bf16`, `fp16`, or `auto`."""
        return self.fingerprint.settings.precision

    @property
    def engine(self) -> str | None:
        """Name and version of the engine; None before it is chosen."""
        return self.fingerprint.versions.get("engine")

    @property
    def rules(self) -> DecodingRules:
        """How its images are decoded."""
        return self.fingerprint.settings.rules

    @property
    def named_input(self) -> tuple[str, ...]:
        """The input as the user named it: `config.input`, or the folder of images that is packed there."""
        return self.config.input if self.photos is None else (printable(str(self.photos.folder)),)

    @property
    def warning(self) -> str | None:
        """Which images of a folder are left out though they could be embedded."""
        return _describe_heif(self.photos) if self.photos is not None and self.photos.num_undecodable else None

    def list_shards(self) -> list[Shard]:
        """The shards of the input as they are now. Raises `InputError`."""
        if self.photos is not None:
            return shards_below(self.config.input[0])
        return find_shards(self.config.input).shards

    def with_engine(self, engine: str, precision: str) -> Job:
        """The job with its engine, and with `precision` in place of `auto`."""
        settings = replace(self.fingerprint.settings, precision=precision)
        versions = {**self.fingerprint.versions, "engine": engine}
        return replace(self, fingerprint=replace(self.fingerprint, settings=settings, versions=versions))

    def with_batch_size(self, device: str, size: int | None) -> Job:
        """The job with so many images a batch on this kind of device; None for the engine's own number.

        The sizes of other devices stay: a later run may use them.
        """
        sizes = {kind: known for kind, known in self.fingerprint.batch_size.items() if kind != device}
        if size is not None:
            sizes[device] = size
        return replace(self, fingerprint=replace(self.fingerprint, batch_size=sizes))


def prepare_job(config: Config) -> Job:
    """Look up backbone, weights, preprocessing, shards, and what the output was made with.

    Raises:
        ClusterError: Pillow or pillow-heif is too old here. Other nodes are checked when they decode.
        SettingsError: one of these does not allow the run.
        StoreError: the output cannot be read.
    """
    require_decoders(heif_version() is not None)
    # A relative path would mean another folder to workers.
    config = replace(config, output=to_url(*locate(config.output)))
    # Quick checks of what is often mistyped come first.
    library = library_of(config.backbone)
    backbone = library.find(config.backbone)
    preprocess = library.preprocess_for(backbone, config.weights, config.preprocess)
    if config.image_size is not None:
        preprocess = preprocess.with_size(config.image_size)
    if device_share(config.decode):
        require_device_decoding(preprocess)
    # The pixels of a part are bounded; its number of rows is a setting of the output.
    config = replace(config, part_rows=bound_part_rows(config.part_rows, preprocess.crop))
    config, found, photos = _find_input(config)
    weights = library.load_weights(backbone, config.weights)
    shape = library.output_shape(backbone, config.features, preprocess.crop, weights)
    settings = OutputSettings.of(
        config, backbone=backbone, weights_sha256=weights.sha256, preprocess=preprocess, embedding_shape=shape
    )
    versions = library.versions()
    if device_share(config.decode):
        versions = {**versions, "torchcodec": torchcodec_version() or ""}
    asked = make_fingerprint(
        settings,
        weights_name=weights.name,
        input_prefix=found.prefix,
        versions=versions,
        photos_folder="" if photos is None else printable(str(photos.folder.resolve())),
    )
    network = Network(backbone=backbone, preprocess=preprocess, features=config.features, normalize=config.normalize)
    return match_output(
        Job(
            config, network, weights, shape, asked, True, found.shards, found.left_out, tuple(found.refused),
            photos=photos,
        )
    )  # fmt: skip


def _find_input(config: Config) -> tuple[Config, ShardSet, Photos | None]:
    """The config, with its input as shards; these shards; and the folder of images, if the input is one."""
    found = find_shards_or_images(config.input)
    if isinstance(found, ShardSet):
        return config, found, None
    output = local_folder(config.output)
    if output is None:
        raise InputError(
            f"output must be on this machine where input is a folder of images, got {config.output}: pack the images "
            "into shards with the pack command, copy these to the store, and name them as the input"
        )
    undecodable = () if heif_version() else HEIF_EXTENSIONS
    photos = find_photos(found, output, PackingRules(undecodable=undecodable))
    if not photos.num_images:
        raise InputError(f"input must hold images that can be decoded, got {str(found)!r}: {_describe_heif(photos)}")
    packed = join(config.output, PACKED)
    shards = shards_below(packed) if photos.is_begun else []
    config = replace(config, input=(packed,), id=config.id or PATH)
    return config, ShardSet(packed, shards, [], photos.found.left_out), photos


def _describe_heif(photos: Photos) -> str:
    number = format_count(photos.num_undecodable, "HEIC image")
    return f"{number} of {photos.folder} left out: they need pillow-heif. {INSTALL_HEIF} and run the command again"


def pack_input(job: Job, on_progress: Progress = no_progress) -> Job:
    """The job with its folder of images packed, if its input is one. The caller holds the output.

    Raises:
        OutputError: the disk has no room for the shards.
        OSError: an image cannot be read, or a shard not written.
    """
    if job.photos is None:
        return job
    photos = compare_again(job.photos)
    pack_photos(photos, on_progress)
    return replace(job, shards=job.list_shards(), photos=replace(photos, to_write={}))


def match_output(job: Job) -> Job:
    """The job with what its output is made with. Another run may have begun the output since the job was prepared.

    Raises:
        OtherSettingsError: the output was made with another setting.
        StoredDataError: the output does not say what made it.
        StoreError: it cannot be read.
    """
    made = read_fingerprint(job.config.output)
    fingerprint = check_against_output(job.fingerprint, made or _made_parts(job.config.output))
    before = "" if made is None else made.input_prefix
    moved_from = before if before not in ("", fingerprint.input_prefix) else None
    return replace(job, fingerprint=fingerprint, is_new=made is None, moved_from=moved_from)


def _made_parts(output: str) -> Fingerprint | None:
    """What made the parts of an output without run.json; None if it has no parts."""
    problem: StoredDataError | None = None
    for part, info in itertools.islice(list_parts(output, EMBEDDINGS), _MAX_PARTS_ASKED):
        try:
            return read_facts(output, f"{EMBEDDINGS}/{part}", info.num_bytes).fingerprint()
        except StoredDataError as error:
            problem = error
    if problem is not None:
        raise StoredDataError(f"{output} has parts and no {RUN_FILE}, and they do not tell what made them: {problem}")
    return None
