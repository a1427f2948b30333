"""What is decided by the processors of a cluster's nodes, and not by the driver's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.planning.engine import choose_engine
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.processors import (
    Processor,
    fast_precisions,
    look_at_processor,
    processors_of,
    without_openvino,
)
from shard_embedder.pipeline.shards.find import Pending
from tests.conftest import write_shards

NEW = Processor("new", True, ("fp32", "bf16"))
OLD = Processor("old", False, ("fp32",))
ARM = Processor("arm", True, ())


def test_a_reduced_precision_is_taken_where_every_node_computes_it_fast() -> None:
    assert fast_precisions([NEW]) == fast_precisions([NEW, ARM]) == ("bf16",)
    assert fast_precisions([NEW, OLD]) == fast_precisions([]) == ()


@pytest.mark.parametrize(
    ("processors", "precision", "reason"),
    [
        ([NEW, OLD], "auto", None),
        ([NEW], "bf16", None),
        ([NEW, OLD], "bf16", "OpenVINO computes no bf16 on the processor of old"),
        ([NEW, ARM], "auto", "OpenVINO is not installed on arm"),
    ],
)
def test_openvino_is_taken_where_every_node_has_it(
    processors: list[Processor], precision: str, reason: str | None
) -> None:
    assert without_openvino(processors, precision) == reason


def test_where_a_node_has_no_openvino_torch_computes_and_says_why(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    settings = {"backbone": "squeezenet1_1", "weights": "random:0", "image_size": "64"}
    job = prepare_job(parse({"input": [str(shards)], "output": str(tmp_path / "out"), **settings}))
    engine = choose_engine(job, [Pending(*job.shards[0])], "cpu", (), "OpenVINO is not installed on arm")
    assert (engine.name, engine.note) == (f"torch {torch.__version__}", "OpenVINO is not installed on arm")


@pytest.mark.usefixtures("ray_session")
def test_a_lone_node_is_this_machine() -> None:
    assert processors_of() == [look_at_processor()]
