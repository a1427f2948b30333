"""The same as `jobs/support/console.py` for machines: every event of a run is a line of JSON on standard output."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from shard_embedder.jobs.support.console import Console
from shard_embedder.pipeline.core.progress import Progress as OnProgress
from shard_embedder.pipeline.core.progress import no_progress
from shard_embedder.pipeline.core.redact import redact

if TYPE_CHECKING:
    from shard_embedder.pipeline.planning.job import Job
    from shard_embedder.pipeline.planning.plan import Plan
    from shard_embedder.pipeline.planning.resources import Resources
    from shard_embedder.pipeline.run.report import Estimate
    from shard_embedder.pipeline.shards.find import Pending
    from shard_embedder.pipeline.shards.photos import Photos

_INFO, _WARNING, _ERROR = "info", "warning", "error"
# What the summary has of the report; the rest is in report.json.
_SUMMARY = (
    "output", "balanced", "num_imbalances", "samples", "embedded", "errors", "errors_by_reason",
    "errors_by_shard", "shards", "unused_images",
    "images_per_s", "slowest_stage", "stage_busy", "wall_s", "start_s", "first_part_s", "work_s",
    "device", "num_devices", "precision", "engine",
    "device_hours", "device_hours_per_million_images", "price", "price_per_million_images",
)  # fmt: skip


def make_console(log_format: str, config_file: str | None = None) -> Console:
    """The console for one of `LOG_FORMATS`."""
    return JsonConsole(config_file) if log_format == "json" else Console(config_file)


class JsonConsole(Console):
    """Writes an object a line: `time` (UTC, ISO 8601), `level`, `run`, `event`, and the values of the event.

    Events are `packing`, `plan`, `waiting`, `resources`, `pass`, `progress` (every 30 s), `problem`, `error`,
    `summary` or `nothing to do`, and at last `end` with the exit code. If the run came to its end, `end` also has
    what `happened` and what to do `next`. In `progress`, the shards and `left_s` are of the pass, the other numbers
    of the run. In `pass`, `problems` are those of the pass before. Errors go to standard output too, in order with
    the rest.
    """

    def __init__(self, config_file: str | None = None) -> None:
        super().__init__(config_file)
        self._verdict: dict[str, Any] = {}
        self._lock = threading.Lock()

    def _say(self, level: str, event: str, **values: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"time": now, "level": level, "run": self.run, "event": event, **_clean(values)}
        with self._lock:
            print(json.dumps(line), flush=True)

    def plan(self, job: Job, plan: Plan, estimated: Estimate | None) -> None:
        """What will be done."""
        self._say(
            _INFO,
            "plan",
            backbone=job.network.backbone,
            weights=job.weights.name,
            weights_sha256=job.weights.sha256,
            fingerprint=job.fingerprint.digest,
            shape=list(job.shape),
            precision=job.precision,
            config_file=self.config_file,
            settings=job.config.not_default(),
            input=list(job.named_input),
            output=job.config.output,
            is_new=job.is_new,
            num_shards=len(job.shards),
            left_out_files=dict(job.left_out),
            num_done=plan.num_done,
            num_pending=len(plan.pending),
            num_changed=len(plan.changed),
            num_retried=len(plan.retried),
            num_elsewhere=plan.elsewhere,
            limit=job.config.limit,
            pending_bytes=plan.pending_bytes,
            estimated_samples=None if estimated is None else estimated.num_samples,
            estimated_s=None if estimated is None or estimated.seconds is None else round(estimated.seconds, 1),
        )

    def packing(self, photos: Photos, *, dry_run: bool) -> None:
        """Which images of a folder are packed into shards."""
        self._say(
            _INFO,
            "packing",
            message=str(photos),
            folder=str(photos.folder),
            shards=str(photos.shards),
            num_images=photos.num_images,
            num_to_pack=photos.num_to_pack,
            bytes_to_pack=photos.bytes_to_pack,
            num_new=photos.num_new,
            num_changed=photos.num_changed,
            num_deleted=photos.num_deleted,
            dry_run=dry_run,
        )

    def packing_progress(self) -> contextlib.AbstractContextManager[OnProgress]:
        """Show nothing: the run that follows is longer."""
        return contextlib.nullcontext(no_progress)

    def waiting(self, why: str) -> None:
        """What the run waits for."""
        self._say(_WARNING, "waiting", message=why)

    def resources(self, job: Job, resources: Resources) -> None:
        """Which CPUs, devices and engine the run uses."""
        self._say(_INFO, "resources", engine=job.engine, job_precision=job.precision, **dataclasses.asdict(resources))
        self._warn_of_unused_gpu(job, resources)

    def _is_live(self) -> bool:
        return False

    def _progress_line(self, seconds: float, silent_s: float) -> None:
        tally = self._tally
        self._say(
            _INFO,
            "progress",
            seconds=round(seconds, 1),
            silent_s=round(silent_s, 1),
            phase=self._phase if tally is None else None,
            embedded=tally.num_embedded if tally else 0,
            errors=tally.num_errors if tally else 0,
            read_bytes=tally.read_bytes if tally else 0,
            images_per_s=round(self._rate, 2),
            num_shards_done=self._pass.num_shards,
            num_shards=self._num_shards,
            left_s=None if self._left_s is None else round(self._left_s, 1),
        )

    def begin_pass(self, number: int, pending: list[Pending], problems: list[str]) -> None:
        """Which pass begins, and which problems the one before had."""
        super().begin_pass(1, pending, [])
        level = _INFO if number == 1 else _WARNING
        self._say(
            level, "pass", number=number, num_shards=len(pending), num_bytes=self._total_bytes, problems=problems
        )

    def summary(self, report: dict[str, Any]) -> None:
        """What the run did."""
        for name, fault in report["broken_shards"].items():
            self._say(_ERROR, "problem", message=f"broken shard: {fault}", shard=name)
        for name in report["missing_shards"]:
            self._say(_ERROR, "problem", message="not complete after all passes", shard=name)
        for text in report["imbalances"]:
            self._say(_ERROR, "problem", message=f"imbalance: {text}")
        for text in report["problems"]:
            self._say(_WARNING, "problem", message=text)
        for text in report["warnings"]:
            self.warning(text)
        level = _INFO if report["balanced"] else _ERROR
        self._say(level, "summary", **{name: report[name] for name in _SUMMARY if name in report})

    def nothing_to_do(self, num_shards: int) -> None:
        """Every shard was done before."""
        self._say(_INFO, "nothing to do", num_shards=num_shards)

    def warning(self, message: str) -> None:
        """A warning."""
        self._say(_WARNING, "problem", message=message)

    def error(self, message: str, exit_code: int | None = None) -> None:
        """One error. The `end` has the exit code."""
        self._say(_ERROR, "error", message=message)

    def verdict(self, report: dict[str, Any]) -> None:
        """How the run ended, for the last line."""
        self._verdict = report["verdict"]

    def end(self, exit_code: int) -> None:
        """The last line."""
        verdict = {name: self._verdict[name] for name in ("happened", "next") if name in self._verdict}
        self._say(_INFO if exit_code == 0 else _ERROR, "end", exit_code=exit_code, **verdict)


def _clean(value: Any) -> Any:
    """`value` for JSON, without secrets. Infinite numbers and NaN become null."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, (bool, int)) else redact(str(value))
