"""What is measured from outside: the whole job, the baselines and start-up, each as a process that writes Parquet.

Steady state, the same for all that write parts (`steady`): the parts' modification times and rows. Parts stored
within a moment of each other are one event, since a block of several is written at once. The window begins with
the event by which a fifth of the images is stored, so that start-up and the filling of the pipeline lie before
it, and ends with the last. The rate is the images stored after the window's begin, by its length.

Our job decodes ahead while its backbone is still starting, and images decoded before the window cost nothing
inside it. On CPU, where all stages share the cores, each of them counts only as the part of an image that was
still to be done. How many they are, Ray's own timeline of the decode tasks tells; what part of an image's time
decoding is, the stages alone. The DataLoader reads at most 2 batches a worker ahead, and Ray's pattern what Ray
allows; nothing is subtracted from either, which can only flatter them. Ray's pattern may write all its files at
the end, so its batches carry the time at which they were embedded, and that of writing is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.cores import cores_in_use
from benchmarks.memory import peaks
from benchmarks.shards import photo_shards
from shard_embedder.pipeline.core.config import Config, device_share
from shard_embedder.pipeline.core.errors import PipelineError

ROOT = Path(__file__).resolve().parent.parent
Metrics = dict[str, float | str]
SIZED = ("resnet18", "resnet34", "resnet50", "resnet50_stride1", "resnet101", "resnet152", "resnext101_32x8d")
# The photos of `large`.
LARGE_KB = (500, 1500, 3000)
_RESULT = "bench-result "
_WARM_UP = 0.2  # of the images
_STARTUP_IMAGES = 16
_NOT_OURS = ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE")
_RAY_INIT = "import torch, ray, time; ray.init(address='local'{}); print(time.time(), flush=True)"


class BenchError(PipelineError):
    """A measured process failed, or told nothing that can be measured."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and on what. `shards` and `tiny` are folders of shards, `scratch` is for outputs."""

    shards: str
    tiny: str
    scratch: str
    backbone: str
    image_size: int | None
    device: str
    precision: str
    decode: str
    cores: int
    stage_images: int
    large_megapixels: int
    plan_shards: int
    part_rows: int
    sized: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Settings:
        """The inverse of `text`."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """As an argument of a process."""
        return json.dumps(asdict(self))

    def config(self, shards: str, output: str, **changes: Any) -> Config:
        """The job's settings for these shards; the weights are random, since a rate does not depend on them."""
        values: dict[str, Any] = {
            "input": (shards,),
            "output": output,
            "backbone": self.backbone,
            "weights": "random:0",
            "image_size": None if self.image_size is None else (self.image_size, self.image_size),
            "device": self.device,
            "precision": self.precision,
            "decode": self.decode,
            "part_rows": self.part_rows,
        }
        return Config(**{**values, **changes})

    def fresh(self, name: str) -> Path:
        """A folder of `scratch` that is not there."""
        folder = Path(self.scratch) / name
        rmtree(folder, ignore_errors=True)
        return folder


def print_result(result: Mapping[str, Any]) -> None:
    """Hand `result` to the process that called this one by `run_module`."""
    print(_RESULT + json.dumps(result), flush=True)


def run_module(module: str, name: str, settings: Settings, **environment: str) -> tuple[dict[str, Any], float]:
    """Run a measurement of `module` as a process: its result, and the seconds that the process took."""
    start = time.time()
    text = run_command([sys.executable, "-m", module, name, settings.text()], **environment)
    seconds = time.time() - start
    for line in reversed(text.splitlines()):
        if line.startswith(_RESULT):
            return json.loads(line.removeprefix(_RESULT)), seconds
    raise BenchError(f"{module} {name} gave no result:\n{text[-2000:]}")


def _environment(**changes: str) -> dict[str, str]:
    """This process's, without settings of a job or of a cluster; Python keeps byte code, as it does by itself."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EMBED_") and key not in _NOT_OURS}
    # A bare ray.init() would write a token to the home folder.
    return {**clean, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **changes}


def run_command(command: list[str], **changes: str) -> str:
    """What a command prints, as a process. Raises `BenchError` where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=_environment(**changes), capture_output=True, text=True, check=False)
    _check(command, done.returncode, done.stdout + done.stderr)
    return done.stdout


def _check(command: list[str], code: int, printed: str) -> None:
    if code:
        raise BenchError(f"{' '.join(command)} ended with {code}:\n{printed[-3000:]}")


@dataclass(frozen=True)
class Window:
    """A stretch of steady work, in the seconds of `time.time()`.

    `num_images` were stored within it, and `num_before` before it.
    """

    begin: float
    end: float
    num_before: int
    num_images: int

    def rate(self, num_ahead: float = 0.0, share: float = 0.0) -> float:
        """Images/s, where `num_ahead` of the images were done by a `share` (0 to 1) before the window began."""
        return (self.num_images - num_ahead * share) / (self.end - self.begin)


def stored_parts(folder: Path) -> list[tuple[float, int]]:
    """(time it was stored, rows) of each Parquet file below `folder`."""
    return [(path.stat().st_mtime, pq.read_metadata(path).num_rows) for path in folder.rglob("*.parquet")]


def embedded_batches(folder: Path) -> list[tuple[float, int]]:
    """(time it was embedded, rows) of each batch, where the files say so in a column; none where they do not."""
    table = ds.dataset(folder, format="parquet")
    if "embedded_at" not in table.schema.names:
        return []
    counts = table.to_table(["embedded_at"])["embedded_at"].value_counts().to_pylist()
    return [(count["values"], count["counts"]) for count in counts]


def steady(parts: Iterable[tuple[float, int]]) -> Window:
    """The window of steady work among parts as (time, rows); see the top of this file.

    Raises:
        BenchError: there are fewer than two events.
    """
    parts = sorted(parts)
    if not parts:
        raise BenchError("no part was stored")
    moment = (parts[-1][0] - parts[0][0]) / len(parts) / 4
    events = [parts[0]]
    for (before, _), (when, rows) in pairwise(parts):
        if when - before <= moment:
            events[-1] = (when, events[-1][1] + rows)
        else:
            events.append((when, rows))
    total = sum(rows for _, rows in parts)
    stored = 0
    for when, rows in events[:-1]:
        stored += rows
        if stored >= _WARM_UP * total:
            return Window(when, events[-1][0], stored, total - stored)
    raise BenchError(f"{total} images in {len(events)} events are too few to see a steady state: give more --images")


def ceiling(measured: Mapping[str, Any], settings: Settings) -> Metrics:
    """What the stages alone allow together, in images/s, and the share of it that reading and decoding take.

    On CPU they share the cores, so their core-seconds an image add up: read and write as one core does them,
    by the cores; decode and the backbone as all cores do them. On a GPU it is the slower of backbone and decode, or
    the backbone's rate where the GPU decodes, too.
    """
    prepare_s = 1 / measured["read_images_per_s"] / settings.cores + 1 / measured["decode_all_images_per_s"]
    model_s = 1 / measured["model_images_per_s"]
    if settings.device == "cuda":
        slowest_s = model_s if device_share(settings.decode) else max(prepare_s, model_s)
        return {"ceiling_images_per_s": 1 / slowest_s, "ceiling_decode_share": 0.0}
    total_s = prepare_s + model_s + 1 / measured["write_images_per_s"] / settings.cores
    return {"ceiling_images_per_s": 1 / total_s, "ceiling_decode_share": prepare_s / total_s}


def done_before(tasks: list[list[float]], when: float, num_images: int) -> float:
    """How many of `num_images` the tasks [begin, end], which had equally many, had done at a time."""
    if not tasks:
        return 0.0
    shares = [min(max((when - begin) / max(end - begin, 1e-6), 0.0), 1.0) for begin, end in tasks]
    return num_images * sum(shares) / len(tasks)


def stages(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """Each stage alone, and their ceiling."""
    measured = run_module("benchmarks.stages", "stages", settings)[0]
    return {**measured, **ceiling(measured, settings)}


def decode(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """One core: our decoder, and PIL with `weights.transforms()`."""
    return run_module("benchmarks.stages", "decode", settings)[0]


def large(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """One core: large photos by our decoder, exactly and scaled."""
    return run_module("benchmarks.stages", "large", settings)[0]


def decode_all(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """All cores: our decoder."""
    return run_module("benchmarks.stages", "decode_all", settings)[0]


def device_decode(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """What decodes in the actor with `--decode gpu`."""
    return run_module("benchmarks.stages", "device_decode", settings)[0]


def gpu(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """The backbone by precision and batch, and copies to the device."""
    return run_module("benchmarks.stages", "gpu", settings)[0]


def compiled(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """The backbone as `--compile` has it, by batch."""
    return run_module("benchmarks.stages", "compiled", settings)[0]


def sizing(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """Each of `settings.sized` alone on the job's device, and how many cores decode as many images/s as it embeds."""
    one_core = (before if "decode_images_per_s" in before else decode(settings, before))["decode_images_per_s"]
    found: Metrics = {"sizing_decode_images_per_s": one_core}
    for backbone in settings.sized:
        # Each has an output of its own, since one takes no other backbone.
        changed = replace(settings, backbone=backbone, scratch=f"{settings.scratch}/{backbone}")
        alone = run_module("benchmarks.stages", "embed_and_write", changed)[0]
        found |= {
            f"sizing_{backbone}_images_per_s": alone["model_images_per_s"],
            f"sizing_{backbone}_decode_cores": alone["model_images_per_s"] / float(one_core),
            f"sizing_{backbone}_precision": alone["precision"],
        }
    return found


def no_model(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """The flow up to decode, with a sink that only counts."""
    result = run_module("benchmarks.flow", "no_model", settings)[0]
    window = steady([(when, int(rows)) for when, rows in result["parts"]])
    # Tasks decode side by side: those still at work when the window begins have done part of theirs.
    decoded = done_before(result["decode_tasks"], window.begin, window.num_before + window.num_images)
    rate = window.rate(max(0.0, decoded - window.num_before), 1.0)
    if rate <= 0:
        raise BenchError("all was decoded before the first part was counted: give more --images")
    cores = cores_in_use(result["looks"], window.begin, window.end)
    found: Metrics = {"no_model_images_per_s": rate}
    if cores:
        found["no_model_core_ms_per_image"] = 1000 * sum(cores.values()) / rate
        found |= {f"no_model_{kind}_core_ms_per_image": 1000 * used / rate for kind, used in cores.items()}
    return found


def job(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """The whole job on the photos, at steady state and with start-up."""
    result, wall_s = run_module("benchmarks.flow", "job", settings)
    window = steady(stored_parts(Path(settings.scratch) / "job" / "embeddings"))
    num_images = window.num_before + window.num_images
    num_ahead = max(0.0, done_before(result["decode_tasks"], window.begin, num_images) - window.num_before)
    share = 0.0 if settings.device == "cuda" else before["ceiling_decode_share"]
    return {
        "job_images_per_s": window.rate(num_ahead, share),
        "job_stored_images_per_s": window.rate(),
        "job_decoded_ahead_images": num_ahead,
        "job_with_startup_images_per_s": num_images / wall_s,
        "job_wall_s": wall_s,
        "job_slowest_stage": result["slowest_stage"],
        "job_precision": result["precision"],
        **{f"job_{stage}_busy": busy for stage, busy in result["stage_busy"].items()},
    }


def baseline(settings: Settings, name: str) -> Metrics:
    """A plain alternative on the same shards and weights in fp32, and how far it agrees with the job's embeddings."""
    output = settings.fresh(name)
    options = ["--shards", settings.shards, "--output", str(output), "--backbone", settings.backbone]
    options += ["--device", settings.device]
    if settings.image_size is not None:
        options += ["--image-size", str(settings.image_size)]
    start = time.time()
    run_command([sys.executable, "-m", f"benchmarks.baselines.{name}", *options])
    wall_s = time.time() - start
    window = steady(embedded_batches(output) or stored_parts(output))
    return {
        f"{name}_images_per_s": window.rate(),
        f"{name}_with_startup_images_per_s": (window.num_before + window.num_images) / wall_s,
        f"{name}_wall_s": wall_s,
        f"{name}_min_cosine": _agreement(Path(settings.scratch) / "job" / "embeddings", output),
    }


def dataloader(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """webdataset, a torch DataLoader and torchvision eager."""
    return baseline(settings, "dataloader")


def ray_data(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """Batch inference as Ray Data's documentation shows it."""
    return baseline(settings, "ray_data")


def _agreement(ours: Path, theirs: Path) -> float:
    """The lowest cosine of the embeddings of one image_id. Raises `BenchError` where the ids differ."""
    embeddings = []
    for folder in (ours, theirs):
        table = ds.dataset(folder, format="parquet").to_table(["image_id", "embedding"]).sort_by("image_id")
        rows = np.array(table["embedding"].to_pylist(), np.float64)
        embeddings.append((table["image_id"].to_pylist(), rows / np.linalg.norm(rows, axis=1, keepdims=True)))
    (our_ids, our_rows), (their_ids, their_rows) = embeddings
    if our_ids != their_ids:
        raise BenchError(f"{theirs.name} has other images than the job: {len(their_ids)} rows, ours {len(our_ids)}")
    return float((our_rows * their_rows).sum(axis=1).min())


def _embed_command(settings: Settings, *options: str) -> list[str]:
    """The job on the photos as a user's command, but for its output."""
    command = [sys.executable, str(ROOT / "jobs" / "embed.py"), "--input", settings.shards]
    command += ["--backbone", settings.backbone, "--weights", "random:0", "--device", settings.device]
    command += ["--precision", settings.precision, "--decode", settings.decode, *options]
    if settings.image_size is not None:
        command += ["--image-size", str(settings.image_size)]
    return command


def memory(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """What the processes of the whole job hold in memory at most, and what the object store spills."""
    command = _embed_command(settings, "--part-rows", str(settings.part_rows))
    command += ["--output", str(settings.fresh("memory"))]
    found, printed, code = peaks(command, _environment(), ROOT)
    _check(command, code, printed)
    return {**found}


def startup(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """From the command to the first stored part, of a shard that has just one, when all is cached; and Ray alone."""
    shard = Path(settings.scratch) / "startup-shard"
    photo_shards(shard, _STARTUP_IMAGES, _STARTUP_IMAGES)
    command = _embed_command(replace(settings, shards=str(shard)))
    if not (Path(settings.scratch) / "startup").exists():
        run_command([*command, "--output", str(settings.fresh("startup"))])
    output = settings.fresh("startup")
    start = time.time()
    run_command([*command, "--output", str(output)])
    wall_s = time.time() - start
    first = min(path.stat().st_mtime for path in (output / "embeddings").iterdir())
    return {
        "startup_first_embedding_s": first - start,
        "startup_wall_s": wall_s,
        "ray_init_s": _ray_init(""),
        "ray_init_no_dashboard_s": _ray_init(", include_dashboard=False"),
    }


def _ray_init(options: str) -> float:
    start = time.time()
    text = run_command([sys.executable, "-c", _RAY_INIT.format(options)])
    return float(text.split()[-1]) - start


def tiny(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """Many shards of a few tiny images: what a shard costs beyond its images, and the driver's memory."""
    work = run_module("benchmarks.stages", "tiny_work", settings)[0]
    result, wall_s = run_module("benchmarks.flow", "tiny", settings)
    output = Path(settings.scratch) / "tiny" / "embeddings"
    # A part is a shard here.
    window = steady((path.stat().st_mtime, 1) for path in output.iterdir())
    core_ms = 1000 * settings.cores / window.rate()
    memory: list[tuple[int, float]] = result["memory"]
    num_shards = memory[-1][0]
    quarter = max(mib for shards, mib in memory if shards <= max(num_shards / 4, memory[0][0]))
    last = max(mib for shards, mib in memory if shards >= num_shards * 3 / 4)
    return {
        **work,
        "tiny_core_ms_per_shard": core_ms,
        "tiny_overhead_core_ms_per_shard": core_ms - work["tiny_work_ms_per_shard"],
        "tiny_wall_s": wall_s,
        "driver_mib_first_quarter": quarter,
        "driver_mib_last_quarter": last,
    }


def plan(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """Plan very many shards of which nine tenths are done, listed from a simulated S3."""
    return run_module("benchmarks.plan", "plan", settings)[0]


def scaling(settings: Settings, before: Mapping[str, Any]) -> Metrics:
    """1 to 16 actors that sleep for as long as a device would compute."""
    return run_module("benchmarks.scaling", "scaling", settings)[0]
