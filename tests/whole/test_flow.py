"""The whole flow on Ray: what goes in, what comes out, and what is done again."""

from __future__ import annotations

import itertools
import json
import threading
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.data import DataContext

from shard_embedder.jobs.embed import main
from shard_embedder.pipeline import backbones
from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights
from shard_embedder.pipeline.flow import make_flow
from shard_embedder.pipeline.planning.engine import Engine, choose_engine
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.planning.resources import plan_resources
from shard_embedder.pipeline.planning.stored_source import StoredSource
from shard_embedder.pipeline.run.in_process import InProcess
from shard_embedder.pipeline.run.on_ray import OnRay, watched
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.run.tally import Tally
from tests.conftest import sample_members, write_shards, write_tar
from tests.outputs import SETTINGS, UNHEARD, job_for, rows, stored

pytestmark = pytest.mark.usefixtures("ray_session")


SHARD_SETTINGS = {"part_rows": 3, "keep": ["cls", "json:caption"], "batch_size": 4, "device": "cpu"}


@dataclass(frozen=True)
class Made:
    """One run on Ray, of three shards of 7 photos and one of a broken image and a photo."""

    shards: Path
    output: Path
    report: dict[str, Any]
    engine: Engine
    # Of each receipt, how many parts there were, and whether as many were stored.
    seen: list[tuple[int, bool]]


@pytest.fixture(scope="module")
def made(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    shards, output = write_shards(folder / "in", num_shards=3, samples_each=7), folder / "out"
    write_tar(shards / "bad.tar", [("a.jpg", b"no image"), *sample_members("b", 1)])
    engines: list[Engine] = []
    seen: list[tuple[int, bool]] = []

    def choose(*asked: Any) -> Engine:
        engines.append(choose_engine(*asked))
        return engines[-1]

    def on_part(tally: Tally) -> None:
        seen.append((tally.num_parts, len(stored(output / "embeddings")) >= tally.num_parts))

    job = job_for(shards, output, **SHARD_SETTINGS)
    watcher = replace(UNHEARD, on_part=on_part)
    report = run(job, make_plan(job.shards, job.config.output), watcher, OnRay(choose))
    return Made(shards, output, report, engines[0], seen)


def test_every_sample_becomes_one_row_in_the_order_of_its_shard(made: Made) -> None:
    report, found = made.report, rows(made.output)
    assert report["balanced"]
    assert (report["samples"], report["embedded"], report["errors"]) == (23, 22, 1)
    assert [row["image_id"] for row in found] == ["b", *(f"{s:03d}-{i:04d}" for s in range(3) for i in range(7))]
    assert [row["sample_index"] for row in found] == [1, *range(7), *range(7), *range(7)]
    assert [row["caption"] for row in found] == ["number 1", *(f"number {i}" for i in range(21))]
    assert [row["cls"] for row in found] == [1, *(i % 3 for i in range(21))]
    assert len(stored(made.output / "embeddings")) == 10
    assert sum(name.endswith("-last.parquet") for name in stored(made.output / "embeddings")) == 4
    (error,) = stored(made.output / "errors")
    assert error.startswith("bad.")


def test_a_full_disk_before_the_first_pass_ends_nothing(made: Made, tmp_path: Path) -> None:
    """As where OpenVINO had no place for what it writes: what is lost in a pass is run again."""
    job = job_for(write_shards(tmp_path / "in", num_shards=1, samples_each=2), tmp_path / "out")
    passes: list[int] = []

    def lose_first(tally: Tally) -> None:
        if len(passes) == 1:
            for path in (tmp_path / "out" / "embeddings").glob("*.parquet"):
                path.unlink()

    engine = replace(made.engine, note="[Errno 28] No space left on device")
    watcher = Watcher(lambda job, resources: None, lambda number, *_: passes.append(number), lose_first)
    report = run(job, make_plan(job.shards, job.config.output), watcher, OnRay(lambda *_: engine))
    assert report["balanced"]
    assert passes == [1, 2]
    assert report["problems"] == ["slower than it could be: [Errno 28] No space left on device"]
    assert not (tmp_path / "out" / "errors").exists()


def test_embeddings_are_those_of_the_backbone_on_the_pixels(made: Made, tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from torchvision.models import SqueezeNet1_1_Weights

    backbone = backbones.build_backbone("squeezenet1_1", "random:3")
    preset = SqueezeNet1_1_Weights.DEFAULT.transforms(resize_size=round(64 * 256 / 224), crop_size=64)
    found = [row["embedding"] for row in rows(made.output) if row["shard"] == "photos-00000"]
    assert len(found) == 7
    for i, vector in enumerate(map(np.array, found)):
        (tmp_path / "image.jpg").write_bytes(dict(sample_members("k", i))["k.jpg"])
        with torch.inference_mode():
            expected = backbone(preset(Image.open(tmp_path / "image.jpg"))[None])[0].numpy()
        cosine = float(vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected))
        assert cosine >= 0.9999


def test_output_on_s3_equals_output_on_disk(made: Made, tmp_path: Path, s3_server: Any, s3_url: str) -> None:
    fs = s3_server.filesystem()
    fs.put(str(made.shards), f"{s3_url}/in", recursive=True)
    job = job_for(f"{s3_url}/in", f"{s3_url}/out", **SHARD_SETTINGS)
    plan = make_plan(job.shards, job.config.output)
    report = run(job, plan, UNHEARD, OnRay(lambda *_: made.engine))
    assert report["balanced"]
    fs.get(f"{s3_url}/out/", str(tmp_path / "from-s3"), recursive=True)
    for folder in ("embeddings", "errors"):
        assert rows(tmp_path / "from-s3", folder) == rows(made.output, folder)
    assert json.loads((tmp_path / "from-s3" / "report.json").read_text())["samples"] == 23


def test_no_two_stages_are_fused_into_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_for(write_shards(tmp_path / "in"), tmp_path / "out").with_engine("torch", "fp32")
    plan = make_plan(job.shards, job.config.output)
    resources = plan_resources(job.config)
    make_flow(plan.pending, job, StoredSource.put(SharedWeights.of(job.weights)), resources).explain()
    physical = capsys.readouterr().out.split("Physical Plan (Optimized)")[-1]
    for name in ("read", "decode", "Embedder", "write"):
        assert any(line.count("MapBatches") == 1 and name in line for line in physical.splitlines()), physical


def test_receipts_tell_of_every_part_as_it_is_stored(made: Made) -> None:
    assert made.seen == [(number, True) for number in range(1, 11)]


def test_a_run_in_one_process_stores_the_same_bytes(made: Made, tmp_path: Path) -> None:
    job = job_for(made.shards, tmp_path / "out", **SHARD_SETTINGS)
    report = run(job, make_plan(job.shards, job.config.output), UNHEARD, InProcess())
    assert (report["balanced"], report["embedded"], report["errors"]) == (True, 22, 1)
    for folder in ("embeddings", "errors"):
        assert stored(tmp_path / "out" / folder) == stored(made.output / folder)


def test_a_flow_ends_where_it_stands_when_it_is_watched_and_something_is_wrong(made: Made, tmp_path: Path) -> None:
    """By what only Ray Data's own executor can do: this fails where that changes."""
    shards = write_shards(tmp_path / "in", num_shards=4, samples_each=2)
    job = job_for(shards, tmp_path / "out", part_rows=1)
    with closing(OnRay(lambda *_: made.engine)) as executor:
        prepared = executor.prepare(job, make_plan(job.shards, job.config.output).pending, time.monotonic(), print)
    # No node has that, and Ray waits for one for as long as it takes.
    nowhere = replace(prepared.resources, actor_resource="no-such-node")
    pending = make_plan(job.shards, job.config.output).pending
    flow = make_flow(pending, prepared.job, prepared.source, nowhere)
    looks = itertools.count()

    def check() -> None:
        if next(looks) == 3:
            raise ClusterError("no node came")

    with pytest.raises(ClusterError, match="no node came"):
        list(watched(flow, check))
    assert "receipts" not in {thread.name for thread in threading.enumerate()}


def test_the_command_in_a_program_leaves_its_ray_and_its_settings_as_they_were(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    class Counter:
        def __init__(self) -> None:
            self.count = 0

        def add(self) -> int:
            self.count += 1
            return self.count

    counter = Counter.remote()
    assert ray.get(counter.add.remote()) == 1
    context = DataContext.get_current()
    context.op_resource_reservation_ratio = 0.321
    before = {name: repr(value) for name, value in vars(context).items()}
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=3)
    arguments = ["--input", str(shards), "--output", str(tmp_path / "out"), "--device", "cpu"]
    for name, value in SETTINGS.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    codes: list[int] = []
    # Not the main thread, which alone may hear signals.
    runner = threading.Thread(target=lambda: codes.append(main(arguments)))
    runner.start()
    runner.join()
    assert codes == [0]
    assert len(rows(tmp_path / "out")) == 3
    assert ray.is_initialized()
    assert ray.get(counter.add.remote()) == 2
    assert {name: repr(value) for name, value in vars(DataContext.get_current()).items()} == before
