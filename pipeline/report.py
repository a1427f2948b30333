"""What a run did: counts by stage and reason while it runs, and `report.json` at its end."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipeline.errors import ShardError
from pipeline.ledger import Counts, Plan
from pipeline.nodes import DeviceTime
from pipeline.prepare import Job
from pipeline.report_timeline import Timeline
from pipeline.resources import Resources
from pipeline.samples import Pending
from pipeline.schema import END_BROKEN, END_LAST, STAGE_EMBED, STAGES
from pipeline.shards import Shard
from pipeline.storage import delete, join, read_bytes, write_bytes
from pipeline.verify_tars import mean_sample_bytes

REPORT_FILE = "report.json"
UNCOUNTED_FILE = ".uncounted"
MAX_LISTED = 100


@dataclass
class Tally:
    """Sums over the receipts of a run."""

    num_samples: int = 0
    num_embedded: int = 0
    num_errors: int = 0
    num_parts: int = 0
    num_shards: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    kept_nulls: int = 0
    ignored_members: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    # Shards that reading again cannot mend, with their fault.
    damaged: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    started: float = field(default_factory=time.monotonic)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    first_part_s: float | None = None
    # None until the run has looked at the cluster.
    devices: DeviceTime | None = None

    def add(self, receipt: dict[str, Any]) -> None:
        """Count one stored part."""
        if self.first_part_s is None:
            self.first_part_s = time.monotonic() - self.started
        self.num_parts += 1
        self.num_shards += receipt["end"] == END_LAST
        self.num_samples += receipt["num_samples"]
        self.num_embedded += receipt["num_embedded"]
        self.num_errors += receipt["num_samples"] - receipt["num_embedded"]
        for name in ("read_bytes", "written_bytes", "kept_nulls", "ignored_members"):
            setattr(self, name, getattr(self, name) + receipt[name])
        busy_s = {stage: receipt[f"{stage}_s"] for stage in STAGES}
        for stage in STAGES:
            self.stage_s[stage] += busy_s[stage]
        self.timeline.add(self.wall_s, receipt["num_embedded"], busy_s)
        for reason, image_id in zip(receipt["reasons"], receipt["error_ids"], strict=True):
            kind = reason.partition(":")[0]
            self.reasons[kind] += 1
            place = receipt["name"] if image_id is None else f"{receipt['name']}, {image_id}"
            self.examples.setdefault(kind, f"{place}: {reason}")
        if receipt["end"] == END_BROKEN:
            self.faults[receipt["name"]] = receipt["fault"]
            if not receipt["fault_transient"]:
                self.damaged[receipt["name"]] = receipt["fault"]
        elif receipt["end"] == END_LAST:
            self.faults.pop(receipt["name"], None)

    @property
    def wall_s(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self.started

    @property
    def device_s(self) -> float:
        """Device-seconds that the run has held until now."""
        return self.devices.seconds(time.monotonic()) if self.devices else 0.0

    def busy(self, resources: Resources) -> dict[str, float]:
        """The share of the run until now in which the workers of a stage were busy: those that there were."""
        return slowest_stage(self.stage_s, self.slots(resources), self.wall_s)[1]

    def slots(self, resources: Resources) -> dict[str, float]:
        """How many workers of a stage could be busy at once, on average until now."""
        return {**resources.slots, **({STAGE_EMBED: self.device_s / self.wall_s} if self.devices else {})}


def slowest_stage(stage_s: dict[str, float], slots: dict[str, float], wall_s: float) -> tuple[str, dict[str, float]]:
    """The stage whose workers were busy for the largest share of the run, and that share of each.

    Args:
        stage_s: seconds that a stage's workers worked, all together.
        slots: how many workers of a stage can run at once.
        wall_s: how long the run took.
    """
    busy = {stage: stage_s[stage] / max(slots[stage] * wall_s, 1e-9) for stage in stage_s}
    return max(busy, key=lambda stage: busy[stage]), busy


def make_report(
    tally: Tally, counts: Counts, job: Job, plan: Plan, resources: Resources | None, problems: list[str]
) -> dict[str, Any]:
    """The report of a run, as it is stored in `report.json`.

    Counts are of the shards that this run took on, read back from what is stored, and of all that are done where an
    earlier run has not counted them or found that they do not balance; `errors_by_reason` is of what this run stored
    itself. Lists are cut, and have their number beside them. `problems` is what went wrong with the engine on the
    way. `timeline` has for each `step_s` seconds since the begin (`started_at`) the
    images of the parts stored in it, and the seconds that each stage worked on them; `stage_workers` is how many
    workers of a stage can be busy at once, on average. `num_devices` is the most that there were at once;
    `device_hours` counts each for as long as it was there.
    """
    wall_s, device_s, devices = tally.wall_s, tally.device_s, tally.devices
    slots = tally.slots(resources) if resources else dict.fromkeys(STAGES, 1.0)
    slowest, busy = slowest_stage(tally.stage_s, slots, wall_s)
    price = job.config.price_per_hour
    device_hours = device_s / 3600
    per_million = device_hours / tally.num_embedded * 1e6 if tally.num_embedded else None
    return {
        "run": job.run,
        "started_at": tally.started_at.isoformat(timespec="seconds"),
        "output": job.config.output,
        "input": list(job.config.input),
        "fingerprint": job.fingerprint.digest,
        "backbone": job.backbone,
        "weights": job.weights.name,
        "weights_sha256": job.weights.sha256,
        "features": job.config.features,
        "embedding_shape": list(job.shape),
        "dtype": job.config.dtype,
        "precision": job.precision,
        "engine": job.engine,
        "device": resources.device if resources else None,
        "batch_size": resources.batch_size if resources else None,
        "batch_rates": {str(size): round(rate, 2) for size, rate in resources.batch_rates} if resources else {},
        "decode": job.config.decode,
        "num_devices": devices.peak if devices else 0,
        "balanced": counts.balanced,
        "samples": counts.num_samples,
        "embedded": counts.num_embedded,
        "errors": counts.num_errors,
        "errors_by_reason": dict(tally.reasons.most_common()),
        "error_examples": tally.examples,
        "shards": {
            "found": len(job.shards),
            "done_before": plan.num_done,
            "changed": len(plan.changed),
            "retried": len(plan.retried),
            "done_now": tally.num_shards,
            "broken": len(counts.broken),
            "missing": len(counts.missing),
            "vanished": len(counts.vanished),
            "stored_but_not_in_input": plan.elsewhere,
        },
        "broken_shards": {name: tally.faults.get(name, "broken") for name in counts.broken[:MAX_LISTED]},
        "missing_shards": counts.missing[:MAX_LISTED],
        "imbalances": counts.faults[:MAX_LISTED],
        "num_imbalances": len(counts.faults),
        "problems": problems,
        "report_fault": None,
        "kept_nulls": tally.kept_nulls,
        "ignored_members": tally.ignored_members,
        "read_bytes": tally.read_bytes,
        "written_bytes": tally.written_bytes,
        "wall_s": round(wall_s, 3),
        "first_part_s": None if tally.first_part_s is None else round(tally.first_part_s, 3),
        "samples_now": tally.num_samples,
        "embedded_now": tally.num_embedded,
        "images_per_s": round(tally.num_embedded / wall_s, 2) if wall_s else None,
        "slowest_stage": slowest if tally.num_parts else None,
        "stage_busy": {stage: round(share, 4) for stage, share in busy.items()},
        "stage_s": {stage: round(seconds, 3) for stage, seconds in tally.stage_s.items()},
        "stage_workers": {stage: round(number, 2) for stage, number in slots.items()} if resources else {},
        "device_hours": round(device_hours, 6),
        "device_hours_per_million_images": None if per_million is None else round(per_million, 4),
        "price_per_hour": price,
        "price": None if price is None else round(device_hours * price, 6),
        "price_per_million_images": None if price is None or per_million is None else round(per_million * price, 4),
        # Last, since it is long.
        "timeline": tally.timeline.as_dict(),
    }


def mark_uncounted(output: str) -> None:
    """Say that what is stored in `output` is not counted: a run that dies before it has done so leaves that."""
    write_bytes(output, UNCOUNTED_FILE, b"")


def mark_counted(output: str) -> None:
    """Take that back, where the report of what was counted is stored."""
    delete(output, [UNCOUNTED_FILE])


def last_counts(output: str) -> Counts | None:
    """What the stored report counted; None where it did not balance, or what was stored since is not counted."""
    try:
        read_bytes(join(output, UNCOUNTED_FILE))
        return None
    except FileNotFoundError:
        pass
    except (OSError, ShardError):
        return None
    try:
        report = json.loads(read_bytes(join(output, REPORT_FILE)))
        counts = Counts(int(report["samples"]), int(report["embedded"]), int(report["errors"]))
        return counts if report["balanced"] is True else None
    except (OSError, ShardError, ValueError, KeyError, TypeError):
        return None


class _Work(NamedTuple):
    """What a run did, as its report tells."""

    is_balanced: bool
    num_samples: int
    read_bytes: float
    wall_s: float
    first_part_s: float
    stage_s: float  # what the slowest stage would have taken alone


def _last_work(output: str) -> _Work | None:
    """What the run did that `report.json` tells of; None where there is none, or it did nothing."""
    try:
        last = json.loads(read_bytes(join(output, REPORT_FILE)))
        work = _Work(
            bool(last["balanced"]),
            int(last["samples_now"]),
            float(last["read_bytes"]),
            float(last["wall_s"]),
            float(last["first_part_s"]),
            max(float(last["stage_s"][stage]) / max(float(last["stage_workers"][stage]), 1e-9) for stage in STAGES),
        )
    except (OSError, ShardError, ValueError, KeyError, TypeError):
        return None
    return work if work.num_samples > 0 and work.read_bytes > 0 and work.wall_s > 0 else None


def tells_of_work(output: str) -> bool:
    """Whether the stored report is of a run that did something, and all of it: one without work keeps that."""
    work = _last_work(output)
    return work is not None and work.is_balanced


class Estimate(NamedTuple):
    """What a run will have to do, by what the last one on the same output did for each byte."""

    num_samples: int
    seconds: float | None


def estimate(output: str, pending: Sequence[Pending]) -> Estimate | None:
    """Expect the bytes of `pending` to go as those of the last run did.

    Where no run of this output tells, the samples are as many as the front of the first shard has for its bytes, and
    the seconds None; where that does not tell either, there is no estimate.

    What that run took beyond its work is its start-up, which does not grow with the bytes. Its work took the time
    after its first part, and at least what its slowest stage takes alone: of few parts, the first is most of it.
    """
    pending_bytes = sum(shard.num_bytes for shard in pending)
    work = _last_work(output)
    if work is None:
        mean = mean_sample_bytes(Shard(*pending[0][:-1])) if pending else None
        return None if mean is None else Estimate(round(pending_bytes / mean), None)
    work_s = min(max(work.wall_s - work.first_part_s, work.stage_s), work.wall_s)
    share = pending_bytes / work.read_bytes
    return Estimate(round(share * work.num_samples), work.wall_s - work_s + share * work_s)


def write_report(output: str, report: dict[str, Any]) -> None:
    """Write `report.json`."""
    write_bytes(output, REPORT_FILE, (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
