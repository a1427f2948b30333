"""What each stage takes of a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

import ray

from pipeline.config import Config
from pipeline.errors import ClusterError
from pipeline.schema import STAGE_DECODE, STAGE_EMBED, STAGE_READ, STAGE_WRITE
from pipeline.torch_runner import cpu_has_bf16

# Cores that one CPU actor uses; more actors scale better than more threads.
_CORES_PER_ACTOR = 16
# What an actor reserves, not what it uses: where a node is lost, its actors start again on those that are left,
# and must leave decoding room beside them.
_ACTOR_CPUS = 0.3
# GPUs older than these compute fp16 fast and bf16 slowly or not at all.
_FP16_GPUS = ("P4", "P100", "V100", "T4", "K80")


@dataclass(frozen=True)
class Resources:
    """Requests of the stages. No two are equal, or Ray Data would fuse their stages into one."""

    device: str
    accelerators: tuple[str, ...]
    num_actors: tuple[int, int]
    actor_cpus: float
    actor_gpus: float
    num_threads: int | None
    batch_size: int | None  # None: the engine's own
    total_cpus: float
    decode_cpus: float
    read_cpus: float = 0.1
    write_cpus: float = 0.2

    @property
    def slots(self) -> dict[str, float]:
        """How many workers of each stage can be busy at once."""
        return {
            STAGE_READ: self.total_cpus / self.read_cpus,
            STAGE_DECODE: self.total_cpus,
            STAGE_EMBED: float(self.num_actors[1]),
            STAGE_WRITE: self.total_cpus / self.write_cpus,
        }

    def fast_precisions(self) -> tuple[str, ...]:
        """The reduced precisions that the device computes faster than fp32, the fastest first."""
        if self.device == "cuda":
            return ("fp16",) if any(name in _FP16_GPUS for name in self.accelerators) else ("bf16", "fp16")
        return ("bf16",) if cpu_has_bf16() else ()


def plan_resources(config: Config) -> Resources:
    """Divide the cluster that Ray is connected to.

    Raises:
        ClusterError: `device` is cuda and the cluster has no GPU.
    """
    cluster = ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 1.0), int(cluster.get("GPU", 0))
    # On a small machine one decoder more than cores keeps them busy while another waits for its input.
    decode_cpus = 0.4 if min(_node_cpus(), default=cpus) < 4 else 0.99
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    accelerators = tuple(
        key.removeprefix("accelerator_type:") for key in cluster if key.startswith("accelerator_type:")
    )
    if device == "cuda":
        if not gpus:
            raise ClusterError(f"device is cuda, and the Ray cluster has no GPU: it has {int(cpus)} CPUs")
        num_actors = config.actors or (gpus, gpus)
        return Resources(
            device,
            accelerators,
            num_actors,
            _ACTOR_CPUS,
            1.0,
            None,
            config.batch_size,
            cpus,
            decode_cpus,
        )
    default = sum(max(1, round(node / _CORES_PER_ACTOR)) for node in _node_cpus()) or 1
    num_actors = config.actors or (default, default)
    num_threads = max(1, int(cpus // num_actors[1]))
    return Resources(
        device=device,
        accelerators=accelerators,
        num_actors=num_actors,
        actor_cpus=_ACTOR_CPUS,
        actor_gpus=0.0,
        num_threads=num_threads,
        batch_size=config.batch_size,
        total_cpus=cpus,
        decode_cpus=decode_cpus,
    )


def _node_cpus() -> list[float]:
    """CPUs of each node that has any."""
    nodes = (node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    return [cpus for cpus in nodes if cpus]
