"""The whole data flow: shards -> samples -> pixels -> embeddings -> Parquet parts. Read this first."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from shard_embedder.pipeline.core.config import device_share
from shard_embedder.pipeline.core.groups import grouped
from shard_embedder.pipeline.core.schema import SHARD_SCHEMA
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import JpegForwarder
from shard_embedder.pipeline.embedding.embedder import PARTS_AT_ONCE, Embedder, Source
from shard_embedder.pipeline.output.parts import PartWriter
from shard_embedder.pipeline.planning.resources import Resources
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.samples import SampleReader

if TYPE_CHECKING:  # it loads torch, and each worker that reads, decodes or writes would take a second for that
    from shard_embedder.pipeline.planning.job import Job

# Small shards are read many to a task, and those of a huge input too: neither a task for every ten
# images, nor a million tasks.
_TASK_BYTES = 32 * 2**20
_MAX_TASKS = 20_000
# Parts below this travel many to a block; a larger part is a block of its own.
_BLOCK_BYTES = 32 * 2**20
_RESERVED_SHARE = 0.1
_LONE_STORE_SHARE = 0.75
# A flow in which nothing moves for so long is ended. One part may take as long: a backbone that embeds less than
# part_rows images an hour needs smaller parts.
_STALL_S = 3600


@dataclass(frozen=True)
class Stages:
    """The stages of a job: what each is made of, wherever it runs."""

    reader: SampleReader
    decoder: Decoder | JpegForwarder
    embedder: functools.partial[Embedder]
    writer: PartWriter

    @classmethod
    def of(cls, job: Job, source: Source, resources: Resources) -> Stages:
        """The stages of a job."""
        config = job.config
        decoder = Decoder(job.rules)
        share = device_share(config.decode)
        embedder = functools.partial(
            Embedder,
            source,
            job.network,
            resources.placement(job.precision, compiled=config.compile),
            shape=job.shape,
            dtype=config.dtype,
            decoder=decoder if share else None,
        )
        return cls(
            reader=SampleReader(config, job.limits),
            decoder=JpegForwarder(decoder, share) if share else decoder,
            embedder=embedder,
            writer=PartWriter(config, job.fingerprint, job.shape, job.limits),
        )


def make_flow(pending: list[Pending], job: Job, source: Source, resources: Resources) -> Dataset:
    """The flow as a lazy dataset, whose rows are the receipts (`RECEIPT_SCHEMA`) of stored parts."""
    stages = Stages.of(job, source, resources)
    decoded = read_and_decode(pending, stages.reader, stages.decoder, resources)
    embedded = decoded.map_batches(
        Embedder,
        fn_constructor_args=stages.embedder.args,
        # Ray starts a process that ended again, and gives it the same part.
        fn_constructor_kwargs={**stages.embedder.keywords, "ends_process": True},
        # One part a call: with GPUs Ray Data refuses None, which would be a block.
        batch_size=1,
        batch_format="pyarrow",
        compute=_pool(resources),
        num_cpus=resources.reserved_cpus,
        num_gpus=resources.actor_gpus or None,
        resources=resources.requests[0].named or None,
    )
    return embedded.map_batches(
        write,
        fn_args=(stages.writer,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.write_cpus,
    )


def read_and_decode(
    pending: list[Pending], reader: SampleReader, decoder: Decoder | JpegForwarder, resources: Resources
) -> Dataset:
    """The first half of the flow: shards to parts of samples with pixels, or with what the device is to decode."""
    # Unlike `from_arrow` it runs no task to look at each table, and waits for none.
    shards = ray.data.from_blocks(_task_tables(pending))
    _tune(shards.context, resources)
    samples = shards.map_batches(
        read,
        fn_args=(reader,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.read_cpus,
        memory=resources.read_memory,
    )
    return samples.map_batches(
        decode,
        fn_args=(decoder,),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=resources.decode_cpus,
        memory=resources.decode_memory,
    )


def read(shards: pa.Table, reader: SampleReader) -> Iterator[pa.Table]:
    """Shards in, parts of encoded samples out."""
    return reader(shards)


def decode(samples: pa.Table, decoder: Decoder | JpegForwarder) -> Iterator[pa.Table]:
    """Parts of encoded samples in, the same with pixels out."""
    return decoder(samples)


def write(embedded: pa.Table, writer: PartWriter) -> pa.Table:
    """Parts with embeddings in, a receipt for each out, once it is stored."""
    return writer(embedded)


def _pool(resources: Resources) -> ActorPoolStrategy:
    """Actors that have two parts at once: while one is computed, the next is fetched and the one before stored.

    Not where the pool may grow: Ray Data would count an actor as having room for two parts, and may start no other.
    """
    smallest, largest = resources.num_actors
    if smallest < largest:
        return ActorPoolStrategy(min_size=smallest, max_size=largest)
    return ActorPoolStrategy(
        size=largest,
        max_concurrent_calls_per_actor=PARTS_AT_ONCE,
        max_tasks_in_flight_per_actor=PARTS_AT_ONCE + 1,
        enable_true_multi_threading=True,
    )


def _tune(context: DataContext, resources: Resources) -> None:
    """Settings of this flow alone: those of the process stay as they are."""
    for name, value in {
        # Ray Data keeps half of what it may fill of the object store in equal shares for the stages; here decoding
        # needs nearly all. Of a store it fills half; a lone node's may be filled further, up to where Ray spills.
        "op_resource_reservation_ratio": _RESERVED_SHARE,
        "override_object_store_memory_limit_fraction": _LONE_STORE_SHARE if resources.num_nodes == 1 else None,
        "target_max_block_size": _BLOCK_BYTES,
        "execution_no_progress_timeout_s": _STALL_S,
        "enable_progress_bars": False,
        "print_on_execution_start": False,
    }.items():
        if not hasattr(context, name):
            raise AttributeError(f"Ray Data's DataContext has no {name} any more: this Ray is too new")
        setattr(context, name, value)


def _task_tables(pending: list[Pending]) -> list[pa.Table]:
    """The pending shards as one table a read task."""
    total = sum(shard.num_bytes for shard in pending)
    groups = grouped(pending, lambda shard: shard.num_bytes, max(_TASK_BYTES, total // _MAX_TASKS))
    return [pa.Table.from_pylist([shard._asdict() for shard in group], schema=SHARD_SCHEMA) for group in groups]
