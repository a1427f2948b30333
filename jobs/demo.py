#!/usr/bin/env python3
"""Show the whole way on one machine: photos to shards, to Parquet, to nearest neighbours and near-duplicates."""

from __future__ import annotations

import filecmp
import math
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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rich.console
import rich.panel
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from jobs.usage import Parser, local_path
from pipeline import words
from pipeline.config import Config, Field
from pipeline.errors import InputError, OutputError, PipelineError, WeightsError
from pipeline.parts import EMBEDDINGS
from pipeline.prepare import prepare
from pipeline.schema import EMBEDDING, IMAGE_ID

EXIT_OK = 0
EXIT_USAGE = 2
NUM_VIEWS = 12
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
# Photos in scikit-image's wheel that its documentation declares CC0 or public domain, by file name.
PHOTOS = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "page.png",
    "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
_VIEW_SIDE = 256
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


def augmented(photo: Image.Image, rng: random.Random) -> Image.Image:
    """One view of an RGB photo: rotated, cropped, perhaps flipped and blurred, with other light and colours."""
    angle = rng.uniform(-20, 20)
    view = photo.rotate(angle, Image.Resampling.BICUBIC)
    # The largest upright rectangle of the same shape that rotating left without black corners.
    ratio = max(photo.width / photo.height, photo.height / photo.width)
    inside = 1 / (math.cos(math.radians(angle)) + ratio * math.sin(math.radians(abs(angle))))
    view = _random_crop(view, inside, rng)
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    view.thumbnail((_VIEW_SIDE, _VIEW_SIDE), Image.Resampling.LANCZOS)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        view = enhance(view).enhance(rng.uniform(0.6, 1.4))
    return view.filter(ImageFilter.GaussianBlur(rng.uniform(0, 2))) if rng.random() < 0.5 else view


def _random_crop(image: Image.Image, inside: float, rng: random.Random) -> Image.Image:
    """A rectangle of 60 to 100 % of the sides of the middle `inside` of an image."""
    scale = inside * rng.uniform(0.6, 1.0)
    width, height = image.width * scale, image.height * scale
    left = image.width * (1 - inside) / 2 + rng.random() * (image.width * inside - width)
    top = image.height * (1 - inside) / 2 + rng.random() * (image.height * inside - height)
    return image.crop((round(left), round(top), round(left + width), round(top + height)))


def make_views(folder: Path) -> int:
    """Write the views of each photo below `folder`, one folder a photo, and return their number.

    Raises:
        InputError: scikit-image, which brings the photos, is not installed.
    """
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("the demo's photos come with scikit-image: pip install scikit-image, or give --images")
    data = Path(spec.submodule_search_locations[0]) / "data"
    photos = [data / name for name in PHOTOS if (data / name).exists()]
    if not photos:
        raise InputError(f"scikit-image must hold the demo's photos, got none in {data}; give --images")
    shutil.rmtree(folder, ignore_errors=True)
    for path in photos:
        (folder / path.stem).mkdir(parents=True)
        with Image.open(path) as image:
            photo = image.convert("RGB")
        for number in range(NUM_VIEWS):
            rng = random.Random(f"{path.stem} {number}")
            view = augmented(photo, rng)
            view.save(folder / path.stem / f"{number:02d}.jpg", quality=rng.randint(30, 95))
    return len(photos) * NUM_VIEWS


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
        prepare(config)
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


_TILE = 156
_GAP = 16
_QUERY_GAP = 44
_MARGIN = 36
_CAPTION = 50
_HEADER = 136
_INK, _GREY, _PAPER, _MAT = "#1f2328", "#59636e", "#ffffff", "#f0f2f4"
_RIGHT, _WRONG, _ALARM = "#1a7f37", "#cf222e", "#fff1c2"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _badge(is_right: bool) -> Image.Image:
    """A tick or a cross in a disc, drawn large and made smaller for smooth edges."""
    badge = Image.new("RGBA", (112, 112))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((2, 2, 110, 110), fill=_RIGHT if is_right else _WRONG, outline=_PAPER, width=8)
    lines = [((32, 58), (50, 76), (82, 38))] if is_right else [((38, 38), (74, 74)), ((74, 38), (38, 74))]
    for line in lines:
        draw.line(line, fill=_PAPER, width=13, joint="curve")
    return badge.resize((28, 28), Image.Resampling.LANCZOS)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """`text`, with its middle left out where it is too long."""
    shown, kept = text, len(text)
    while kept > 2 and draw.textlength(shown, font) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[-(kept - kept // 2) :]}"
    return shown


def _thumbnail(path: Path) -> Image.Image | None:
    """The image at `path` to fit a tile, or None where it cannot be opened (a name that is not UTF-8)."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError):
        return None
    if abs(upright.width - upright.height) * _TILE <= 4 * max(upright.size):
        # As good as square: no hairline of the mat beside it.
        return upright.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    return ImageOps.contain(upright, (_TILE, _TILE), Image.Resampling.LANCZOS)


class Sheet:
    """A contact sheet: a header, and rows of a query with its neighbours."""

    def __init__(self, num_rows: int, num_neighbours: int) -> None:
        width = 2 * _MARGIN + _TILE + _QUERY_GAP + num_neighbours * (_TILE + _GAP) - _GAP
        height = _HEADER + num_rows * (_TILE + _CAPTION + _GAP) + _MARGIN - _GAP
        self.image = Image.new("RGB", (max(width, 760), height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def header(self, title: str, lines: list[str], alarm: str) -> None:
        """Title, what is seen in two lines, and what to beware of (none where empty)."""
        self._draw.text((_MARGIN, 24), title, _INK, _font(28))
        for number, line in enumerate(lines):
            self._draw.text((_MARGIN, 64 + number * 23), line, _GREY, _font(16))
        if alarm:
            font = _font(16)
            left = self.image.width - _MARGIN - self._draw.textlength(alarm, font) - 24
            self._draw.rounded_rectangle((left, 26, self.image.width - _MARGIN, 56), 15, _ALARM)
            self._draw.text((left + 12, 41), alarm, _INK, font, anchor="lm")

    def tile(self, row: int, column: int, path: Path, caption: str, detail: str, is_right: bool | None) -> None:
        """One image. Column 0 is the query; `is_right` is None where nothing is right or wrong."""
        left = _MARGIN + (column and _QUERY_GAP - _GAP + column * (_TILE + _GAP))
        top = _HEADER + row * (_TILE + _CAPTION + _GAP)
        colour = _INK if column == 0 else {None: _MAT, True: _RIGHT, False: _WRONG}[is_right]
        box = (left, top, left + _TILE, top + _TILE)
        self._draw.rectangle(box, _MAT)
        thumbnail = _thumbnail(path)
        if thumbnail is None:
            self._draw.text((left + _TILE // 2, top + _TILE // 2), "no preview", _GREY, _font(14), anchor="mm")
        else:
            x, y = (_TILE - thumbnail.width) // 2, (_TILE - thumbnail.height) // 2
            self.image.paste(thumbnail, (left + x, top + y))
        self._draw.rectangle((left - 4, top - 4, left + _TILE + 3, top + _TILE + 3), outline=colour, width=4)
        if column and is_right is not None:
            badge = _badge(is_right)
            self.image.paste(badge, (left + _TILE - 22, top - 8), badge)
        font = _font(14)
        self._draw.text((left, top + _TILE + 9), _fitted(self._draw, caption, font, _TILE), _INK, font)
        self._draw.text((left, top + _TILE + 27), detail, _GREY, font)


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
        f"\n{folder}: {words.count(rows, 'row')} in {words.count(len(parts), 'part')}, {num_bytes / 1e6:.1f} MB",
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
