"""What a run did: counts by stage and reason while it runs, and `report.json` at its end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from shard_embedder.pipeline.core.schema import STAGES
from shard_embedder.pipeline.core.storage import join, read_bytes
from shard_embedder.pipeline.core.writing import delete, write_bytes
from shard_embedder.pipeline.output.ledger import Counts
from shard_embedder.pipeline.output.names import REPORT_FILE, REPORTS_FOLDER, UNCOUNTED_FILE
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.plan import Plan
from shard_embedder.pipeline.run.advice import make_warnings
from shard_embedder.pipeline.run.tally import Tally, slowest_stage
from shard_embedder.pipeline.run.verdict import Incomplete, judge
from shard_embedder.pipeline.shards.find import Pending, Shard
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.peek import mean_sample_bytes

# Of report.json: it grows where a field changes its meaning or goes, not where one is added.
SCHEMA_VERSION = 1
MAX_LISTED = 100
_TOO_MANY = 10**18


def make_report(
    tally: Tally,
    counts: Counts,
    job: Job,
    plan: Plan,
    problems: list[str],
    refused: dict[str, str],
) -> dict[str, Any]:
    """The report of a run, as it is stored in `report.json`.

    Counts are of the shards that this run took on, read back from what is stored, and of all that are done where an
    earlier run has not counted them or found that they do not balance; `errors_by_reason` is of what this run
    stored itself, and `errors_by_shard` of the ten shards with the most errors. `batch_size` is what was asked for
    or measured, None for the engine's own, and `batch_size_used` the smallest that was used: where a device's
    memory does not hold a batch, its runner halves them. Lists are cut, and have their number beside them.
    `device_refused` images were decoded on the CPU, since the device's decoder refused them (`device_refusal`).
    `exit_code` and `verdict` are how it ended. `problems` is what went wrong with the engine on the way, `warnings`
    what may not be meant, and `unused_images` are image members that no row stands for. `timeline` has for each
    `step_s` seconds since the begin (`started_at`) the images of the parts stored in it, and the seconds that each
    stage worked on them; `stage_workers` is how many workers of a stage can be busy at once, on average.
    `num_devices` is the most that there were at once; `device_hours` counts each for as long as it was there.
    `images_per_s`, `stage_busy`, and what a million images take, are of the work alone (`work_s`), from the end of
    the start (`start_s`) to the last part; a million is not told of less than a minute of work.
    """
    wall_s, device_s, devices = tally.wall_s, tally.device_s, tally.devices
    resources = tally.resources
    slots = tally.slots or dict.fromkeys(STAGES, 1.0)
    slowest, busy = slowest_stage(tally.stage_s, slots, tally.work_s)
    price = job.config.price_per_hour
    device_hours = device_s / 3600
    per_million = tally.device_hours_per_million_images
    report = {
        "schema_version": SCHEMA_VERSION,
        "run": job.run,
        "started_at": tally.started_at.isoformat(timespec="seconds"),
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "output": job.config.output,
        "input": list(job.named_input),
        "fingerprint": job.fingerprint.digest,
        "backbone": job.network.backbone,
        "weights": job.weights.name,
        "weights_sha256": job.weights.sha256,
        "features": job.config.features,
        "embedding_shape": list(job.shape),
        "dtype": job.config.dtype,
        "precision": job.precision,
        "engine": job.engine,
        "device": resources.device if resources else None,
        "batch_size": resources.batch_size if resources else None,
        "batch_size_used": tally.batch_size,
        "batch_rates": {str(size): round(rate, 2) for size, rate in resources.batch_rates} if resources else {},
        "decode": job.config.decode,
        "device_refused": tally.device_refused,
        "device_refusal": tally.device_refusal,
        "num_devices": devices.peak if devices else 0,
        "balanced": counts.balanced,
        "samples": counts.num_samples,
        "embedded": counts.num_embedded,
        "errors": counts.num_errors,
        "errors_by_reason": dict(tally.reasons.most_common()),
        "error_examples": tally.examples,
        "errors_by_shard": {
            name: {"errors": num_errors, "samples": num_samples, "share": round(num_errors / num_samples, 4)}
            for name, (num_errors, num_samples) in counts.errors_by_shard.items()
        },
        "shards": {
            "found": len(job.shards),
            "done_before": plan.num_done,
            "changed": len(plan.changed),
            "retried": len(plan.retried),
            "done_now": tally.num_shards,
            "broken": len(counts.broken),
            "missing": len(counts.missing),
            "vanished": len(counts.vanished),
            "refused": len(refused),
            "stored_but_not_in_input": plan.elsewhere,
        },
        "refused_shards": dict(sorted(refused.items())[:MAX_LISTED]),
        "broken_shards": {name: tally.faults.get(name, "broken") for name in counts.broken[:MAX_LISTED]},
        "missing_shards": counts.missing[:MAX_LISTED],
        "imbalances": counts.faults[:MAX_LISTED],
        "num_imbalances": len(counts.faults),
        "problems": problems,
        "warnings": make_warnings(job, counts, tally),
        "left_out_files": dict(job.left_out),
        "report_fault": None,
        "kept_nulls": tally.kept_nulls,
        "kept_fields": {
            field.column: dataclasses.asdict(kept) for field, kept in zip(job.config.keep, tally.kept, strict=False)
        },
        "ignored_members": tally.ignored_members,
        "apart_samples": tally.apart_samples,
        "unused_images": counts.unused_images,
        "unused_example": counts.unused_example,
        "read_bytes": tally.read_bytes,
        "written_bytes": tally.written_bytes,
        "wall_s": round(wall_s, 3),
        "start_s": None if tally.start_s is None else round(tally.start_s, 3),
        "first_part_s": None if tally.first_part_s is None else round(tally.first_part_s, 3),
        "samples_now": tally.num_samples,
        "embedded_now": tally.num_embedded,
        "work_s": round(tally.work_s, 3),
        "images_per_s": round(tally.images_per_s, 2),
        "slowest_stage": slowest if tally.num_parts else None,
        "stage_busy": {stage: round(share, 4) for stage, share in busy.items()},
        "stage_s": {stage: round(seconds, 3) for stage, seconds in tally.stage_s.items()},
        "stage_workers": {stage: round(number, 2) for stage, number in slots.items()} if resources else {},
        "device_hours": round(device_hours, 6),
        "device_hours_per_million_images": None if per_million is None else round(per_million, 4),
        "price_per_hour": price,
        "price": None if price is None else round(device_hours * price, 6),
        "price_per_million_images": None if price is None or per_million is None else round(per_million * price, 4),
    }
    judged = judge(
        report,
        Incomplete(
            damaged=[name for name in counts.broken if name in tally.damaged],
            unreadable=[name for name in counts.broken if name not in tally.damaged],
            vanished=counts.vanished,
            refused=refused,
        ),
        num_shards=len({shard.name for shard in job.shards} | refused.keys()),
        num_left=max(0, len(plan.pending) - (job.config.limit or len(plan.pending))),
        worst_share=counts.worst_share,
        max_error_fraction=job.config.max_error_fraction,
        max_shard_error_fraction=job.config.max_shard_error_fraction,
    )
    # The timeline last, since it is long.
    return {
        **report,
        "exit_code": judged["exit_code"],
        "verdict": judged["verdict"],
        "timeline": tally.timeline.as_dict(),
    }


def has_incomplete_shards(report: Mapping[str, Any]) -> bool:
    """Whether a report has shards that are not all stored: broken, gone during the run, or refused."""
    return any(report["shards"][kind] for kind in ("broken", "vanished", "refused"))


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
    except OSError:
        return None
    try:
        report = json.loads(read_bytes(join(output, REPORT_FILE)))
        numbers = [report[name] for name in ("samples", "embedded", "errors", "unused_images")]
        is_whole = report["balanced"] is True and all(
            type(number) is int and 0 <= number < _TOO_MANY for number in numbers
        )
        if not is_whole:
            return None
        counts = Counts(*numbers[:3])
        counts.unused_images, example = numbers[3], report["unused_example"]
        counts.unused_example = example if isinstance(example, str) else None
        return counts
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    # It is a file that anyone may have written: no number of it is taken that a run could not have.
    is_told = all(0 <= number < _TOO_MANY for number in work[1:])
    is_work = work.num_samples >= 1 and work.read_bytes >= 1 and work.wall_s > 0
    return work if is_told and is_work else None


def tells_of_work(output: str) -> bool:
    """Whether the stored report is of a run that did something, and all of it: one without work keeps that."""
    work = _last_work(output)
    return work is not None and work.is_balanced


class Estimate(NamedTuple):
    """What a run will have to do, by what the last one on the same output did for each byte."""

    num_samples: int
    seconds: float | None


def estimate(output: str, pending: Sequence[Pending], naming: Naming) -> Estimate | None:
    """Expect the bytes of `pending` to go as those of the last run did.

    Where no run of this output tells, the samples are as many as the front of the first shard has for its bytes, and
    the seconds None; where that does not tell either, there is no estimate.

    What that run took beyond its work is its start-up, which does not grow with the bytes. Its work took the time
    after its first part, and at least what its slowest stage takes alone: of few parts, the first is most of it.
    """
    pending_bytes = sum(shard.num_bytes for shard in pending)
    work = _last_work(output)
    if work is None:
        mean = mean_sample_bytes(Shard(*pending[0][:-1]), naming) if pending else None
        return None if mean is None else Estimate(round(pending_bytes / mean), None)
    work_s = min(max(work.wall_s - work.first_part_s, work.stage_s), work.wall_s)
    share = pending_bytes / work.read_bytes
    return Estimate(round(share * work.num_samples), work.wall_s - work_s + share * work_s)


def write_report(output: str, report: dict[str, Any]) -> None:
    """Write `report.json`, and the same below `reports/`, where it stays."""
    data = (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode()
    for name in (REPORT_FILE, f"{REPORTS_FOLDER}/{report['run']}.json"):
        write_bytes(output, name, data)
