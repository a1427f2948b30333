"""Passes over the flow until all is stored, and the report of them."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import Dataset

from pipeline.core.config import Config
from pipeline.core.errors import ClusterError, SettingsError, ShardError
from pipeline.core.formatting import format_count
from pipeline.core.redact import describe, redact
from pipeline.core.storage import clear_temporary, delete
from pipeline.embedding.embedder import Source
from pipeline.flow import make_flow
from pipeline.output.fingerprint import write_fingerprint
from pipeline.output.ledger import Counts, count
from pipeline.planning.batch_size import settle
from pipeline.planning.engine import Choose, choose_engine
from pipeline.planning.job import Job
from pipeline.planning.nodes import DeviceTime, FlowCallback, NodeWatch, alive_nodes
from pipeline.planning.plan import Plan, make_plan
from pipeline.planning.resources import Resources, plan_resources
from pipeline.planning.stored_source import StoredSource
from pipeline.run.report import last_counts, make_report, mark_counted, mark_uncounted, tells_of_work, write_report
from pipeline.run.tally import Tally
from pipeline.shards.find import Pending, Shard, find_shards

# Spot machines may stay away for many minutes.
_NODE_WAIT_S = 1800
_CAUSED = "The above exception was the direct cause of the following exception:"
# How an error says that there is no space, and will be none in the next pass either.
_FULL = tuple(f"[Errno {number}]" for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))


@dataclass(frozen=True)
class Watcher:
    """What a caller wants to hear of while a run goes on; `on_wait` from another thread, too."""

    on_resources: Callable[[Job, Resources], None]
    on_pass: Callable[[int, list[Pending]], None]
    on_part: Callable[[Tally], None]
    on_wait: Callable[[str], object] = lambda why: None


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
    no_nodes = False
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
            with _watch_nodes(resources, config, watcher, devices):
                for receipt in _receipts(make_flow(pending, job, source, resources)):
                    tally.add(receipt)
                    watcher.on_part(tally)
        except ray.exceptions.RayError as error:
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
    source = StoredSource.put(engine.source)
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
            f"{format_count(len(counts.vanished), 'shard')} went from the input before the end of the run: {gone}"
        )
    return counts


def _clear(job: Job, plan: Plan, names: Iterable[str]) -> None:
    """Delete what is stale of these shards."""
    delete(job.config.output, [file for name in names for file in plan.stale.get(name, ())])


@contextmanager
def _watch_nodes(resources: Resources, config: Config, watcher: Watcher, devices: DeviceTime) -> Iterator[None]:
    """Let the flow end with a `ClusterError` where a stage has had no node for too long."""
    wait_s = _NODE_WAIT_S if config.node_wait_s is None else config.node_wait_s
    FlowCallback.watch = NodeWatch(resources.requests, wait_s, watcher.on_wait, devices)
    try:
        yield
    finally:
        FlowCallback.watch = None


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
