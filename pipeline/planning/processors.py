"""What the processors of a cluster compute, which may differ from the driver's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from socket import gethostname
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.planning.cpu import cpu_has_bf16

# A worker must start on each node within this time.
_ANSWER_S = 120.0


@dataclass(frozen=True)
class Processor:
    """A node's processor: whether it is fast in bf16, and the precisions of OpenVINO there, none if not installed."""

    host: str
    has_fast_bf16: bool
    openvino: tuple[str, ...]


def look_at_processor() -> Processor:
    """The processor of this machine."""
    try:
        from shard_embedder.pipeline.embedding.openvino_runner import computes  # noqa: PLC0415  it has no wheel for each machine
    except ImportError:
        return Processor(gethostname(), cpu_has_bf16(), ())
    return Processor(
        gethostname(), cpu_has_bf16(), tuple(name for name in ("fp32", "bf16", "fp16") if computes(name))
    )


def processors_of(resource: str | None = None) -> list[Processor]:
    """The processors of the nodes that may have actors: of those with `resource`, if that is given.

    Raises:
        ClusterError: a node does not answer.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    nodes = [node for node in nodes if resource is None or resource in node["Resources"]]
    if len(nodes) == 1 and nodes[0]["NodeID"] == ray.get_runtime_context().get_node_id():
        return [look_at_processor()]
    task: Any = ray.remote(num_cpus=0, max_retries=1)(look_at_processor)
    asked = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
        for node in nodes
    ]
    answered, silent = ray.wait(asked, num_returns=len(asked), timeout=_ANSWER_S)
    if silent:
        hosts = ", ".join(
            node["NodeManagerHostname"] for node, ref in zip(nodes, asked, strict=True) if ref in silent
        )
        raise ClusterError(f"each node must start a worker within {_ANSWER_S:.0f} s, got no answer from {hosts}")
    return list(ray.get(answered))


def fast_precisions(processors: Sequence[Processor]) -> tuple[str, ...]:
    """The reduced precisions that every one of the processors computes faster than fp32."""
    return ("bf16",) if processors and all(processor.has_fast_bf16 for processor in processors) else ()


def without_openvino(processors: Sequence[Processor], precision: str) -> str | None:
    """Why OpenVINO cannot compute in `precision` on all of the processors; None if it can. `auto` means fp32."""
    wanted = "fp32" if precision == "auto" else precision
    lacking = [processor for processor in processors if wanted not in processor.openvino]
    if not lacking:
        return None
    missing = [processor.host for processor in lacking if not processor.openvino]
    if missing:
        return f"OpenVINO is not installed on {', '.join(missing[:4])}"
    return f"OpenVINO computes no {wanted} on the processor of {', '.join(p.host for p in lacking[:4])}"
