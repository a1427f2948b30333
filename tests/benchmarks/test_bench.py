"""The benchmark: its shards, its way to a rate, and a run of every case in small."""

from __future__ import annotations

import io
import json
import math
import os
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import bench, stages
from benchmarks import runs as bench_runs
from benchmarks.runs import BenchError, Settings, Window, steady
from benchmarks.shards import PHOTO_BYTES, PHOTO_SIZE, photo_shards, tiny_shards
from shard_embedder.jobs import embed
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import InputError
from shard_embedder.pipeline.core.schema import IMAGE, IMAGE_ID, part_rows
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.shards.find import find_shards
from shard_embedder.pipeline.shards.samples import SampleReader
from tests.conftest import encode, photo, write_tar


def images_in(folder: Path) -> dict[str, bytes]:
    """Every image that the job would read below a folder, by id."""
    pending = make_plan(find_shards([str(folder)]).shards, str(folder / "none")).pending
    reader = SampleReader(Config(input=(str(folder),), output="none"))
    images: dict[str, bytes] = {}
    for shard in pending:
        for table in reader.parts(shard):
            for values, samples in part_rows(table):
                assert values["fault"] is None
                ids, data = samples.field(IMAGE_ID).to_pylist(), samples.field(IMAGE).to_pylist()
                images |= dict(zip(ids, data, strict=True))
    return images


@pytest.mark.slow
def test_photos_have_the_size_of_imagenet_and_are_the_same_each_time(tmp_path: Path) -> None:
    made = photo_shards(tmp_path / "a", 10, 4)
    images = images_in(tmp_path / "a")
    assert len(images) == 10
    assert all(Image.open(io.BytesIO(data)).size == PHOTO_SIZE for data in images.values())
    assert made["mean_bytes"] == pytest.approx(PHOTO_BYTES, rel=0.05)
    assert photo_shards(tmp_path / "b", 10, 4) == made
    assert images_in(tmp_path / "b") == images


def test_shards_that_are_there_are_not_made_again_and_strange_folders_not_touched(tmp_path: Path) -> None:
    made = tiny_shards(tmp_path / "tiny", 3)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()}
    assert tiny_shards(tmp_path / "tiny", 3) == made
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "tiny").iterdir()} == first
    assert len(images_in(tmp_path / "tiny")) == 30
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="must be empty"):
        tiny_shards(tmp_path / "mine", 3)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_steady_state_begins_after_the_first_fifth_and_blocks_count_when_they_are_whole() -> None:
    # Start-up, then a block of two parts each 2 s; the parts of a block lie 10 ms apart.
    parts = [(100 + 2 * block + 0.01 * part, 10) for block in range(10) for part in range(2)]
    window = steady(reversed(parts))
    assert (window.num_before, window.num_images) == (40, 160)
    assert (window.begin, window.end) == pytest.approx((102.01, 118.01))
    assert window.rate() == pytest.approx(10.0)


def test_images_decoded_before_the_window_count_as_what_was_left_to_do() -> None:
    window = Window(begin=0.0, end=10.0, num_before=50, num_images=100)
    # Half of an image's time is decoding, and 40 were decoded before: 80 images' worth of work in 10 s.
    assert window.rate(40, 0.5) == pytest.approx(8.0)
    assert bench_runs.done_before([[0, 10], [10, 20], [20, 30]], 15.0, 30) == pytest.approx(15.0)


def test_rows_that_say_when_they_were_embedded_count_by_that_and_not_by_their_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["a", "b", "c"], "embedded_at": [5.0, 5.0, 7.0]}), tmp_path / "0.parquet")
    assert sorted(bench_runs.embedded_batches(tmp_path)) == [(5.0, 2), (7.0, 1)]
    pq.write_table(pa.table({"image_id": ["a"]}), tmp_path / "0.parquet")
    assert bench_runs.embedded_batches(tmp_path) == []
    assert [rows for _, rows in bench_runs.stored_parts(tmp_path)] == [1]


@pytest.mark.parametrize("parts", [[], [(1.0, 10)], [(1.0, 10), (1.0, 10)]])
def test_one_event_is_no_steady_state(parts: list[tuple[float, int]]) -> None:
    with pytest.raises(BenchError):
        steady(parts)


def test_the_ceiling_is_of_core_seconds_on_cpu_and_of_the_slower_on_a_gpu() -> None:
    alone = {
        "read_images_per_s": 1000.0,
        "decode_all_images_per_s": 1000.0,
        "model_images_per_s": 100.0,
        "write_images_per_s": 1000.0,
    }
    # 0.5 + 1 + 10 + 0.5 ms an image with two cores.
    on_cpu = bench_runs.ceiling(alone, settings())
    assert on_cpu["ceiling_images_per_s"] == pytest.approx(1000 / 12)
    assert on_cpu["ceiling_decode_share"] == pytest.approx(1.5 / 12)
    assert bench_runs.ceiling(alone, settings(device="cuda"))["ceiling_images_per_s"] == pytest.approx(100)
    fast = {**alone, "model_images_per_s": 5000.0}
    assert bench_runs.ceiling(fast, settings(device="cuda"))["ceiling_images_per_s"] == pytest.approx(1000 / 1.5)
    # Its JPEGs are decoded there, too, so that no core holds it up.
    decodes = settings(device="cuda", decode="gpu:0.9")
    assert bench_runs.ceiling(fast, decodes)["ceiling_images_per_s"] == pytest.approx(5000)


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "shards": "in", "tiny": "in", "scratch": "out", "backbone": "resnet18", "image_size": 64, "device": "cpu",
        "precision": "auto", "decode": "cpu", "cores": 2, "stage_images": 32, "large_megapixels": 1, "plan_shards": 1,
        "part_rows": 1024, "sized": (),
    }  # fmt: skip
    return Settings(**{**values, **changes})


def test_a_goal_is_judged_by_the_median_of_ratios_and_not_where_its_case_is_sized_down() -> None:
    repeats = [
        {"job_images_per_s": 10.0, "ceiling_images_per_s": 10.0, "plan_s": 1.0},
        {"job_images_per_s": 8.0, "ceiling_images_per_s": 10.0, "plan_s": 1.0},
        {"job_images_per_s": 30.0, "ceiling_images_per_s": 20.0, "plan_s": 1.0},
    ]
    of_ceiling, plan = bench.judge(repeats, "resnet18", {"plan"})
    assert (of_ceiling["median"], of_ceiling["min"], of_ceiling["max"]) == (1.0, 0.8, 1.5)
    assert of_ceiling["holds"] is True
    assert (plan["limit"], plan["holds"]) == (None, None)


def test_an_unknown_case_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["stages", "bnechmark"])
    assert "no-model" in capsys.readouterr().err
    assert bench.main(["sizing", "--sized", "resnet18", "resnet5"]) == 2
    assert "unknown backbone 'resnet5'" in capsys.readouterr().err
    assert bench.main(["gpu-job"]) == 2
    assert "gpu-job needs --device cuda, got cpu" in capsys.readouterr().err


@pytest.mark.slow
def test_what_fails_is_named_and_loses_nothing_of_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "bench.json"
    so_far: list[dict[str, Any]] = []

    def look(settings: Settings, before: Any) -> dict[str, float]:
        so_far.append(json.loads(output.read_text()))
        return {"looks": 1.0}

    monkeypatch.setitem(bench.MEASUREMENTS, "scaling", look)
    # The backbone is none of torchvision's: the decoder has nothing to be compared with.
    code = bench.main([
        "decode", "plan", "scaling", "--backbone", "resnet50_stride1", "--images", "8", "--plan-shards", "500",
        "--repeats", "1", "--output", str(output),
    ])  # fmt: skip
    assert code == 4
    assert "FAILED: decode" in capsys.readouterr().out.splitlines()
    result = json.loads(output.read_text())
    assert list(result["failed"]) == ["decode"]
    # A measurement is made in a process of its own, whose last words are told.
    assert " -m benchmarks.stages decode " in result["failed"]["decode"]
    assert "backbone must be one of torchvision's, got 'resnet50_stride1'" in result["failed"]["decode"]
    assert [one["text"] for one in result["goals"]] == ["plan, s", "plan, peak MiB"]
    # What was measured is there before the next measurement ends, or does not.
    assert so_far[0]["figures"]["plan_s"]["median"] > 0
    assert result["figures"] == {**so_far[0]["figures"], "looks": {"median": 1.0, "min": 1.0, "max": 1.0}}


def test_decoding_on_the_device_is_measured(tmp_path: Path) -> None:
    photo_shards(tmp_path / "in", 8, 4)
    found = stages.device_decode(settings(shards=str(tmp_path / "in"), scratch=str(tmp_path / "out"), stage_images=8))
    assert found["device_decode_images_per_s"] > 0
    assert found["device_decode_forward_images_per_s"] > 0


_run_module, _run_command = bench_runs.run_module, bench_runs.run_command


def run_here(module: str, name: str, settings: Settings) -> tuple[dict[str, Any], float]:
    """A measurement in this process, which has imported all that it needs; what it gives survives JSON."""
    # It sets its process's environment, and all later tests would look for their bucket at its server.
    if module == "benchmarks.plan":
        found, seconds = _run_module(module, name, settings)
        assert found["plan_s"] < seconds
        return found, seconds
    start = time.time()
    found = getattr(import_module(module), name)(settings)
    return json.loads(json.dumps(found)), time.time() - start


def command_here(command: list[str], **changes: str) -> str:
    """The job in this process; any other command as it is. Of `memory` the job is a process all the same."""
    if command[1].endswith("embed.py"):
        assert embed.main(command[2:]) == 0
        return ""
    if command[-2:-1] == ["-c"]:
        # Two processes start Ray, neither with torch.
        command = [*command[:-1], command[-1].replace("import torch, ", "import ")]
    if "benchmarks.baselines.dataloader" in command:
        # A rate needs two files.
        command = [*command, "--rows-per-file", "32"]
    return _run_command(command, **changes)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session", "one_thread")
def test_a_small_run_measures_every_case(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_runs, "run_module", run_here)
    monkeypatch.setattr(bench_runs, "run_command", command_here)
    # Where it is, the run that fills the caches has been.
    (tmp_path / "scratch" / "startup").mkdir(parents=True)
    code = bench.main([
        "stages", "decode", "large", "job", "baselines", "startup", "memory", "tiny", "plan", "sizing",
        "--sized", "squeezenet1_1", "--backbone", "resnet18", "--image-size", "64", "--images", "64",
        "--images-a-shard", "32", "--stage-images", "32", "--large-megapixels", "1", "--tiny-shards", "24",
        "--plan-shards", "2000", "--repeats", "1", "--output", str(tmp_path / "bench.json"),
        "--scratch", str(tmp_path / "scratch"),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.out + printed.err
    result = json.loads((tmp_path / "bench.json").read_text())
    fields = "format date command cases hardware versions settings shards failed repeats figures goals"
    assert set(result) == set(fields.split())
    assert result["hardware"]["cores"] >= 1
    assert set(result["versions"]) >= {"python", "torch", "torchvision", "ray", "pillow", "pyarrow"}
    assert [one["text"] for one in result["goals"]] == [
        goal.text for goal in bench.GOALS if goal.case not in ("scaling", "no-model")
    ]
    for one in result["goals"]:
        # The overhead is a difference, which noise may turn; what is spilled is to be nothing.
        assert one["median"] > 0 or one["case"] in ("tiny", "memory"), one
    assert all(result["figures"][f"memory_{stage}_mib"]["median"] > 50 for stage in ("read", "decode", "embed"))
    assert all(math.isfinite(spread["median"]) for spread in result["figures"].values())
    for name in ("sizing_squeezenet1_1_decode_cores", "decode_all_core_ms_per_image"):
        assert result["figures"][name]["median"] > 0
    for name in ("dataloader", "ray_data"):
        assert result["figures"][f"{name}_min_cosine"]["min"] >= 0.999
    assert "Goals" in printed.out


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_flow_without_a_model_has_a_rate_and_a_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_runs, "run_module", run_here)
    # So large that no two shards fit one read task, and some are decoded after the first part was counted, whose
    # worker takes a second to start.
    image = encode(photo(0, (4000, 3000))).ljust(2_200_000, b"\0")
    shard = write_tar(tmp_path / "in" / "s-00.tar", [(f"{i}.jpg", image) for i in range(8)])
    for number in range(1, 12):
        os.link(shard, shard.with_name(f"s-{number:02d}.tar"))
    found = bench_runs.no_model(settings(shards=str(tmp_path / "in"), scratch=str(tmp_path / "scratch")), {})
    alone = {"decode_all_images_per_s": 1.0, "decode_all_core_ms_per_image": 1.0}
    judged = bench.judge([{**found, **alone}], "resnet18", set())
    assert [one["text"] for one in judged] == [goal.text for goal in bench.GOALS if goal.case == "no-model"]
    assert all(one["median"] > 0 for one in judged)


def test_every_measurement_has_a_case() -> None:
    assert {name for names, _ in bench.CASES.values() for name in names} == bench.MEASUREMENTS.keys()
    assert {goal.case for goal in bench.GOALS} <= bench.CASES.keys()
