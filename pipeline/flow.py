"""The whole data flow: shards -> samples -> pixels -> embeddings -> Parquet parts. Read this first."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from pipeline.core.config import Config
from pipeline.core.schema import SHARD_SCHEMA
from pipeline.decoding.decoder import Decoder
from pipeline.decoding.jpeg_forwarder import JpegForwarder
from pipeline.decoding.rules import DecodingRules
from pipeline.embedding.embedder import Embedder, Source
from pipeline.output.parts import PartWriter
from pipeline.planning.job import Job
from pipeline.planning.nodes import FlowCallback
from pipeline.planning.resources import Resources
from pipeline.shards.find import Pending
from pipeline.shards.samples import SampleReader

# Small shards are read many to a task, and those of a huge input too: neither a task for every ten
# images, nor a million tasks.
_TASK_BYTES = 32 * 2**20
_MAX_TASKS = 20_000
# Parts below this travel many to a block; a larger part is a block of its own.
_BLOCK_BYTES = 32 * 2**20
_RESERVED_SHARE = 0.1
_LONE_STORE_SHARE = 0.75
_RETRIES = 3
_PARTS_AT_ONCE = 2


def make_flow(pending: list[Pending], job: Job, source: Source, resources: Resources) -> Dataset:
    """The flow as a lazy dataset, whose rows are the receipts (`RECEIPT_SCHEMA`) of stored parts."""
    config = job.config
    decoder = Decoder(DecodingRules.of(config, job.preprocess))
    on_device = config.decode == "gpu"
    decoded = read_and_decode(pending, config, JpegForwarder(decoder) if on_device else decoder, resources)
    embedded = decoded.map_batches(
        Embedder,
        fn_constructor_kwargs={
            "backbone": job.backbone,
            "source": source,
            "features": config.features,
            "preprocess": job.preprocess,
            "shape": job.shape,
            "dtype": config.dtype,
            "precision": job.precision,
            "normalize": config.normalize,
            "device": resources.device,
            "batch_size": resources.batch_size,
            "num_threads": resources.num_threads,
            "decoder": decoder if on_device else None,
            "compiled": config.compile,
        },
        # One part a call: with GPUs Ray Data refuses None, which would be a block.
        batch_size=1,
        batch_format="pyarrow",
        compute=_pool(resources),
        num_cpus=resources.actor_cpus,
        num_gpus=resources.actor_gpus or None,
        resources=resources.requests[0].named or None,
        ray_remote_args_fn=_actor_retries,
    )
    return embedded.map_batches(
        PartWriter(config, job.fingerprint, job.shape),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.write_cpus,
        ray_remote_args_fn=_task_retries,
    )


def read_and_decode(
    pending: list[Pending], config: Config, decoder: Decoder | JpegForwarder, resources: Resources
) -> Dataset:
    """The first half of the flow: shards to parts of samples with pixels, or with what the device is to decode."""
    _set_up_engine(resources)
    # Unlike `from_arrow` it runs no task to look at each table, and waits for none.
    shards = ray.data.from_blocks(_task_tables(pending))
    samples = shards.map_batches(
        SampleReader(config),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.read_cpus,
        memory=resources.read_memory,
        ray_remote_args_fn=_task_retries,
    )
    return samples.map_batches(
        decoder,
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.decode_cpus,
        ray_remote_args_fn=_task_retries,
    )


def _pool(resources: Resources) -> ActorPoolStrategy:
    """Actors that have two parts at once: while one is computed, the next is fetched and the one before stored.

    Not where the pool may grow: Ray Data would count an actor as having room for two parts, and may start no other.
    """
    smallest, largest = resources.num_actors
    if smallest < largest:
        return ActorPoolStrategy(min_size=smallest, max_size=largest)
    return ActorPoolStrategy(
        size=largest,
        max_concurrent_calls_per_actor=_PARTS_AT_ONCE,
        max_tasks_in_flight_per_actor=_PARTS_AT_ONCE + 1,
        enable_true_multi_threading=True,
    )


def _task_retries() -> dict[str, Any]:
    """Without a bound, which is Ray Data's default, an image that kills its worker is retried for ever."""
    return {"max_retries": _RETRIES}


def _actor_retries() -> dict[str, Any]:
    """Actors are restarted as often as machines vanish, but no part is retried for ever; nodes get equally many."""
    return {"max_restarts": -1, "max_task_retries": _RETRIES, "scheduling_strategy": "SPREAD"}


def _set_up_engine(resources: Resources) -> None:
    context = DataContext.get_current()
    # Ray Data keeps half of what it may fill of the object store in equal shares for the stages; here decoding needs
    # nearly all. Of a store it fills half; that of a lone node may be filled further, up to where Ray spills.
    context.op_resource_reservation_ratio = _RESERVED_SHARE
    context.override_object_store_memory_limit_fraction = _LONE_STORE_SHARE if resources.num_nodes == 1 else None
    context.custom_execution_callback_classes = [FlowCallback]
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _task_tables(pending: list[Pending]) -> list[pa.Table]:
    """The pending shards as one table a read task."""
    total = sum(shard.num_bytes for shard in pending)
    limit = max(_TASK_BYTES, total // _MAX_TASKS)
    groups: list[list[Pending]] = []
    size = 0
    for shard in pending:
        if not groups or size + shard.num_bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(shard)
        size += shard.num_bytes
    return [pa.Table.from_pylist([shard._asdict() for shard in group], schema=SHARD_SCHEMA) for group in groups]
