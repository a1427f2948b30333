#!/usr/bin/env python3
"""Measure the job, its stages and its alternatives in one run, in turn, on the same shards."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import rich.console
from rich.table import Table

from benchmarks import runs
from benchmarks.machine import hardware, num_cores, versions
from benchmarks.runs import Metrics, Settings
from benchmarks.shards import LARGE_MEGAPIXELS, photo_shards, tiny_shards
from shard_embedder.jobs.support.command import Parser, at_least, local_path, run_command
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_OK
from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.writing import write_whole

FORMAT = 1
# What is measured, in this order, and repeated in turn. A measurement sees what came before it in its repeat.
MEASUREMENTS: dict[str, Callable[[Settings, Mapping[str, Any]], Metrics]] = {
    "stages": runs.stages,
    "decode": runs.decode,
    "large": runs.large,
    "decode_all": runs.decode_all,
    "device_decode": runs.device_decode,
    "gpu": runs.gpu,
    "compiled": runs.compiled,
    "sizing": runs.sizing,
    "no_model": runs.no_model,
    "job": runs.job,
    "dataloader": runs.dataloader,
    "ray_data": runs.ray_data,
    "startup": runs.startup,
    "memory": runs.memory,
    "tiny": runs.tiny,
    "plan": runs.plan,
    "scaling": runs.scaling,
}
# A case is what one names on the command line: its measurements, and what it is about.
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "stages": (("stages",), "each stage alone, and the ceiling that they allow together"),
    "decode": (("decode",), "the decoder and PIL + weights.transforms(), on one core"),
    "large": (("large",), "photos of 12 megapixels decoded exactly and by --decode scaled, on one core"),
    "no-model": (("decode_all", "no_model"), "the flow up to decode, and decode alone, on all cores"),
    "job": (("stages", "job"), "the whole job, at steady state and with start-up, and its ceiling"),
    "baselines": (("stages", "job", "dataloader", "ray_data"), "the whole job and plain alternatives"),
    "startup": (("startup",), "from the command to the first embedding, and ray.init() alone"),
    "memory": (("memory",), "what a worker of each stage holds in memory at most, and what the object store spills"),
    "sizing": (("sizing",), "the backbones of --sized alone, and the cores that decode as fast as each"),
    "tiny": (("tiny",), "10,000 shards of 10 tiny images: overhead a shard, memory of the driver"),
    "plan": (("plan",), "plan a million shards of which 900,000 are done, from a simulated S3"),
    "scaling": (("scaling",), "1 to 16 actors that sleep instead of computing: what the flow itself allows"),
    "gpu": (
        ("gpu", "decode_all", "device_decode"),
        "the backbone on a GPU by precision and batch, host to device alone, decoding there and on all cores",
    ),
    "compiled": (("compiled",), "the backbone compiled, by batch"),
    "gpu-job": (("job",), "the whole job on a GPU, at steady state and with start-up, without its ceiling"),
}
_OUT = rich.console.Console(highlight=False, soft_wrap=True)


class Goal(NamedTuple):
    """A figure to reach: `over` by `under`, or `over` itself, in each repeat; its median counts.

    `limits` is by backbone, `*` for any other; a figure without a limit is only shown.
    """

    case: str
    text: str
    over: str
    under: str | None
    at_least: bool
    limits: dict[str, float]


GOALS = (
    Goal(
        "decode",
        "decode / PIL + weights.transforms(), one core",
        "decode_images_per_s",
        "decode_pil_images_per_s",
        True,
        {"*": 2.0},
    ),
    *(
        Goal(
            "large",
            f"--decode scaled / exact, 12 megapixels of {kb} kB, one core",
            f"large_{kb}_kb_scaled_images_per_s",
            f"large_{kb}_kb_exact_images_per_s",
            True,
            {"*": 2.5},
        )
        for kb in runs.LARGE_KB
    ),
    Goal(
        "no-model",
        "flow without a model / decode alone, all cores",
        "no_model_images_per_s",
        "decode_all_images_per_s",
        True,
        {"*": 0.85},
    ),
    Goal(
        "no-model",
        "core-ms an image of decode alone / of the flow without a model",
        "decode_all_core_ms_per_image",
        "no_model_core_ms_per_image",
        True,
        {},
    ),
    Goal("job", "whole job / ceiling of its stages", "job_images_per_s", "ceiling_images_per_s", True, {"*": 0.95}),
    Goal(
        "baselines",
        "whole job / DataLoader",
        "job_images_per_s",
        "dataloader_images_per_s",
        True,
        {"resnet50": 5.0, "resnet18": 3.0},
    ),
    Goal(
        "baselines",
        "whole job / Ray Data's pattern",
        "job_images_per_s",
        "ray_data_images_per_s",
        True,
        {"resnet50": 6.0},
    ),
    Goal("baselines", "lowest cosine with DataLoader", "dataloader_min_cosine", None, True, {"*": 0.999}),
    Goal("baselines", "lowest cosine with Ray Data's pattern", "ray_data_min_cosine", None, True, {"*": 0.999}),
    Goal("startup", "first embedding / ray.init()", "startup_first_embedding_s", "ray_init_s", False, {"*": 1.5}),
    Goal(
        "startup",
        "first embedding / ray.init() without dashboard",
        "startup_first_embedding_s",
        "ray_init_no_dashboard_s",
        False,
        {},
    ),
    Goal("memory", "spilled by the object store, MiB", "memory_spilled_mib", None, False, {"*": 0.0}),
    Goal("tiny", "overhead a tiny shard, core-ms", "tiny_overhead_core_ms_per_shard", None, False, {"*": 5.0}),
    Goal(
        "tiny",
        "driver's memory, last / first quarter",
        "driver_mib_last_quarter",
        "driver_mib_first_quarter",
        False,
        {"*": 1.1},
    ),
    Goal(
        "scaling",
        "16 sleeping actors / 16 times the rate of one",
        "scaling_16_images_per_s",
        "scaling_16_linear_images_per_s",
        True,
        {"*": 0.95},
    ),
    Goal("plan", "plan, s", "plan_s", None, False, {"*": 60.0}),
    Goal("plan", "plan, peak MiB", "plan_peak_mib", None, False, {"*": 1024.0}),
)


def parser() -> Parser:
    """The command line."""
    lines = "\n".join(f"  {name:10} {text}" for name, (_, text) in CASES.items())
    top = Parser(
        "bench.py",
        description=__doc__,
        epilog=f"cases:\n{lines}\n\nWhat each measures, and how: benchmarks/README.md",
    )
    top.add_argument("cases", nargs="+", choices=CASES, metavar="CASE", help="what to measure; see below")
    top.add_argument("--backbone", default="resnet50", help="a torchvision ResNet (default: resnet50)")
    top.add_argument("--image-size", type=at_least(1), metavar="N", help="input size (default: that of the weights)")
    top.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the backbone runs (default: cpu)"
    )
    top.add_argument("--precision", default="auto", help="of the job; the baselines are fp32 (default: auto)")
    top.add_argument("--decode", default="cpu", help="of the job, as it takes it (default: cpu)")
    top.add_argument("--images", type=at_least(1), default=2048, metavar="N", help="photos (default: 2048)")
    top.add_argument(
        "--images-a-shard",
        type=at_least(1),
        default=128,
        metavar="N",
        help="photos a shard, and so a part (default: 128)",
    )
    top.add_argument(
        "--stage-images", type=at_least(1), default=512, metavar="N", help="photos of a stage alone (default: 512)"
    )
    top.add_argument(
        "--large-megapixels",
        type=at_least(1),
        default=LARGE_MEGAPIXELS,
        metavar="N",
        help="of a photo of `large` (default: 12)",
    )
    top.add_argument(
        "--tiny-shards", type=at_least(1), default=10_000, metavar="N", help="of `tiny` (default: 10000)"
    )
    top.add_argument(
        "--plan-shards", type=at_least(1), default=1_000_000, metavar="N", help="of `plan` (default: 1000000)"
    )
    top.add_argument(
        "--sized", nargs="+", default=runs.SIZED, metavar="NAME", help="of `sizing` (default: the usual ones)"
    )
    top.add_argument("--repeats", type=at_least(1), default=3, metavar="N", help="of all cases in turn (default: 3)")
    top.add_argument(
        "--data", type=local_path, metavar="FOLDER", help="keep the shards here (default: make them anew)"
    )
    top.add_argument(
        "--scratch", type=local_path, metavar="FOLDER", help="for what is embedded (default: a temporary one)"
    )
    top.add_argument("--output", type=local_path, metavar="FILE", help="write all figures here, as JSON")
    return top


class Results(NamedTuple):
    """Figures by repeat, and the measurements that failed, each with its message."""

    repeats: list[Metrics]
    failed: dict[str, str]


def measure(
    names: list[str], settings: Settings, repeats: int, on_result: Callable[[Results], object] = lambda results: None
) -> Results:
    """Each measurement once, and all again, `repeats` times: what changes on the machine meets all of them.

    One that fails is not repeated, and the others go on. `on_result` gets all results so far after each.
    """
    results = Results([], {})
    for number in range(repeats):
        metrics: Metrics = {}
        results.repeats.append(metrics)
        for name in [name for name in names if name not in results.failed]:
            try:
                found = MEASUREMENTS[name](settings, metrics)
            except Exception as error:
                results.failed[name] = f"{type(error).__name__}: {error}"
                _OUT.print(f"{number + 1}/{repeats} {name} FAILED: {results.failed[name]}", markup=False)
            else:
                shown = ", ".join(f"{key} {_show(value)}" for key, value in found.items())
                _OUT.print(f"{number + 1}/{repeats} {name}: {shown}", markup=False)
                metrics |= found
            on_result(results)
    return results


def summarise(results: list[Metrics]) -> dict[str, dict[str, float]]:
    """Median and spread of each number over the repeats that have it."""
    names = {name: None for one in results for name, value in one.items() if not isinstance(value, str)}
    return {name: _spread([float(one[name]) for one in results if name in one]) for name in names}


def judge(results: list[Metrics], backbone: str, sized_down: set[str]) -> list[dict[str, Any]]:
    """The goals of which all was measured; a ratio is made in each repeat, and then its median taken.

    Cases that were `sized_down` have a figure and no verdict: their goals are of the full size.
    """
    judged = []
    for goal in GOALS:
        whole = [one for one in results if {goal.over, goal.under or goal.over} <= one.keys()]
        if not whole:
            continue
        values = [float(one[goal.over]) / (float(one[goal.under]) if goal.under else 1.0) for one in whole]
        spread = _spread(values)
        limit = goal.limits.get(backbone, goal.limits.get("*"))
        if goal.case in sized_down:
            limit = None
        holds = None if limit is None else spread["median"] >= limit if goal.at_least else spread["median"] <= limit
        named = {key: value for key, value in goal._asdict().items() if key != "limits"}
        judged.append({**named, "limit": limit, **spread, "holds": holds})
    return judged


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _show(value: float | str | None) -> str:
    return value if isinstance(value, str) else "-" if value is None else f"{value:.4g}"


def show(summary: dict[str, dict[str, float]], goals: list[dict[str, Any]]) -> None:
    """The tables for people."""
    figures = Table("figure", "median", "min", "max", title="Figures")
    for name, spread in summary.items():
        figures.add_row(name, *(_show(spread[key]) for key in ("median", "min", "max")))
    ratios = Table("ratio", "median", "min", "max", "goal", "", title="Goals")
    for one in goals:
        sign = "" if one["limit"] is None else ">= " if one["at_least"] else "<= "
        verdict = {True: "holds", False: "MISSED", None: ""}[one["holds"]]
        numbers = [_show(one[key]) for key in ("median", "min", "max", "limit")]
        ratios.add_row(one["text"], *numbers[:3], sign + numbers[3], verdict)
    _OUT.print(figures)
    if goals:
        _OUT.print(ratios)


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Make the shards, measure, and return what goes to the JSON file, where it is after each measurement, too."""
    wanted = {name for case in flags.cases for name in CASES[case][0]}
    if "stages" in wanted:
        wanted -= {"decode", "decode_all"}
    if "sizing" in wanted:
        from shard_embedder.pipeline.backbones import library_of  # noqa: PLC0415  imports torch, which no other case needs here

        for name in flags.sized:
            library_of(name).find(name)  # raises where it is unknown
    if "gpu-job" in flags.cases and flags.device != "cuda":
        raise SettingsError(f"gpu-job needs --device cuda, got {flags.device}: job is the case for CPUs")
    names = [name for name in MEASUREMENTS if name in wanted]
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        data = (flags.data or Path(temporary) / "data").absolute()
        settings = Settings(
            shards=str(data / f"photos-{flags.images}-{flags.images_a_shard}"),
            tiny=str(data / f"tiny-{flags.tiny_shards}"),
            scratch=str((flags.scratch or Path(temporary) / "scratch").absolute()),
            backbone=flags.backbone,
            image_size=flags.image_size,
            device=flags.device,
            precision=flags.precision,
            decode=flags.decode,
            cores=num_cores(),
            stage_images=min(flags.stage_images, flags.images),
            large_megapixels=flags.large_megapixels,
            plan_shards=flags.plan_shards,
            part_rows=Config.part_rows,
            sized=tuple(flags.sized),
        )
        settings.config(settings.shards, settings.scratch)  # raises where a value breaks its rule
        shards = {}
        if wanted - {"startup", "tiny", "plan", "scaling"}:
            shards["photos"] = photo_shards(Path(settings.shards), flags.images, flags.images_a_shard)
        if "tiny" in wanted:
            shards["tiny"] = tiny_shards(Path(settings.tiny), flags.tiny_shards)
        full = parser()
        sized_down = {
            case
            for case, option in (("large", "large_megapixels"), ("tiny", "tiny_shards"), ("plan", "plan_shards"))
            if getattr(flags, option) < full.get_default(option)
        }
        described = {
            "backbone": flags.backbone,
            "weights": "random:0",
            "image_size": flags.image_size,
            "device": flags.device,
            "precision": flags.precision,
            "decode": flags.decode,
            "baseline_precision": "fp32",
            "stage_images": settings.stage_images,
            "large_megapixels": flags.large_megapixels,
            "plan_shards": flags.plan_shards,
            "part_rows": settings.part_rows,
        }
        about = {
            "format": FORMAT,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["benchmarks/bench.py", *sys.argv[1:]]),
            "cases": list(dict.fromkeys(flags.cases)),
            "hardware": hardware(),
            "versions": versions(),
            "settings": described,
            "shards": shards,
        }

        def told(results: Results) -> dict[str, Any]:
            return {
                **about,
                "failed": results.failed,
                "repeats": results.repeats,
                "figures": summarise(results.repeats),
                "goals": judge(results.repeats, flags.backbone, sized_down),
            }

        def write(results: Results) -> None:
            if flags.output is not None:
                with write_whole(flags.output) as temporary:
                    temporary.write_text(json.dumps(told(results), indent=2) + "\n")

        if flags.output is not None:
            flags.output.parent.mkdir(parents=True, exist_ok=True)
        return told(measure(names, settings, flags.repeats, write))


def _run(flags: argparse.Namespace) -> int:
    result = run(flags)
    show(result["figures"], result["goals"])
    if flags.output is not None:
        _OUT.print(f"written to {flags.output}", markup=False)
    if result["failed"]:
        _OUT.print(f"FAILED: {', '.join(result['failed'])}", markup=False)
        return EXIT_FAILED
    return EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark, and return its exit code: 0 whether or not the goals hold, 4 where a measurement failed."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
