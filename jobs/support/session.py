"""One run of the job, from its config to its exit code; importing this imports Ray."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from typing import Any

import ray

from shard_embedder.jobs.support.connection import connect
from shard_embedder.jobs.support.console import Console
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_TERMINATED, code_of
from shard_embedder.jobs.support.metrics import Metrics
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import PipelineError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.output.lease import Lease, hold
from shard_embedder.pipeline.pages.run_page import write_page
from shard_embedder.pipeline.planning.engine import choose_meanwhile
from shard_embedder.pipeline.planning.job import Job, match_output, pack_input, prepare_job
from shard_embedder.pipeline.planning.plan import Plan, check_names, make_plan
from shard_embedder.pipeline.planning.resources import Resources
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.run.report import estimate, tells_of_work
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.find import Pending

_GO_ON = "what is stored stays; run the same command again to go on"


class _Sigterm:
    """Ends the run by `SystemExit`, and remembers it: a library may swallow the exception or replace it."""

    def __init__(self) -> None:
        self.came = False

    def listen(self) -> None:
        """Handle SIGTERM, if this is the main thread: no other can."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._end)

    def check(self) -> None:
        """End the run if SIGTERM came and did not end it."""
        if self.came:
            raise SystemExit(EXIT_TERMINATED)

    def _end(self, number: int, frame: object) -> None:
        self.came = True
        raise SystemExit(EXIT_TERMINATED)


@contextmanager
def _connected(console: Console, sigterm: _Sigterm) -> Iterator[None]:
    """Connect to Ray, and shut it down after the block unless it was there before.

    While Ray starts, its own handler for SIGTERM would exit with 15. Afterwards Ray leaves the system's handler,
    which would kill the process while it holds the lease.
    """
    was_there = ray.is_initialized()
    try:
        try:
            slow = connect()
        except SystemExit as stop:
            raise SystemExit(EXIT_TERMINATED) from stop
        finally:
            sigterm.listen()
        if slow is not None:
            console.warning(slow)
        yield
    finally:
        try:
            if not was_there:
                ray.shutdown()
        finally:
            sigterm.listen()


def run_job(config: Config, console: Console, *, dry_run: bool) -> int:
    """Run the job, and return its exit code."""
    sigterm = _Sigterm()
    try:
        job = replace(prepare_job(config), run=console.run)
        if dry_run:
            _show_photos(job, console, dry_run=True)
            _plan(job, console)
            return EXIT_OK
        # A run that is stopped while it waits for the lease says so, too.
        sigterm.listen()
        with hold(job.config.output, console.waiting, job.run) as lease:
            return _run_held(_packed(match_output(job), lease, console), lease, console, sigterm)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if sigterm.came or isinstance(error, (KeyboardInterrupt, SystemExit)):
            code = EXIT_TERMINATED if sigterm.came else code_of(error)
            console.error(f"interrupted: {_GO_ON}", code)
            return code
        if not isinstance(error, (PipelineError, OSError)):
            raise
        code = code_of(error)
        # After a failure of the store, nothing that is stored is lost.
        console.error(f"{describe(error)}; {_GO_ON}" if code == EXIT_FAILED else str(error), code)
        return code


def _plan(job: Job, console: Console) -> Plan:
    """Make the plan, and show it."""
    plan = make_plan(job.shards, job.config.output)
    check_names(job, plan)
    console.plan(
        job, plan, estimate(job.config.output, plan.pending[: job.config.limit], job.fingerprint.settings.naming)
    )
    return plan


def _show_photos(job: Job, console: Console, *, dry_run: bool) -> None:
    if job.photos is not None:
        console.packing(job.photos, dry_run=dry_run)
    if job.warning is not None:
        console.warning(job.warning)


def _packed(job: Job, lease: Lease, console: Console) -> Job:
    """The job with its folder of images packed, if its input is one."""
    _show_photos(job, console, dry_run=False)
    if job.photos is None:
        return job
    with console.packing_progress() as on_progress:

        def show(what: str, done: int, total: int) -> None:
            lease.check()
            on_progress(what, done, total)

        return pack_input(job, show)


def _run_held(job: Job, lease: Lease, console: Console, sigterm: _Sigterm) -> int:
    """Run the job. The caller holds the lease of its output."""
    plan = _plan(job, console)
    metrics = Metrics(job.run)

    def on_resources(decided: Job, resources: Resources) -> None:
        # Next, run.json is written, and another run may have begun the output while this one waited for nodes.
        lease.confirm()
        console.resources(decided, resources)

    def on_pass(number: int, pending: list[Pending], problems: list[str]) -> None:
        sigterm.check()
        lease.confirm()
        console.begin_pass(number, pending, problems)
        metrics.begin_pass(len(pending))

    def on_part(tally: Tally) -> None:
        sigterm.check()
        lease.check()
        console.part(tally)
        metrics.part(tally)

    watcher = Watcher(on_resources, on_pass, on_part, console.waiting, lease.confirm)
    # Ray shuts down before the lease is released, so that no worker writes after that.
    with console.progress(), choose_meanwhile(job, plan.pending) as choose, ExitStack() as stack:
        if plan.pending:
            console.phase("starting Ray")
            stack.enter_context(_connected(console, sigterm))
            stack.enter_context(metrics.repeated())
            console.phase("trying the backbone")
        report = run(job, plan, watcher, stack.enter_context(closing(OnRay(choose))))
    if plan.pending or not report["balanced"]:
        console.summary(report)
    else:
        console.nothing_to_do(len(job.shards))
    opened = {shard.name for shard in plan.pending[: job.config.limit]}
    # The page shows the stored report.
    if plan.pending or not tells_of_work(job.config.output):
        _draw(report, job, opened, lease, console)
    console.verdict(report)
    return int(report["exit_code"])


def _draw(report: Mapping[str, Any], job: Job, opened: set[str], lease: Lease, console: Console) -> None:
    """Draw the page of a run that is over: what fails here does not change how the run ended."""
    if report["report_fault"] is not None:
        return
    try:
        lease.check()
        write_page(report, job.shards, opened, job.fingerprint.settings.naming)
    except (PipelineError, OSError) as error:
        console.error(f"report.html cannot be written: {describe(error)}; the run itself is over and stored")
    except (KeyboardInterrupt, SystemExit):
        console.error("interrupted while report.html was drawn: the run itself is over and stored")
