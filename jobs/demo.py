#!/usr/bin/env python3
"""Show the whole way on one machine: photos to shards, to Parquet, to nearest neighbours and near-duplicates."""

from __future__ import annotations

import filecmp
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rich.panel
from PIL import Image

from jobs.support.command import Parser, local_path
from jobs.support.photos import NUM_VIEWS, make_views
from pipeline.core.config import Config, Field
from pipeline.core.errors import InputError, OutputError, PipelineError, WeightsError
from pipeline.core.formatting import format_count
from pipeline.core.schema import EMBEDDING, IMAGE_ID
from pipeline.output.names import EMBEDDINGS
from pipeline.pages.sheet import Sheet
from pipeline.planning.job import prepare_job

EXIT_OK = 0
EXIT_USAGE = 2
NUM_NEIGHBOURS = 5
MAX_ROWS = 8
# Views are turned, cropped, flipped and blurred: less alike than what is stored twice.
NEAR = 0.7
# Small shards for the photos, so that there are some.
VIEWS_A_SHARD = 64
IMAGES_A_SHARD = 1000
# Of more images than this, so many are drawn at random as queries.
MAX_QUERIES = 10_000
RANDOM = "random:0"
DOWNLOAD_TIMEOUT_S = 30
KEEP = ("cls", "json:class", "json:path")
_JOBS = Path(__file__).resolve().parent
_MARKER = "made-by-demo.txt"
_OUT = rich.console.Console(highlight=False, soft_wrap=True)
_EPILOG = """\
Without --images the demo needs no download but the weights: it takes the photos that scikit-image ships,
makes a dozen augmented views of each, and asks how often the nearest neighbour of a view is a view of the
same photo. With --images your own images are packed as they are, and a neighbour is right where it lies in
the same folder. Run again on the same images and settings, the demo embeds nothing; on others, all of them.

Weights are torchvision's DEFAULT; where they cannot be downloaded, random ones, and it says so.
"""


class DemoError(Exception):
    """A step failed; `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_job(name: str, *arguments: str) -> None:
    """Run one of `jobs/` as a user does, its output shown. Raises `DemoError` where it fails."""
    _OUT.print(f"$ python jobs/{name} {shlex.join(arguments)}", style="cyan", markup=False)
    # The demo's settings are its own, and its files are on this machine only.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("EMBED_") and key != "RAY_ADDRESS"
    }
    command = [sys.executable, str(_JOBS / name), *arguments]
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise DemoError(f"{name} ended with exit code {code}", code)


def pack(images: Path, shards: Path, output: Path, samples_a_shard: int) -> None:
    """Pack `images`; what is embedded already stays valid where the shards come out the same."""
    fresh = shards.with_name(f"{shards.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    run_job("pack.py", str(images), str(fresh), "--max-samples", str(samples_a_shard))
    if _same_files(fresh, shards):
        shutil.rmtree(fresh)
        _OUT.print(f"they are the same as those in {shards}, which stay", markup=False)
        return
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(shards, ignore_errors=True)
    fresh.rename(shards)
    _OUT.print(f"moved to {shards}", markup=False)


def _same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    if not other.is_dir() or sorted(path.name for path in other.iterdir()) != names:
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def settle_weights(backbone: str, weights: str | None, shards: Path, output: Path) -> str:
    """The weights to embed with: those asked for, else DEFAULT, else random ones.

    An output that was made with other settings is removed.

    Raises:
        PipelineError: the job could not start with them.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        _check_job(backbone, weights or "DEFAULT", shards, output)
    except WeightsError as error:
        if weights is not None:
            raise
        _OUT.print(str(error), style="yellow", markup=False)
        _check_job(backbone, RANDOM, shards, output)
        return RANDOM
    finally:
        socket.setdefaulttimeout(timeout)
    return weights or "DEFAULT"


def _check_job(backbone: str, weights: str, shards: Path, output: Path) -> None:
    keep = tuple(Field.parse(field) for field in KEEP)
    config = Config(input=(str(shards),), output=str(output), backbone=backbone, weights=weights, keep=keep)
    try:
        prepare_job(config)
    except OutputError:
        _OUT.print("the output was made with other settings: it is made anew")
        shutil.rmtree(output)


def warn_of_random_weights() -> None:
    """Say loudly that the neighbours mean little."""
    text = (
        "The DEFAULT weights cannot be downloaded here: the demo goes on with\n"
        "RANDOM WEIGHTS. Every step runs as it would, but the embeddings were\n"
        "never trained, and THEIR NEIGHBOURS MEAN LITTLE: they follow light and\n"
        "coarse texture. For real ones: make demo WEIGHTS=path/to/resnet18.pth"
    )
    panel = rich.panel.Panel.fit(text, title="RANDOM WEIGHTS", style="bold yellow", padding=(1, 2))
    rich.console.Console(highlight=False, width=80).print("", panel)


@dataclass(frozen=True)
class Stored:
    """What the stored Parquet says of each image, in the order of their ids. `embeddings` is [N, C]."""

    ids: list[str]
    classes: list[str | None]
    paths: list[str | None]
    embeddings: np.ndarray[Any, np.dtype[np.float32]]

    @property
    def has_classes(self) -> bool:
        """Whether some neighbours can be right and others wrong."""
        return len(set(self.classes) - {None}) > 1


def read_stored(output: Path) -> Stored:
    """Read the embeddings of an output. Raises `InputError` where there are none."""
    table = pq.read_table(output / EMBEDDINGS).sort_by(IMAGE_ID)
    if len(table) == 0:
        raise InputError(f"no image could be embedded; the reasons are in {output}/errors")
    column = table[EMBEDDING].combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return Stored(
        ids=table[IMAGE_ID].to_pylist(),
        classes=table["class"].to_pylist(),
        paths=table["path"].to_pylist(),
        embeddings=values.reshape(len(table), -1),
    )


class Neighbours(NamedTuple):
    """The nearest other images of some queries, nearest first.

    `queries` [Q] and `rows` [Q, K] are rows of the embeddings; `cosines` is [Q, K].
    """

    queries: np.ndarray[Any, np.dtype[np.intp]]
    rows: np.ndarray[Any, np.dtype[np.intp]]
    cosines: np.ndarray[Any, np.dtype[np.float32]]


def find_neighbours(
    embeddings: np.ndarray[Any, np.dtype[np.float32]], count: int, max_queries: int = MAX_QUERIES
) -> Neighbours:
    """The `count` nearest of all other `embeddings` [N, C] by cosine, fewer where N is less; N is 2 at least."""
    num_images = len(embeddings)
    count = min(count, num_images - 1)
    drawn = random.Random(0).sample(range(num_images), min(num_images, max_queries))
    queries = np.array(sorted(drawn), np.intp)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    rows = np.empty((len(queries), count), np.intp)
    cosines = np.empty((len(queries), count), np.float32)
    step = max(1, 2**24 // num_images)
    for start in range(0, len(queries), step):
        chunk = queries[start : start + step]
        similar = unit[chunk] @ unit.T
        similar[np.arange(len(chunk)), chunk] = -np.inf
        nearest = np.argpartition(-similar, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(similar, nearest, axis=1), axis=1, kind="stable")
        rows[start : start + step] = np.take_along_axis(nearest, order, axis=1)
        cosines[start : start + step] = np.take_along_axis(similar, rows[start : start + step], axis=1)
    return Neighbours(queries, rows, cosines)


class Score(NamedTuple):
    """How often the first neighbour is of the query's class, and how often it would be by chance."""

    right: int
    total: int
    chance: float


def score(classes: list[str | None], neighbours: Neighbours) -> Score:
    """Count over the queries that have a class which another image has too."""
    sizes = Counter(classes)
    nearest = zip(neighbours.queries.tolist(), neighbours.rows[:, 0].tolist(), strict=True)
    pairs = [(query, row) for query, row in nearest if classes[query] is not None and sizes[classes[query]] > 1]
    right = sum(classes[query] == classes[row] for query, row in pairs)
    chance = sum((sizes[classes[query]] - 1) / (len(classes) - 1) for query, _ in pairs) / max(len(pairs), 1)
    return Score(right, len(pairs), chance)


def choose_rows(labels: list[str | None], count: int) -> list[int]:
    """`count` positions drawn at random, the same in each run, of as many labels as there are; in order."""
    seen: Counter[str | None] = Counter()
    turns: list[tuple[int, int, int]] = []
    for position in random.Random(0).sample(range(len(labels)), len(labels)):
        turns.append((seen[labels[position]], len(turns), position))
        seen[labels[position]] += 1
    return sorted(position for _, _, position in sorted(turns)[:count])


def draw_sheet(stored: Stored, neighbours: Neighbours, images: Path, lines: list[str], alarm: str) -> Image.Image:
    """A contact sheet of some queries, which are drawn at random, and their neighbours.

    Args:
        images: the folder that the paths of the images are below.
        lines: what to say under the title.
        alarm: what to beware of, or empty.
    """
    chosen = choose_rows([stored.classes[query] for query in neighbours.queries], MAX_ROWS)
    sheet = Sheet(len(chosen), neighbours.rows.shape[1])
    ticked = ", right ones ticked" if stored.has_classes else ""
    drawn = f"shown: {len(chosen)} of {len(neighbours.queries)} queries, drawn at random{ticked}"
    sheet.header("Nearest neighbours by cosine", [lines[0], "  |  ".join([drawn, *lines[1:]])], alarm)
    for row, position in enumerate(chosen):
        query = int(neighbours.queries[position])
        label = stored.classes[query]
        sheet.tile(row, 0, images / (stored.paths[query] or ""), stored.ids[query], "query", None)
        nearest = zip(neighbours.rows[position].tolist(), neighbours.cosines[position].tolist(), strict=True)
        for column, (other, cosine) in enumerate(nearest, 1):
            is_right = stored.classes[other] == label if stored.has_classes and label is not None else None
            path = images / (stored.paths[other] or "")
            sheet.tile(row, column, path, stored.ids[other], f"cosine {cosine:.3f}", is_right)
    return sheet.image


def show_parquet(output: Path) -> None:
    """Print where the Parquet is and what is in it."""
    folder = output / EMBEDDINGS
    parts = sorted(folder.rglob("*.parquet"))
    tables = [pq.read_table(part) for part in parts]
    num_bytes = sum(part.stat().st_size for part in parts)
    rows = sum(map(len, tables))
    say = _OUT.print
    say(
        f"\n{folder}: {format_count(rows, 'row')} in {format_count(len(parts), 'part')}, {num_bytes / 1e6:.1f} MB",
        style="bold",
        markup=False,
    )
    say("columns", style="bold")
    for field in tables[0].schema:
        say(f"  {field.name:14}{field.type}" + ("" if field.nullable else " not null"), markup=False)
    say(f"first rows of {parts[0].name}", style="bold", markup=False)
    for row in tables[0].slice(0, 3).to_pylist():
        vector = row.pop(EMBEDDING)
        start = ", ".join(f"{value:.3f}" for value in vector[:4])
        values = ", ".join(f"{key} {value!r}" for key, value in row.items())
        say(f"  {values}, {EMBEDDING} [{start}, ... {len(vector)} values]", markup=False)
    say("metadata of each part", style="bold")
    for key, value in sorted(_metadata(tables[0]).items()):
        say(f"  {key:24}{value[:72]}{'...' if len(value) > 72 else ''}", markup=False)


def _metadata(table: pa.Table) -> dict[str, str]:
    items = (table.schema.metadata or {}).items()
    return {key.decode(): value.decode("utf-8", "replace") for key, value in items if key != b"ARROW:schema"}


def claim(folder: Path, images: Path | None) -> None:
    """Make `folder` the demo's own. Raises `InputError` where it holds, or lies in, something else."""
    if images is not None and folder.is_relative_to(images):
        raise InputError(f"--output must lie outside of --images, got {str(folder)!r} in {str(images)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / _MARKER
    if any(folder.iterdir()) and not marker.exists():
        raise InputError(f"--output must be new, empty, or from an earlier demo, got {str(folder)!r}")
    marker.write_text("jobs/demo.py made this folder, and replaces what is in it.\n")


def run_demo(images: Path | None, folder: Path, backbone: str, weights: str | None) -> None:
    """The demo, from images to the contact sheet.

    Raises:
        DemoError: a job failed.
        PipelineError: a step cannot start.
    """
    started = time.monotonic()
    claim(folder, images)
    shards, output, sheet_path = folder / "shards", folder / "output", folder / "contact-sheet.png"
    is_own = images is not None
    images = images or folder / "views"
    if is_own:
        _step(1, f"take the images in {images} as they are")
    else:
        _step(1, f"make {NUM_VIEWS} augmented views of each photo")
        _OUT.print(f"{make_views(images)} views in {images}", markup=False)

    _step(2, "pack them into WebDataset shards")
    pack(images, shards, output, IMAGES_A_SHARD if is_own else VIEWS_A_SHARD)

    _step(3, "embed the shards into Parquet")
    chosen = settle_weights(backbone, weights, shards, output)
    fell_back = weights is None and chosen == RANDOM
    if fell_back:
        warn_of_random_weights()
    run_job(
        "embed.py", "--backbone", backbone, "--weights", chosen,
        "--input", str(shards), "--output", str(output), "--keep", *KEEP,
    )  # fmt: skip

    _step(4, "find the nearest neighbours of each image by cosine over the stored Parquet")
    stored = read_stored(output)
    show_parquet(output)
    if fell_back:
        warn_of_random_weights()
    if len(stored.ids) < 2:
        _OUT.print("\nOne image has no neighbours: there is nothing more to show.")
        return
    neighbours = find_neighbours(stored.embeddings, NUM_NEIGHBOURS)
    verdict = _verdict(stored, neighbours, "folder" if is_own else "photo")
    alarm = "random weights: neighbours mean little" if chosen.startswith("random") else ""
    lines = [verdict, f"{backbone}, weights {Path(chosen).name}"]
    draw_sheet(stored, neighbours, images, lines, alarm).save(sheet_path, optimize=True)
    _OUT.print(f"\n{verdict}", style="bold", markup=False)
    if not is_own:
        _step(5, f"find pairs of views above a cosine of {NEAR}; those of one photo are right")
        pairs = folder / "pairs"
        run_job(
            "duplicates.py", str(output), "--threshold", str(NEAR), "--group-pattern", "^(.*)/[0-9]+$",
            "--pairs", f"{pairs}.parquet", "--html", f"{pairs}.html", "--input", str(shards),
        )  # fmt: skip
        _OUT.print(f"page of pairs  {pairs}.html", markup=False)
    _OUT.print(f"contact sheet  {sheet_path}", markup=False)
    _OUT.print(f"Parquet        {output / EMBEDDINGS}", markup=False)
    _OUT.print(f"the whole demo took {time.monotonic() - started:.0f} s")


def _verdict(stored: Stored, neighbours: Neighbours, noun: str) -> str:
    if not stored.has_classes:
        return "all images are of one folder: nothing tells right from wrong"
    result = score(stored.classes, neighbours)
    share = result.right / max(result.total, 1)
    return (
        f"the nearest neighbour is of the same {noun} for {result.right} of {result.total} images = {share:.1%} "
        f"(by chance {result.chance:.1%})"
    )


def _step(number: int, text: str) -> None:
    _OUT.print(f"\n[{number}] {text}", style="bold green", markup=False)


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="demo.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    top.add_argument(
        "--images", metavar="FOLDER", type=local_path, help="your own images (default: scikit-image's photos)"
    )
    top.add_argument(
        "--output", metavar="FOLDER", type=local_path, default=Path("demo"), help="for all it makes (demo)"
    )
    top.add_argument("--backbone", metavar="NAME", default="resnet18", help="(resnet18)")
    top.add_argument("--weights", metavar="W", help="as for embed.py (DEFAULT, or random:0 where it cannot be had)")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run the demo, and return its exit code: 0, 2 where it cannot start, or that of the job that failed."""
    top = parser()
    flags = top.parse_args(arguments)
    try:
        images = flags.images and flags.images.resolve()
        run_demo(images, flags.output.resolve(), flags.backbone, flags.weights)
        return EXIT_OK
    except DemoError as error:
        top.tell(error)
        return error.code
    except (PipelineError, OSError) as error:
        top.tell(error)
        return EXIT_USAGE
    except KeyboardInterrupt:
        top.tell("interrupted; run it again to go on")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
