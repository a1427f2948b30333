"""What the receipts of stored parts add up to."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from shard_embedder.pipeline.core.schema import END_BROKEN, END_LAST, STAGE_EMBED, STAGES
from shard_embedder.pipeline.planning.nodes import DeviceTime
from shard_embedder.pipeline.planning.resources import Resources
from shard_embedder.pipeline.run.timeline import Timeline

# A run that worked for less tells nothing of what a million images take.
_LEAST_WORK_S = 60.0


@dataclass
class Kept:
    """Of a kept field: how many rows have a value, how many values were lost, and one of these."""

    values: int = 0
    lost: int = 0
    example: str | None = None


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
    apart_samples: int = 0
    # Of each field of `keep`, in its order.
    kept: list[Kept] = field(default_factory=list)
    # The smallest that a runner used: on a device whose memory did not hold more.
    batch_size: int | None = None
    # Images that a device's decoder refused and the CPU decoded, and what the device said of the first.
    device_refused: int = 0
    device_refusal: str | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    # Shards that reading again cannot mend, with their fault.
    damaged: dict[str, str] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    # Shards that cannot be stored, whatever is tried, and why.
    unstored: dict[str, str] = field(default_factory=dict)
    timeline: Timeline = field(default_factory=Timeline)
    started: float = field(default_factory=time.monotonic)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    first_part_s: float | None = None
    last_part_s: float = 0.0
    # When the first part that was stored began to be read.
    began_s: float = 0.0
    # None until the run has looked at the cluster.
    devices: DeviceTime | None = None
    resources: Resources | None = None

    def add(self, receipt: dict[str, Any]) -> None:
        """Count one stored part; or a shard that the store refuses, which is nobody else's fault."""
        if receipt["store_fault"] is not None:
            self.unstored[receipt["name"]] = self.damaged[receipt["name"]] = receipt["fault"]
            return
        busy_s = {stage: receipt[f"{stage}_s"] for stage in STAGES}
        self.last_part_s = self.wall_s
        if self.first_part_s is None:
            self.first_part_s = self.last_part_s
            # A part goes through the stages one after the other.
            self.began_s = max(0.0, self.first_part_s - sum(busy_s.values()))
        self.num_parts += 1
        self.num_shards += receipt["end"] == END_LAST
        self.num_samples += receipt["num_samples"]
        self.num_embedded += receipt["num_embedded"]
        self.num_errors += receipt["num_samples"] - receipt["num_embedded"]
        for name in (
            "read_bytes",
            "written_bytes",
            "kept_nulls",
            "ignored_members",
            "apart_samples",
            "device_refused",
        ):
            setattr(self, name, getattr(self, name) + receipt[name])
        self.batch_size = min(self.batch_size or receipt["batch_size"], receipt["batch_size"])
        if self.device_refusal is None and receipt["device_refusal"] is not None:
            self.device_refusal = f"{receipt['name']}: {receipt['device_refusal']}"
        self.kept = self.kept or [Kept() for _ in receipt["kept"]]
        for kept, counts in zip(self.kept, receipt["kept"], strict=True):
            kept.values += counts["values"]
            kept.lost += counts["lost"]
            if kept.example is None and counts["example"] is not None:
                kept.example = f"{receipt['name']}, {counts['example']}"
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
    def work_s(self) -> float:
        """Seconds of the run until the last stored part, without the start.

        It is never less than the slowest stage takes alone: of a short run, all parts may be told of at once.
        """
        alone_s = max((self.stage_s[stage] / max(number, 1e-9) for stage, number in self.slots.items()), default=0.0)
        return min(max(self.last_part_s - self.began_s, alone_s), self.last_part_s)

    @property
    def start_s(self) -> float | None:
        """Seconds before that; None where no part is stored."""
        return self.last_part_s - self.work_s if self.num_parts else None

    @property
    def images_per_s(self) -> float:
        """The rate of that work."""
        return self.num_embedded / self.work_s if self.work_s else 0.0

    @property
    def device_hours_per_million_images(self) -> float | None:
        """What the work on a million images takes of devices; None where there was too little work to tell."""
        if self.work_s < _LEAST_WORK_S or not self.num_embedded:
            return None
        num_devices = self.device_s / self.wall_s
        return num_devices * self.work_s / 3600 / self.num_embedded * 1e6

    @property
    def device_s(self) -> float:
        """Device-seconds that the run has held until now."""
        return self.devices.seconds(time.monotonic()) if self.devices else 0.0

    @property
    def busy(self) -> dict[str, float]:
        """The share of the work until now in which the workers of a stage were busy: those that there were."""
        return slowest_stage(self.stage_s, self.slots, self.work_s)[1] if self.slots else {}

    @property
    def slots(self) -> dict[str, float]:
        """How many workers of a stage could be busy at once, on average until now; none before the run has looked."""
        if self.resources is None:
            return {}
        return {**self.resources.slots, **({STAGE_EMBED: self.device_s / self.wall_s} if self.devices else {})}


def slowest_stage(stage_s: dict[str, float], slots: dict[str, float], took_s: float) -> tuple[str, dict[str, float]]:
    """The stage whose workers were busy for the largest share of the time, and each stage's share, at most 1.

    Args:
        stage_s: seconds that a stage's workers worked, all together.
        slots: how many workers of a stage can run at once.
        took_s: how long the work took, without the start.
    """
    busy = {stage: stage_s[stage] / max(slots[stage] * took_s, 1e-9) for stage in stage_s}
    return max(busy, key=lambda stage: busy[stage]), {stage: min(share, 1.0) for stage, share in busy.items()}
