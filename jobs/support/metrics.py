"""Counts of a run as Prometheus metrics. Ray exports them on every node, with `ray_` before each name."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge

from shard_embedder.pipeline.core.threads import repeating
from shard_embedder.pipeline.run.tally import Tally

# Of Ray's interval of 10 s: it drops a gauge that was not set for two of them.
REPEAT_S = 5.0


class Metrics:
    """Exports the counts of a run in progress; every metric has the tag `run`.

    Counters: `embed_images_total`, `embed_errors_total` (by `reason`), `embed_read_bytes_total`,
    `embed_written_bytes_total`. Gauges: `embed_pending_shards`, and `embed_stage_busy_ratio` (by `stage`), the
    share of the run, without its start, in which the workers of a stage were busy; for `embed`, the devices.
    """

    def __init__(self, run: str, repeat_s: float = REPEAT_S) -> None:
        self._run = {"run": run}
        self._repeat_s = repeat_s
        self._images = Counter("embed_images", "Images embedded and stored.", ("run",))
        self._errors = Counter("embed_errors", "Samples stored as errors.", ("run", "reason"))
        self._read = Counter("embed_read_bytes", "Bytes of shards read.", ("run",))
        self._written = Counter("embed_written_bytes", "Bytes of parts written.", ("run",))
        self._pending = Gauge("embed_pending_shards", "Shards that are not complete.", ("run",))
        self._busy = Gauge(
            "embed_stage_busy_ratio", "Share of the run after its start in which a stage was busy.", ("run", "stage")
        )
        self._num_pending = self._num_done = 0
        # Shown by the gauges; None before the first pass.
        self._num_left: int | None = None
        self._shares: dict[str, float] = {}
        self._counted: Counts[str] = Counts()
        self._counted_reasons: Counts[str] = Counts()

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Set the gauges again and again while the block runs: Ray would drop them between two parts."""
        with repeating(self._set_gauges, self._repeat_s, "metrics"):
            yield

    def _set_gauges(self) -> None:
        if self._num_left is not None:
            self._pending.set(self._num_left, self._run)
        for stage, share in self._shares.items():
            self._busy.set(share, {**self._run, "stage": stage})

    def begin_pass(self, num_pending: int) -> None:
        """Set the number of shards of the new pass."""
        self._num_pending = num_pending + self._num_done
        self._num_left = num_pending
        self._set_gauges()

    def part(self, tally: Tally) -> None:
        """Count one more stored part."""
        for counter, name in (
            (self._images, "num_embedded"),
            (self._read, "read_bytes"),
            (self._written, "written_bytes"),
        ):
            value = getattr(tally, name)
            if value > self._counted[name]:
                counter.inc(value - self._counted[name], self._run)
                self._counted[name] = value
        for reason, value in (tally.reasons - self._counted_reasons).items():
            self._errors.inc(value, {**self._run, "reason": reason})
        self._counted_reasons = Counts(tally.reasons)
        self._num_done = tally.num_shards
        self._num_left = self._num_pending - self._num_done
        self._shares = tally.busy
        self._set_gauges()
