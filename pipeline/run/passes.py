"""Passes over the flow until all is stored, and the report of them."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shard_embedder.pipeline.core.errors import ClusterError, SettingsError
from shard_embedder.pipeline.core.formatting import format_count, one_line
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.writing import clear_temporary, delete
from shard_embedder.pipeline.output.fingerprint import write_fingerprint
from shard_embedder.pipeline.output.ledger import Counts, count
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.plan import Plan, make_plan
from shard_embedder.pipeline.planning.resources import Resources
from shard_embedder.pipeline.run.executor import Executor, PassError
from shard_embedder.pipeline.run.report import (
    last_counts,
    make_report,
    mark_counted,
    mark_uncounted,
    tells_of_work,
    write_report,
)
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.run.verdict import without_report
from shard_embedder.pipeline.shards.find import Pending, Shard

# How an error says that there is no space, and will be none in the next pass either.
_FULL = tuple(f"[Errno {number}]" for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS))


@dataclass(frozen=True)
class Watcher:
    """What a caller wants to hear of while a run goes on; `on_wait` from another thread, too."""

    on_resources: Callable[[Job, Resources], None]
    # The number of the pass that begins, its shards, and the problems of the pass before.
    on_pass: Callable[[int, list[Pending], list[str]], None]
    on_part: Callable[[Tally], None]
    on_wait: Callable[[str], object] = lambda why: None
    # Before what is stored of the run itself: the deletes at its end, and its report.
    on_end: Callable[[], object] = lambda: None


def run(job: Job, first_plan: Plan, watcher: Watcher, executor: Executor) -> dict[str, Any]:
    """Embed what is pending until all of it is stored, and return the report.

    A pass of the `executor` may fail, or lose a part, in any way: what is done is read from the output alone, and
    what is not is run again, until `max_passes` passes in a row stored nothing new.

    Raises:
        ClusterError: the cluster lacks what the job needs.
        OSError: the store failed.
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
        return _finish(job, plan, tally, counts, problems)
    prepared = executor.prepare(job, plan.pending, tally.started, watcher.on_wait)
    job, resources = prepared.job, prepared.resources
    tally.devices, tally.resources = prepared.devices, resources
    problems += prepared.problems
    watcher.on_resources(job, resources)
    _begin(job)
    mark_uncounted(config.output)
    names = {shard.name for shard in plan.pending[: config.limit]}
    no_nodes = False
    problems_before: list[str] = []
    # Passes in a row that stored nothing new, the first aside: a cluster that goes on losing machines may take many
    # passes, and one that cannot do the work few.
    num_idle = -1
    for number in itertools.count(1):
        pending = [shard for shard in plan.pending if shard.name in names and shard.name not in tally.damaged]
        if not pending:
            break
        watcher.on_pass(number, pending, problems_before)
        num_problems = len(problems)
        _clear(job, plan, [shard.name for shard in pending])
        try:
            for receipt in executor.receipts(prepared, pending, watcher.on_wait):
                tally.add(receipt)
                watcher.on_part(tally)
        except PassError as error:
            problems.append(f"pass {number}: {error}")
        except ClusterError as error:
            no_nodes = True
            problems.append(f"pass {number}: {error}")
        shards = _listed_again(job, shards, problems)
        plan = make_plan(shards, config.output)
        problems_before = problems[num_problems:]
        if no_nodes or any(text in problem for problem in problems_before for text in _FULL):
            # Another pass would find no node, or pay for the same embeddings and have no place for them either.
            break
        num_idle = 0 if _has_got_on(pending, plan.pending) else num_idle + 1
        if num_idle >= config.max_passes - 1:
            break
    watcher.on_end()
    _clear(job, plan, names)
    if counted is None:
        # An earlier run did not count what it stored, or found that it does not balance.
        names |= {shard.name for shard in shards} - {shard.name for shard in plan.pending}
    names -= tally.unstored.keys()
    return _finish(job, first_plan, tally, _counted(job, shards, names, problems), problems)


def _has_got_on(before: list[Pending], now: list[Pending]) -> bool:
    """Whether the output, as listed, has more of the shards `before`: not what a receipt says, but what is there."""
    num_stored = {shard.name: len(shard.stored_parts) for shard in now}
    return any(len(shard.stored_parts) < num_stored.get(shard.name, math.inf) for shard in before)


def _finish(job: Job, plan: Plan, tally: Tally, counts: Counts, problems: list[str]) -> dict[str, Any]:
    refused = dict(job.refused) | tally.unstored
    if refused:
        name, reason = min(refused.items())
        problems.append(
            f"{format_count(len(refused), 'shard')} cannot be embedded, such as {one_line(name)}: {reason}"
        )
    report = make_report(tally, counts, job, plan, problems, refused)
    try:
        if plan.pending or not counts.balanced or not tells_of_work(job.config.output):
            write_report(job.config.output, report)
        mark_counted(job.config.output)
    except OSError as error:
        # What it tells is needed the more.
        report = without_report(report, describe(error))
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


def _begin(job: Job) -> None:
    clear_temporary(job.config.output)
    if job.is_new:
        write_fingerprint(job.config.output, job.fingerprint)


def _listed_again(job: Job, shards: list[Shard], problems: list[str]) -> list[Shard]:
    """The input as it is now: a shard may have changed, or gone, since the run began."""
    try:
        return job.list_shards()
    except SettingsError as error:
        problems.append(str(error))
        return shards
