"""What executes a pass: the cluster that Ray is connected to, or this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from shard_embedder.pipeline.core.errors import PipelineError
from shard_embedder.pipeline.embedding.embedder import Source
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.planning.nodes import DeviceTime
from shard_embedder.pipeline.planning.resources import Resources
from shard_embedder.pipeline.shards.find import Pending

Say = Callable[[str], object]


class PassError(PipelineError):
    """A pass ended before its work was done. What it stored stays, and the next pass does the rest."""


@dataclass(frozen=True)
class Prepared:
    """A job with all that was decided for it, what its runners are made of, and the resources of its stages."""

    job: Job
    source: Source
    resources: Resources
    devices: DeviceTime
    problems: list[str] = field(default_factory=list)


class Executor(Protocol):
    """Decides what computes the embeddings, and runs the stages over shards."""

    def prepare(self, job: Job, pending: list[Pending], since: float, on_wait: Say) -> Prepared:
        """Choose engine, precision, batch size and resources; device time counts from `since` (`time.monotonic`).

        Raises:
            ClusterError: there are no resources for it.
        """
        ...

    def receipts(self, prepared: Prepared, pending: list[Pending], on_wait: Say) -> Iterator[Any]:
        """One pass: a receipt (`RECEIPT_SCHEMA`) for each part, once it is stored.

        Raises:
            PassError: it ended before its time.
            ClusterError: a stage has had no node for too long.
        """
        ...
