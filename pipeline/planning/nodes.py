"""What a stage asks of a node, and whether the cluster has one that can give it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import ray
from ray._private.utils import get_num_cpus

from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.core.formatting import format_duration

# A wait that goes on is reported this often.
SAY_EVERY_S = 60.0
_LOOK_EVERY_S = 5.0
# A node with a named resource may hold any number of actors: the name is a place, not an amount.
_SHARE = 0.001

Node = dict[str, float]


@dataclass(frozen=True)
class Request:
    """What `count` workers of a stage request at the same time, each of one node."""

    stage: str
    cpus: float
    gpus: float = 0.0
    resource: str | None = None
    count: int = 1

    @property
    def named(self) -> dict[str, float]:
        """The resources that are neither CPU nor GPU."""
        return {} if self.resource is None else {self.resource: _SHARE}

    @property
    def each(self) -> dict[str, float]:
        """What one worker requests."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.named}
        return {name: amount for name, amount in amounts.items() if amount}

    def room(self, node: Node) -> int:
        """How many of its workers fit an idle node."""
        return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in self.each.items())

    def __str__(self) -> str:
        """`embed, 2 times 0.3 CPU and 1 GPU on a node with accelerator_type:H100`."""
        amounts = [f"{amount:g} {name}" for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount]
        times = f"{self.count} times " if self.count > 1 else ""
        place = f" on a node with {self.resource}" if self.resource else " on one node"
        return f"{self.stage}, {times}{' and '.join(amounts)}{place}"


def alive_nodes(left_out: Counter[str] | None = None) -> list[Node]:
    """The total resources of each node that is alive, without the GPUs that are `left_out`, by node."""
    nodes = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    for name, count in (left_out or {}).items():
        if name in nodes:
            nodes[name]["GPU"] -= count
    return list(nodes.values())


def missing(requests: Iterable[Request], nodes: list[Node]) -> str | None:
    """Why the nodes, even idle, cannot hold one of `requests`; None if they can hold each by itself."""
    for request in requests:
        room = sum(request.room(node) for node in nodes)
        if room < request.count:
            return f"the cluster has no node for {request}: {_described(request, nodes, room)}"
    return None


def _described(request: Request, nodes: list[Node], room: int) -> str:
    if not nodes:
        return "it has no nodes"
    if room:
        return f"there is room for {room}"
    names = list(request.each)
    # The node that has most of what is asked.
    best = max(nodes, key=lambda node: sum(min(node.get(name, 0.0) / request.each[name], 1.0) for name in names))
    has = ", ".join(f"{best.get(name, 0.0):g} {name}" for name in names)
    if not best.get("CPU"):
        # A head may have 0 on purpose. Without the truncation the quota of this container shows, if it is why.
        quota = get_num_cpus(override_docker_cpu_warning=True, truncate=False)
        if quota < 1:
            has += f" (Ray rounds the CPU quota of this container, {quota:g}, down to whole cores)"
    return f"of {len(nodes)} node{'s' if len(nodes) > 1 else ''}, the nearest to it has {has}"


def crowded(actor: Request, task: Request, nodes: list[Node]) -> int | None:
    """The most actors that certainly leave room for a task; None if `actor.count` of them do.

    Ray places actors as it likes, and they stay. A node is full when no task fits beside its actors.
    """
    to_fill = 0
    for node in nodes:
        if not task.room(node):
            continue
        num_full = math.floor((node["CPU"] - task.cpus) / actor.cpus + 1e-9) + 1
        if num_full > actor.room(node):
            return None
        to_fill += num_full
    return to_fill - 1 if actor.count >= to_fill else None


class DeviceTime:
    """How many devices a run holds over time: as many as fit the nodes, at most `most`.

    Spot machines come and go, and the cluster may never hold `most`. Times are those of `time.monotonic`.
    """

    def __init__(self, actor: Request, most: int, since: float, nodes: list[Node]) -> None:
        self._actor = actor
        self._most = most
        self._seconds = 0.0
        self._since = since
        self._now = self.peak = self._room(nodes)

    def _room(self, nodes: list[Node]) -> int:
        return min(self._most, sum(self._actor.room(node) for node in nodes))

    def look(self, nodes: list[Node], now: float) -> None:
        """Count with these nodes from `now` on."""
        self._seconds = self.seconds(now)
        self._since = now
        self._now = self._room(nodes)
        self.peak = max(self.peak, self._now)

    def seconds(self, until: float) -> float:
        """Device-seconds from `since`, the start, to `until`."""
        return self._seconds + self._now * (until - self._since)


class NodeWatch:
    """Ends a flow if a stage has had no node for `wait_s` seconds: Ray itself would wait for ever.

    It calls `say` with the reason of a wait, at once and every minute, and keeps `devices` up to date. `left_out`
    counts the GPUs that no actor gets, by node.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        wait_s: float,
        say: Callable[[str], object],
        devices: DeviceTime,
        left_out: Counter[str],
    ) -> None:
        # One worker of each stage is enough to go on.
        self._requests = [replace(request, count=1) for request in requests]
        self._wait_s = wait_s
        self._say = say
        self._devices = devices
        self._left_out = left_out
        self._looked = self._said = -math.inf
        self._since: float | None = None

    def check(self) -> None:
        """Look at the nodes, if it is time to.

        Raises:
            ClusterError: a stage has had no node for too long.
        """
        now = time.monotonic()
        if now - self._looked < min(_LOOK_EVERY_S, self._wait_s / 4):
            return
        self._looked = now
        nodes = alive_nodes(self._left_out)
        self._devices.look(nodes, now)
        lacking = missing(self._requests, nodes)
        if lacking is None:
            if self._since is not None:
                self._say("no longer: the nodes are there")
            self._since = None
            return
        self._since = now if self._since is None else self._since
        waited_s = now - self._since
        if waited_s >= self._wait_s:
            raise ClusterError(f"{lacking}; waited {waited_s:.0f} s for one")
        if now - self._said >= SAY_EVERY_S:
            self._said = now
            self._say(f"for nodes, {self._wait_s - waited_s:.0f} s more: {lacking}")


class StallWatch:
    """Says what the cluster has free when no part was stored for `quiet_s` seconds, and then every minute.

    Ray reports no error when actors of two jobs hold all CPUs and neither can read, or when a node above Ray's memory
    threshold ends tasks again and again. Ray Data itself ends a flow in which nothing moves
    (`execution_no_progress_timeout_s`).
    """

    def __init__(self, say: Callable[[str], object], quiet_s: float = 300.0) -> None:
        self._say = say
        self._quiet_s = quiet_s
        self._since = time.monotonic()
        self._said = -math.inf

    def stored(self) -> None:
        """A part was stored."""
        self._since = time.monotonic()

    def check(self) -> None:
        """Say how long nothing was stored, if it is time to."""
        now = time.monotonic()
        if now - self._since < self._quiet_s or now - self._said < SAY_EVERY_S:
            return
        self._said = now
        total, free = ray.cluster_resources(), ray.available_resources()
        amounts = [
            f"{free.get(name, 0.0):g} of {total[name]:g} {name}s" for name in ("CPU", "GPU") if total.get(name)
        ]
        self._say(
            f"for a part to be stored, none was for {format_duration(now - self._since)}; of the cluster are free "
            f"{' and '.join(amounts)}: `ray status` tells who holds the rest, and `ray list tasks` what fails"
        )
