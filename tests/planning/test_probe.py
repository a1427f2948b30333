"""What is tried on the device of an actor: the precisions that it has, and batches of the network that will run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.embedding.embedder import Source
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights
from shard_embedder.pipeline.planning.batch_size import ladder
from shard_embedder.pipeline.planning.engine import Trial
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.probe import gpu_precisions, try_out
from shard_embedder.pipeline.shards.find import Pending
from tests.conftest import write_shards

K80, P100, V100, T4, A100, L4, H100 = (3, 7), (6, 0), (7, 0), (7, 5), (8, 0), (8, 9), (9, 0)


@pytest.mark.parametrize(
    ("capabilities", "precisions"),
    [
        ([A100], ("bf16", "fp16")),
        ([H100, L4], ("bf16", "fp16")),
        ([V100], ("fp16",)),
        ([H100, T4], ("fp16",)),
        ([T4, P100], ()),
        ([H100, K80], ()),
        ([], ()),
    ],
)
def test_reduced_precisions_are_those_that_every_gpu_has(
    capabilities: list[tuple[int, int]], precisions: tuple[str, ...]
) -> None:
    assert gpu_precisions(capabilities) == precisions


@dataclass(frozen=True)
class CpuInPlaceOfGpu:
    """Runners of `source` on the CPU, whatever the placement, which is noted. Compiling would take a minute."""

    has_own_batch_size: ClassVar[bool] = False

    source: Source
    placements: list[Placement] = field(default_factory=list)

    def runner(self, network: Network, placement: Placement) -> Any:
        self.placements.append(placement)
        return self.source.runner(network, replace(placement, device="cpu", compiled=False))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_precision_and_batch_size_are_tried_where_the_work_is_done_and_on_what_will_run(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=3)
    settings = {"backbone": "squeezenet1_1", "weights": "random:3", "image_size": "64", "part_rows": 32}
    job = prepare_job(parse({"input": [str(tmp_path / "in")], "output": str(tmp_path / "out"), **settings}))
    source = CpuInPlaceOfGpu(SharedWeights.of(job.weights))
    placement = Placement(device="cuda", compiled=True)
    images = Trial(job, [Pending(*shard) for shard in job.shards]).images
    sizes = ladder(32, (64, 64), "cuda", compiled=True)
    precision, rates = try_out(source, job.network, placement, images, ("bf16", "fp16"), sizes, 32)
    assert precision == "bf16"
    assert set(rates) == set(sizes)
    assert {one.device for one in source.placements} == {"cuda"}
    assert [(one.precision, one.compiled) for one in source.placements] == [
        ("fp32", False), ("bf16", False), ("bf16", True),
    ]  # fmt: skip
    # A precision that was asked for is not tried.
    source.placements.clear()
    assert try_out(source, job.network, placement, images, (), [], 32) == ("fp32", {})
    assert source.placements == []
