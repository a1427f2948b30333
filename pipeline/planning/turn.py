"""One job at a time looks for room on a cluster and takes it.

Two that look at the same moment would both find it free, and fill it with actors beside which neither can read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import ray

from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.planning.nodes import SAY_EVERY_S

_NAME, _NAMESPACE = "turn", "shard_embedder"
_LOOK_EVERY_S = 1.0


class _Holder:
    """Does nothing: only one actor of a cluster can have its name, and it ends with its job."""


class Turn:
    """A job's turn."""

    def __init__(self) -> None:
        self._holder: Any = None

    def take(self, wait_s: float, say: Callable[[str], object]) -> None:
        """Wait until no other job has its turn. `say` is told of a wait, at once and every minute.

        Raises:
            ClusterError: others had theirs for `wait_s` seconds.
        """
        holder = ray.remote(_Holder).options(name=_NAME, namespace=_NAMESPACE, num_cpus=0)
        deadline = time.monotonic() + wait_s
        said = -math.inf
        while self._holder is None:
            try:
                self._holder = holder.remote()
            # Taken; of a job that died a moment ago Ray no longer knows what the actor was.
            except (ValueError, AssertionError) as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ClusterError(
                        f"other jobs have been starting on this cluster for {wait_s:.0f} s: see "
                        f"`ray list actors` for the one named {_NAME} in the namespace {_NAMESPACE}"
                    ) from error
                if time.monotonic() - said >= SAY_EVERY_S:
                    said = time.monotonic()
                    say(f"another job is starting on this cluster; {left:.0f} s more")
                time.sleep(min(_LOOK_EVERY_S, left))

    def end(self) -> None:
        """Let the next job look, if it is this one's turn."""
        if self._holder is not None:
            ray.kill(self._holder)
            self._holder = None
