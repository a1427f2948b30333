"""What a run did when, in bounded memory: the images and busy seconds of the parts that were stored in each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shard_embedder.pipeline.core.schema import STAGES

MAX_STEPS = 240
_FIRST_STEP_S = 0.5


class Timeline:
    """Sums over steps of equal length from the begin of a run.

    Where there would be more than `MAX_STEPS`, neighbours are added up and the step is twice as long: a run of a
    week takes no more memory than one of a minute. A part counts in the step in which it was stored, with all that it
    took, so the sums over all steps are those of the run.
    """

    def __init__(self) -> None:
        self.step_s = _FIRST_STEP_S
        self._images: list[int] = []
        self._busy_s: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def add(self, at_s: float, images: int, busy_s: Mapping[str, float]) -> None:
        """Count a part that was stored `at_s` seconds after the begin: its images, and each stage's seconds."""
        while at_s >= MAX_STEPS * self.step_s:
            self.step_s *= 2
            self._images = _by_two(self._images)
            self._busy_s = {stage: _by_two(sums) for stage, sums in self._busy_s.items()}
        step = int(at_s / self.step_s)
        more = step + 1 - len(self._images)
        self._images.extend([0] * more)
        self._images[step] += images
        for stage, sums in self._busy_s.items():
            sums.extend([0.0] * more)
            sums[step] += busy_s[stage]

    def as_dict(self) -> dict[str, Any]:
        """As it stands in report.json: `step_s`, and for each step `images` and, by stage, `busy_s`."""
        busy_s = {stage: [round(seconds, 3) for seconds in sums] for stage, sums in self._busy_s.items()}
        return {"step_s": self.step_s, "images": list(self._images), "busy_s": busy_s}


def _by_two(sums: list[Any]) -> list[Any]:
    return [sum(sums[start : start + 2]) for start in range(0, len(sums), 2)]
