"""The whole data flow: shards -> samples -> pixels -> embeddings -> Parquet parts. Read this first."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset

from pipeline import words
from pipeline.batch_size import settle
from pipeline.config import Config
from pipeline.decode import Decoder
from pipeline.embedder import Embedder, Source
from pipeline.engine import Choose, choose_engine
from pipeline.errors import ClusterError, SettingsError, ShardError
from pipeline.fingerprint import write_fingerprint
from pipeline.isolated import IsolatedDecoder
from pipeline.ledger import Counts, Plan, count, make_plan
from pipeline.nodes import DeviceTime, FlowCallback, NodeWatch, alive_nodes
from pipeline.parts import PartWriter
from pipeline.plain_jpeg import JpegForwarder
from pipeline.prepare import Job
from pipeline.redact import redact
from pipeline.report import (
    Tally,
    last_counts,
    make_report,
    mark_counted,
    mark_uncounted,
    tells_of_work,
    write_report,
)
from pipeline.resources import Resources, plan_resources
from pipeline.samples import Pending, SampleReader
from pipeline.schema import SHARD_SCHEMA
from pipeline.shards import Shard, find_shards
from pipeline.storage import clear_temporary, delete, describe

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
# Spot machines may stay away for many minutes.
_NODE_WAIT_S = 1800
_CAUSED = "The above exception was the direct cause of the following exception:"
# How an error says that there is no space, and will be none in the next pass either.
_FULL = tuple(f"[Errno {number}]" for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))


def make_flow(
    pending: list[Pending], job: Job, source: Source, resources: Resources, *, isolated: bool = False
) -> Dataset:
    """The flow as a lazy dataset, whose rows are the receipts (`RECEIPT_SCHEMA`) of stored parts.

    With `isolated`, an image that kills its decoder becomes an error; it is somewhat slower.
    """
    config = job.config
    decoder = (IsolatedDecoder if isolated else Decoder)(
        job.preprocess, max_pixels=config.max_pixels, ignore_orientation=config.ignore_orientation
    )
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


@dataclass(frozen=True)
class Watcher:
    """What a caller wants to hear of while a run goes on; `on_wait` from another thread, too."""

    on_resources: Callable[[Job, Resources], None]
    on_pass: Callable[[int, list[Pending]], None]
    on_part: Callable[[Tally], None]
    on_wait: Callable[[str], object] = lambda why: None


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


def run(job: Job, first_plan: Plan, watcher: Watcher, choose: Choose = choose_engine) -> dict[str, Any]:
    """Embed what is pending until all of it is stored, and return the report.

    Ray must be up, unless the plan has nothing pending. Ray Data may fail, or lose a part, in any way:
    what is done is read from the output alone, and what is not is run again, until `max_passes` passes in a row
    stored nothing new.

    Raises:
        ClusterError: the cluster lacks what the job needs.
        OutputError: the output cannot be used.
    """
    config, shards, plan = job.config, job.shards, first_plan
    tally = Tally()
    problems: list[str] = []
    # Beside a done shard lies only what a writer of an older version left.
    _clear(job, plan, plan.stale.keys() - {shard.name for shard in plan.pending})
    counted = last_counts(config.output)
    if not plan.pending:
        _begin(job)
        counts = counted or _counted(job, shards, {shard.name for shard in shards}, problems)
        return _finish(job, plan, None, tally, counts, problems)
    resources = plan_resources(config, watcher.on_wait)
    tally.devices = devices = DeviceTime(resources.requests[0], resources.num_actors[1], tally.started, alive_nodes())
    job, source, resources = _decide(job, plan.pending, resources, watcher, choose, problems)
    watcher.on_resources(job, resources)
    _begin(job)
    mark_uncounted(config.output)
    names = {shard.name for shard in plan.pending[: config.limit]}
    failed = no_nodes = False
    # Passes in a row that stored nothing new, the first aside: a cluster that goes on losing machines may take many
    # passes, and one that cannot do the work few.
    num_idle = -1
    for number in itertools.count(1):
        pending = [shard for shard in plan.pending if shard.name in names and shard.name not in tally.damaged]
        if not pending:
            break
        watcher.on_pass(number, pending)
        num_problems = len(problems)
        _clear(job, plan, [shard.name for shard in pending])
        try:
            # What failed may be a native decoder that an image killed, and its worker with it.
            with _watch_nodes(resources, config, watcher, devices):
                for receipt in _receipts(make_flow(pending, job, source, resources, isolated=failed)):
                    tally.add(receipt)
                    watcher.on_part(tally)
        except ray.exceptions.RayError as error:
            failed = True
            problems.append(f"pass {number}: {_brief(error)}")
        except ClusterError as error:
            no_nodes = True
            problems.append(f"pass {number}: {error}")
        shards = _listed_again(job, shards, problems)
        plan = make_plan(shards, config.output)
        if no_nodes or any(text in problem for problem in problems[num_problems:] for text in _FULL):
            # Another pass would find no node, or pay for the same embeddings and have no place for them either.
            break
        num_idle = 0 if _has_got_on(pending, plan.pending) else num_idle + 1
        if num_idle >= config.max_passes - 1:
            break
    _clear(job, plan, names)
    if counted is None:
        # An earlier run did not count what it stored, or found that it does not balance.
        names |= {shard.name for shard in shards} - {shard.name for shard in plan.pending}
    return _finish(job, first_plan, resources, tally, _counted(job, shards, names, problems), problems)


def _decide(
    job: Job, pending: list[Pending], resources: Resources, watcher: Watcher, choose: Choose, problems: list[str]
) -> tuple[Job, Source, Resources]:
    """What computes, in which precision and batches: job and resources with it, and what the actors are to load."""
    engine = choose(job, pending, resources.device, resources.fast_precisions())
    if engine.note is not None:
        problems.append(f"slower than it could be: {engine.note}")
    source = engine.source.share()
    job, resources, note = settle(job.with_engine(engine.name, engine.precision), source, resources, watcher.on_wait)
    if note is not None:
        problems.append(note)
    return job, source, resources


def _has_got_on(before: list[Pending], now: list[Pending]) -> bool:
    """Whether the output, as listed, has more of the shards `before`: not what a receipt says, but what is there."""
    num_stored = {shard.name: len(shard.stored_parts) for shard in now}
    return any(len(shard.stored_parts) < num_stored.get(shard.name, math.inf) for shard in before)


def _finish(
    job: Job, plan: Plan, resources: Resources | None, tally: Tally, counts: Counts, problems: list[str]
) -> dict[str, Any]:
    report = make_report(tally, counts, job, plan, resources, problems)
    try:
        if plan.pending or not counts.balanced or not tells_of_work(job.config.output):
            write_report(job.config.output, report)
        mark_counted(job.config.output)
    except (OSError, ShardError) as error:
        # What it tells is needed the more.
        report["report_fault"] = describe(error)
    clear_temporary(job.config.output)
    return report


def _counted(job: Job, shards: list[Shard], names: set[str], problems: list[str]) -> Counts:
    """Count the shards of these names, and tell of those that are no longer in the input."""
    counts = count([shard for shard in shards if shard.name in names], job.config.output, job.fingerprint.digest)
    counts.vanished.extend(sorted(names - {shard.name for shard in shards}))
    if counts.vanished:
        gone = ", ".join(counts.vanished[:4]) + (" ..." if len(counts.vanished) > 4 else "")
        problems.append(
            f"{words.count(len(counts.vanished), 'shard')} went from the input before the end of the run: {gone}"
        )
    return counts


def _clear(job: Job, plan: Plan, names: Iterable[str]) -> None:
    """Delete what is stale of these shards."""
    delete(job.config.output, [file for name in names for file in plan.stale.get(name, ())])


def _task_retries() -> dict[str, Any]:
    """Without a bound, which is Ray Data's default, an image that kills its worker is retried for ever."""
    return {"max_retries": _RETRIES}


def _actor_retries() -> dict[str, Any]:
    """Actors are restarted as often as machines vanish, but no part is retried for ever; nodes get equally many."""
    return {"max_restarts": -1, "max_task_retries": _RETRIES, "scheduling_strategy": "SPREAD"}


@contextmanager
def _watch_nodes(resources: Resources, config: Config, watcher: Watcher, devices: DeviceTime) -> Iterator[None]:
    """Let the flow end with a `ClusterError` where a stage has had no node for too long."""
    wait_s = _NODE_WAIT_S if config.node_wait_s is None else config.node_wait_s
    FlowCallback.watch = NodeWatch(resources.requests, wait_s, watcher.on_wait, devices)
    try:
        yield
    finally:
        FlowCallback.watch = None


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


def _begin(job: Job) -> None:
    clear_temporary(job.config.output)
    if job.is_new:
        write_fingerprint(job.config.output, job.fingerprint)


def _listed_again(job: Job, shards: list[Shard], problems: list[str]) -> list[Shard]:
    """The input as it is now: a shard may have changed, or gone, since the run began."""
    try:
        return find_shards(job.config.input).shards
    except SettingsError as error:
        problems.append(str(error))
        return shards


def _receipts(flow: Dataset) -> Iterator[dict[str, Any]]:
    for table in flow.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()


def _brief(error: BaseException) -> str:
    """An error's type and the line that says what went wrong: not Ray's advice, which follows an error of ours."""
    text, _, advice = str(error).rpartition(_CAUSED)
    lines = [line for line in (text if "UserCodeException" in advice else str(error)).splitlines() if line.strip()]
    return redact(f"{type(error).__name__}: {lines[-1].strip() if lines else ''}")[:500]


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
