"""What a person sees of a run: the plan, progress, and the table at its end."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
import uuid
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from shard_embedder.jobs.support.command import as_typed
from shard_embedder.jobs.support.progress import LINE_EVERY_S, plain_console, show_progress
from shard_embedder.pipeline.core.config import AUTO
from shard_embedder.pipeline.core.formatting import format_count, format_duration, format_share, format_size
from shard_embedder.pipeline.core.progress import Progress as OnProgress
from shard_embedder.pipeline.core.schema import SHARD_FAULT
from shard_embedder.pipeline.core.threads import repeating
from shard_embedder.pipeline.pages.charts import number
from shard_embedder.pipeline.run.verdict import BAD, GOOD, WARN
from shard_embedder.pipeline.shards.left_out import format_left_out

if TYPE_CHECKING:
    from shard_embedder.pipeline.planning.job import Job
    from shard_embedder.pipeline.planning.plan import Plan
    from shard_embedder.pipeline.planning.resources import Resources
    from shard_embedder.pipeline.run.report import Estimate
    from shard_embedder.pipeline.run.tally import Tally
    from shard_embedder.pipeline.shards.find import Pending
    from shard_embedder.pipeline.shards.photos import Photos

_STYLES = {GOOD: "bold green", WARN: "bold yellow", BAD: "bold red"}
# Settings that lines of the plan already show.
_SHOWN_APART = {"backbone", "weights", "features", "dtype", "precision", "image_size", "limit"}
# A progress line mentions it when no part was stored for this long.
_SILENT_S = 120.0
# So many characters of the problems of a pass are shown when the next begins; the summary has them in full.
_MAX_WHY = 300
# The rate shown is that of the parts in this last window.
_RATE_WINDOW_S = 60.0
# NVIDIA's driver makes this file.
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def format_clock(seconds: float) -> str:
    """`seconds` as H:MM:SS."""
    return str(timedelta(seconds=round(seconds)))


def has_unused_gpu(asked: str, used: str, driver: Path = _NVIDIA_DRIVER) -> bool:
    """Whether a run with `--device auto` computes on CPUs though this machine has a GPU's driver."""
    return asked == "auto" and used == "cpu" and driver.exists()


class _Sums(NamedTuple):
    """The progress of a run, or of one pass."""

    num_shards: int = 0
    read_bytes: int = 0
    wall_s: float = 0.0


class Console:
    """Writes to standard output: a live bar on a terminal, a line every 30 s elsewhere. Errors go to standard error.

    `run` is the id of this run. `config_file` is the file that settings were read from, if any.
    """

    def __init__(self, config_file: str | None = None) -> None:
        self.run = uuid.uuid4().hex[:12]
        self.config_file = config_file
        self._out = plain_console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total_bytes = 1
        self._num_shards = 0
        self._tally: Tally | None = None
        # Shown until the first part is stored.
        self._phase = "starting"
        # The progress of the run when this pass began.
        self._before = _Sums()
        self._rate = 0.0
        self._last_part = 0.0
        self._recent: deque[tuple[float, int]] = deque()

    def plan(self, job: Job, plan: Plan, estimated: Estimate | None) -> None:
        """Say what will be done, and what that should take."""
        settings = job.fingerprint.settings
        shape = "x".join(map(str, job.shape))
        crop = "x".join(map(str, job.network.preprocess.crop))
        say = self._out.print
        say(f"run       {job.run}")
        say(f"backbone  {job.network.backbone}, weights {job.weights.name} (sha256 {job.weights.sha256[:12]})")
        kind = f"{settings.features} [{shape}] {settings.dtype}"
        say(f"features  {kind} of {crop} pixels, precision {job.precision}")
        if self.config_file is not None:
            say(f"config    {self.config_file}")
        others = [f"{name} {value}" for name, value in job.config.not_default().items() if name not in _SHOWN_APART]
        if others:
            say(f"settings  {', '.join(others)}")
        say(f"input     {' '.join(job.named_input)}: {format_count(len(job.shards), 'shard')}")
        if job.left_out:
            num_left_out = format_count(sum(job.left_out.values()), "file")
            what = ".tar" if job.photos is None else "image"
            say(f"left out  {num_left_out} of the input, as no {what}: {format_left_out(job.left_out)}")
        say(f"output    {job.config.output}" + (" (new)" if job.is_new else ""))
        more = [
            f"{len(names)} {what}"
            for names, what in ((plan.changed, "changed"), (plan.retried, "broken before"))
            if names
        ]
        say(
            f"shards    {plan.num_done} done, {len(plan.pending)} pending"
            + (f" ({', '.join(more)})" if more else "")
            + f", {format_size(plan.pending_bytes)} to read"
            + (f"; {len(job.photos.to_write)} to pack" if job.photos is not None and job.photos.to_write else "")
        )
        if job.config.limit is not None and job.config.limit < len(plan.pending):
            now = sum(shard.num_bytes for shard in plan.pending[: job.config.limit])
            say(f"limit     {job.config.limit} of these in this run, {format_size(now)} to read")
        if estimated is not None and plan.pending:
            if estimated.seconds is None:
                took = "by the front of the first shard; no run of this output tells how fast they go"
            else:
                took = f"{format_clock(estimated.seconds)} at the rate of the last run, start-up included"
            say(f"estimate  {format_count(estimated.num_samples, 'sample')}, {took}")
        if plan.elsewhere:
            say(f"          {plan.elsewhere} more are stored and not in this input; they stay as they are")

    def packing(self, photos: Photos, *, dry_run: bool) -> None:
        """Say which images of a folder are packed into shards."""
        what = "photos" if not photos.to_write else "to pack" if dry_run else "packing"
        self._out.print(f"{what:<9} {photos}")

    def waiting(self, why: str) -> None:
        """Say what the run waits for before it begins."""
        self._out.print(f"waiting   {why}")

    def resources(self, job: Job, resources: Resources) -> None:
        """Say which CPUs, devices and engine the run uses."""
        low, high = resources.num_actors
        actors = f"{high}" if low == high else f"{low} to {high}"
        by = f"{job.engine} in {job.precision}"
        self._out.print(f"compute   {resources.total_cpus:g} CPUs, {actors} x {resources.device}, by {by}")
        if job.config.batch_size == AUTO:
            self._out.print(f"batches   {self._batches(resources)}")
        self._warn_of_unused_gpu(job, resources)

    def _warn_of_unused_gpu(self, job: Job, resources: Resources) -> None:
        if has_unused_gpu(job.config.device, resources.device):
            self.warning(
                "Ray has no GPU here, though this machine has an NVIDIA driver: the backbone runs on CPU, which is "
                "slow. Say --device cpu if that is meant, --device cuda to refuse it."
            )

    @staticmethod
    def _batches(resources: Resources) -> str:
        if resources.batch_size is None:
            return "of the size that is the engine's own"
        if not resources.batch_rates:
            return f"of {resources.batch_size} images, as the output was begun"
        rates = ", ".join(f"{size} {rate:.0f}/s" for size, rate in resources.batch_rates)
        return f"of {resources.batch_size} images, by measuring: {rates}"

    def packing_progress(self) -> contextlib.AbstractContextManager[OnProgress]:
        """A function that shows the progress of packing while the block runs."""
        return show_progress(self._out)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Show progress while the block runs."""
        if self._is_live():
            columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self._out, transient=True) as self._bar:
                self._task = self._bar.add_task(self._state(), total=1.0)
                yield
            return
        started = time.monotonic()

        def show_line() -> None:
            now = time.monotonic()
            self._progress_line(now - started, now - max(self._last_part, started))

        with repeating(show_line, LINE_EVERY_S, "progress"):
            yield

    def _is_live(self) -> bool:
        return sys.stdout.isatty()

    def _progress_line(self, seconds: float, silent_s: float) -> None:
        """Show the progress after so many seconds; the last part was stored `silent_s` ago."""
        waits = f"  no part stored for {format_clock(silent_s)}" if silent_s > _SILENT_S else ""
        self._out.print(f"{format_clock(seconds)}  {self._state()}{waits}")

    def _sums(self) -> _Sums:
        """The progress of the run."""
        tally = self._tally
        return _Sums() if tally is None else _Sums(tally.num_shards, tally.read_bytes, tally.wall_s)

    @property
    def _pass(self) -> _Sums:
        """The progress of this pass: the sums of the run also have those before."""
        now, before = self._sums(), self._before
        return _Sums(
            now.num_shards - before.num_shards, now.read_bytes - before.read_bytes, now.wall_s - before.wall_s
        )

    @property
    def _share(self) -> float:
        """The share of this pass's bytes that are read."""
        return min(self._pass.read_bytes / self._total_bytes, 1.0)

    @property
    def _left_s(self) -> float | None:
        share, tally = self._share, self._tally
        if tally is None or not share:
            return None
        # Start-up is not repeated, so it does not count.
        work_s = tally.wall_s - max(self._before.wall_s, tally.start_s or 0.0)
        return work_s * (1 - share) / share

    def _state(self) -> str:
        tally = self._tally
        if tally is None:
            return self._phase
        left = "?" if self._left_s is None else format_clock(self._left_s)
        return (
            f"{tally.num_embedded:,} images  {self._rate:,.0f}/s  "
            f"{self._pass.num_shards:,}/{self._num_shards:,} shards  {tally.num_errors:,} errors  ETA {left}"
        )

    def phase(self, what: str) -> None:
        """Show what happens before there is a part to count."""
        self._phase = what
        self._show()

    def begin_pass(self, number: int, pending: list[Pending], problems: list[str]) -> None:
        """Say which pass begins and which problems the one before had, unless it is the first."""
        self._phase = "waiting for the first part"
        self._before = self._sums()
        self._total_bytes = sum(shard.num_bytes for shard in pending) or 1
        self._num_shards = len(pending)
        self._show()
        if number > 1:
            again = f"pass {number}: {format_count(len(pending), 'shard')} not complete, which run again"
            # Words stay whole: a secret is struck out of a URL, and may not be found in half of one.
            why = textwrap.shorten("; ".join(problems), _MAX_WHY, placeholder=" ...", break_on_hyphens=False)
            self._out.print("; ".join(filter(None, [again, why])))

    def part(self, tally: Tally) -> None:
        """Show that one more part is stored."""
        self._last_part = now = time.monotonic()
        self._recent.append((now, tally.num_embedded))
        while now - self._recent[0][0] > _RATE_WINDOW_S:
            self._recent.popleft()
        since, before = self._recent[0]
        # Until the window is half full, the time since its first part says little: many may come at once.
        is_full = now - since > _RATE_WINDOW_S / 2
        self._rate = (tally.num_embedded - before) / (now - since) if is_full else tally.images_per_s
        self._tally = tally
        self._show()

    def _show(self) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._share, description=self._state())

    def summary(self, report: dict[str, Any]) -> None:
        """The table at the end of a run."""
        shards, million = report["shards"], report["device_hours_per_million_images"]
        rows: list[tuple[str, str]] = [
            ("shards done now", f"{shards['done_now']:,} of {shards['found']:,} ({shards['done_before']:,} before)"),
            ("samples", f"{report['samples']:,}"),
            ("embedded", f"{report['embedded']:,}"),
            ("errors", f"{report['errors']:,}"),
            # The fault of a shard is not an error of a sample, and follows below.
            *((f"  {reason}", f"{n:,}") for reason, n in report["errors_by_reason"].items() if reason != SHARD_FAULT),
            *([("images without a row", f"{report['unused_images']:,}")] if report["unused_images"] else []),
            ("speed", self._speed(report)),
            ("slowest stage", self._stages(report)),
            ("wall time", format_clock(report["wall_s"])),
            *([("device-hours a million images", number(million))] if million is not None else []),
            *self._price(report),
        ]
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self._out.print(f"{name:{width}}  {value}")
        self._worst_shards(report["errors_by_shard"])
        for name, fault in report["broken_shards"].items():
            self._out.print(f"BROKEN    {name}: {fault}", style="bold red")
        for name in report["missing_shards"]:
            self._out.print(f"MISSING   {name}: not complete after all passes", style="bold red")
        for text in report["imbalances"]:
            self._out.print(f"IMBALANCE {text}", style="bold red")
        unlisted = report["num_imbalances"] - len(report["imbalances"])
        if unlisted:
            self._out.print(f"IMBALANCE and {unlisted} more, which are not listed", style="bold red")
        for text in report["problems"]:
            self._out.print(f"PROBLEM   {text}", style="yellow")
        for text in report["warnings"]:
            self.warning(text)

    def nothing_to_do(self, num_shards: int) -> None:
        """Nothing: the verdict says that every shard was done before."""

    def verdict(self, report: dict[str, Any]) -> None:
        """The last line of a run: how it ended, coloured by how bad that is, and what to do next."""
        verdict = report["verdict"]
        said = [f"exit {report['exit_code']}: {verdict['happened']}.", verdict["next"]]
        if report["report_fault"] is None:
            said.append(f"See {report['output'].rstrip('/')}/report.html.")
        self._out.print(" ".join(filter(None, said)), style=_STYLES[verdict["level"]])

    def _worst_shards(self, by_shard: dict[str, Any]) -> None:
        """The shards with the most errors, and the share of their samples that failed."""
        if not by_shard:
            return
        # --help does not need it, and it takes a while to import.
        from shard_embedder.pipeline.output.ledger import MAX_WORST  # noqa: PLC0415

        is_cut = len(by_shard) == MAX_WORST
        self._out.print(f"errors by shard{f', the {MAX_WORST} with the most' if is_cut else ''}")
        for name, found in by_shard.items():
            of = f"{found['errors']:,} of {format_count(found['samples'], 'sample')}"
            self._out.print(f"  {name}: {of} ({format_share(found['share'])})")

    @staticmethod
    def _price(report: dict[str, Any]) -> list[tuple[str, str]]:
        if report["price"] is None:
            return []
        million = report["price_per_million_images"]
        return [("price", f"{report['price']:.4g}" + (f", {million:.4g} a million images" if million else ""))]

    @staticmethod
    def _speed(report: dict[str, Any]) -> str:
        if report["start_s"] is None:
            return "-"
        return f"started in {format_duration(report['start_s'])}, then {number(report['images_per_s'])} images/s"

    @staticmethod
    def _stages(report: dict[str, Any]) -> str:
        busy = ", ".join(f"{stage} {share:.0%}" for stage, share in report["stage_busy"].items())
        return f"{report['slowest_stage'] or '-'} (busy: {busy})"

    def warning(self, message: str) -> None:
        """A warning."""
        self._out.print(f"WARNING   {message}", style="bold yellow")

    def error(self, message: str, exit_code: int | None = None) -> None:
        """One error, on standard error. An error that ends the run has an exit code."""
        ends = "" if exit_code is None else f"exit {exit_code}: "
        plain_console(stderr=True).print(
            f"{as_typed('embed.py')}: {ends}{message}", style=None if exit_code is None else "bold red"
        )

    def end(self, exit_code: int) -> None:
        """Nothing: the verdict or the error was the last line."""
