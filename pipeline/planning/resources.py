"""What each stage takes of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.util import placement_group, remove_placement_group

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.core.schema import STAGE_DECODE, STAGE_EMBED, STAGE_READ, STAGE_WRITE
from shard_embedder.pipeline.decoding.rules import image_memory
from shard_embedder.pipeline.embedding.network import Placement
from shard_embedder.pipeline.planning.nodes import SAY_EVERY_S, Node, Request, alive_nodes, crowded, missing

# Cores that one CPU actor uses; more actors scale better than more threads.
_CORES_PER_ACTOR = 16
# CPUs that an actor counts for, and reserves on a large cluster; it uses more. When a node is lost, its actors start
# again on the nodes that are left, and must leave room for decoding there.
_ACTOR_CPUS = 0.3
# Of the cluster's CPUs, what the actors of one job reserve at most. They keep it to the end, and Ray gives what is
# left to whoever asks first: the actors of jobs that start at the same moment must leave all of them room to read.
_ACTORS_SHARE = 1 / 8
# Memory that a read task reserves. It limits how many run at once: with more, finished parts fill the object store
# and decoding stalls (benchmarks/README.md). On a machine with 4 GB a core this allows one for each core.
_READ_MEMORY = 5 * 2**29
# Memory of a decode task without the image: a worker, and the process that decodes for it.
_DECODER_MEMORY = 2**28
# Looks come soon at first: what a job that has just ended held is free in a moment.
_FIRST_LOOK_S = 0.1
_LOOK_EVERY_S = 2.0
_SETTLE_S = 10.0


@dataclass(frozen=True)
class Resources:
    """What the stages request. No two requests are equal: Ray Data would fuse their stages into one."""

    device: str
    num_actors: tuple[int, int]
    actor_cpus: float
    actor_gpus: float
    actor_resource: str | None
    num_threads: int | None
    batch_size: int | None  # None: the engine's own
    total_cpus: float
    num_nodes: int
    decode_cpus: float
    read_memory: int | None  # bytes; None if no node reports its memory
    decode_memory: int | None
    num_readers: float  # how many fit the CPUs and the memory
    batch_rates: tuple[tuple[int, float], ...] = ()  # images/s by batch size, where it was measured
    read_cpus: float = 0.25  # with less, many more workers than cores start, and each start takes seconds of a core
    write_cpus: float = 0.2

    @property
    def slots(self) -> dict[str, float]:
        """How many workers of each stage can be busy at once."""
        return {
            STAGE_READ: self.num_readers,
            STAGE_DECODE: self.total_cpus,
            STAGE_EMBED: float(self.num_actors[1]),
            STAGE_WRITE: self.total_cpus / self.write_cpus,
        }

    @property
    def reserved_cpus(self) -> float:
        """CPUs that each actor reserves."""
        # Ray refuses fractions finer than 0.0001.
        return round(min(self.actor_cpus, self.total_cpus * _ACTORS_SHARE / self.num_actors[0]), 4)

    @property
    def requests(self) -> tuple[Request, ...]:
        """What each stage requests of a node; the embed stage counts its fewest actors."""
        return (
            Request(STAGE_EMBED, self.actor_cpus, self.actor_gpus, self.actor_resource, count=self.num_actors[0]),
            Request(STAGE_READ, self.read_cpus),
            Request(STAGE_DECODE, self.decode_cpus),
            Request(STAGE_WRITE, self.write_cpus),
        )

    def placement(self, precision: str, *, compiled: bool = False) -> Placement:
        """Where each actor's network runs."""
        return Placement(
            device=self.device,
            precision=precision,
            batch_size=self.batch_size,
            num_threads=self.num_threads,
            compiled=compiled,
        )


def plan_resources(config: Config, on_wait: Callable[[str], object] = lambda why: None) -> Resources:
    """Divide the cluster that Ray is connected to among the stages.

    If a stage lacks a node, this asks the cluster's autoscaler for one and waits for up to `node_wait_s`. It calls
    `on_wait` with the reason, at once and every minute.

    Raises:
        ClusterError: the cluster lacks what a stage needs.
    """
    deadline = time.monotonic() + (config.node_wait_s or 0)
    resources, lacking = plan_stages(config, alive_nodes())

    def missing_nodes() -> str | None:
        nonlocal resources
        resources, lacking = plan_stages(config, alive_nodes())
        return lacking

    def taken() -> str | None:
        return held_by_others(resources, ray.cluster_resources(), ray.available_resources())

    if lacking is not None:
        with _demand(resources):
            _wait_while(missing_nodes, deadline, config.node_wait_s, on_wait)
    # A job that has just ended frees its resources a moment later.
    _wait_while(taken, max(deadline, time.monotonic() + _SETTLE_S), config.node_wait_s, on_wait)
    return resources


def _wait_while(
    lacking: Callable[[], str | None], deadline: float, wait_s: int | None, on_wait: Callable[[str], object]
) -> None:
    """Wait, and say so, while something is `lacking`. Raises `ClusterError` at the `deadline`."""
    said, pause = -SAY_EVERY_S, _FIRST_LOOK_S
    while (what := lacking()) is not None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise ClusterError(f"{what}; {f'waited {wait_s} s for it' if wait_s else _HINT}")
        if time.monotonic() - said >= SAY_EVERY_S:
            said = time.monotonic()
            on_wait(f"for nodes, {left:.0f} s more: {what}")
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LOOK_EVERY_S)


def held_by_others(resources: Resources, total: Mapping[str, float], free: Mapping[str, float]) -> str | None:
    """Why other jobs leave no room for the actors and one task of each other stage; None if there is room.

    Actors that fill all that is free would keep their own job from reading, for ever and without an error.
    """
    actor, *tasks = resources.requests
    needed = {
        "CPU": actor.count * actor.cpus + max(task.cpus for task in tasks),
        "GPU": actor.count * actor.gpus,
    }
    for name, amount in needed.items():
        if amount > free.get(name, 0.0) + 1e-9:
            return (
                f"the cluster has {free.get(name, 0.0):g} of {total.get(name, 0.0):g} {name}s free, and "
                f"{actor.count} actors with one task of each other stage need {amount:g}: other jobs hold the rest"
            )
    return None


_HINT = "with --node-wait-s the job waits for nodes that are still to come"


@contextmanager
def _demand(resources: Resources) -> Iterator[None]:
    """Reserve what the stages need, so that an autoscaler sees the demand; nothing runs there."""
    bundles = [request.each for request in resources.requests for _ in range(request.count)]
    group = placement_group(bundles, name="embed-nodes")
    try:
        yield
    finally:
        remove_placement_group(group)


def _decode_memory(config: Config, nodes: list[Node], read_memory: int | None) -> int | None:
    """Bytes that a decode task reserves: enough for any image, but no more than each core's share of its node.

    More would leave cores idle for memory that nearly no image needs.
    """
    if read_memory is None:
        return None
    shares = [
        (node["memory"] - read_memory) / max(1.0, node["CPU"])
        for node in nodes
        if node.get("CPU") and node.get("memory")
    ]
    return int(min(_DECODER_MEMORY + image_memory(config.max_pixels), *shares))


def plan_stages(config: Config, nodes: list[Node]) -> tuple[Resources, str | None]:
    """What the stages take of `nodes`, and what the nodes lack for it; None if nothing."""
    cpus = [node["CPU"] for node in nodes if node.get("CPU")]
    # A decode task uses a whole core and requests less. Ray Data keeps shares of the cluster for other stages, and
    # starts the next task only when it looks again, up to ten times a second: with whole cores, a node of 8 decoded
    # on 5. This way there are at least as many tasks as cores, and up to half as many again on large clusters.
    decode_cpus = 0.33 if min(cpus, default=1.0) < 8 else 0.5
    total_cpus = sum(cpus) or 1.0
    memories = [node["memory"] for node in nodes if node.get("CPU") and node.get("memory")]
    read_memory = min(_READ_MEMORY, int(min(memories) // 2)) if memories else None
    decode_memory = _decode_memory(config, nodes, read_memory)
    readers = total_cpus / Resources.read_cpus
    if read_memory is not None:
        readers = min(readers, sum(memory // read_memory for memory in memories))
    # Nodes that may have actors.
    places = [node for node in nodes if config.actor_resource is None or config.actor_resource in node]
    gpus = sum(int(node.get("GPU", 0)) for node in places)
    device = config.device if config.device != "auto" else "cuda" if gpus or config.needs_gpu else "cpu"
    place_cpus = [node["CPU"] for node in places if node.get("CPU")]
    default = gpus if device == "cuda" else sum(max(1, round(cpu / _CORES_PER_ACTOR)) for cpu in place_cpus)
    num_actors = config.actors or (max(1, default), max(1, default))
    resources = Resources(
        device=device,
        num_actors=num_actors,
        actor_cpus=_ACTOR_CPUS,
        actor_gpus=1.0 if device == "cuda" else 0.0,
        actor_resource=config.actor_resource,
        num_threads=None if device == "cuda" else max(1, int(sum(place_cpus) // num_actors[1])),
        batch_size=config.batch_size if isinstance(config.batch_size, int) else None,
        total_cpus=total_cpus,
        num_nodes=len(nodes),
        decode_cpus=decode_cpus,
        read_memory=read_memory,
        decode_memory=decode_memory,
        num_readers=readers,
    )
    lacking = missing(resources.requests, nodes)
    if lacking is not None and config.needs_gpu and not gpus:
        lacking = f"{config.needs_gpu} needs device cuda, and {lacking}"
    if lacking is None:
        actor, _, decode, _ = resources.requests
        most = crowded(actor, decode, nodes)
        if most is not None:
            lacking = (
                f"{actor.count} actors of {actor.cpus:g} CPU may fill every node, which leaves none for {decode}: "
                + (f"at most {most} actors fit" if most else "the nodes need more CPUs")
            )
    return resources, lacking
