#!/usr/bin/env python3
"""Show the whole way on one machine: photos to shards, to Parquet, to nearest neighbours and near-duplicates."""

from __future__ import annotations

import argparse
import filecmp
import os
import shlex
import shutil
import socket
import sys
import time
from importlib import import_module
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import rich.console
import rich.panel
import rich.text

from shard_embedder.jobs.support.command import CommandError, Parser, from_here, local_path, run_command, to_type
from shard_embedder.jobs.support.exit_codes import EXIT_OK, EXIT_USAGE
from shard_embedder.jobs.support.neighbours import describe_score, draw_sheet, find_neighbours, read_stored
from shard_embedder.jobs.support.photos import NUM_VIEWS, make_views
from shard_embedder.pipeline.core.config import Config, Field
from shard_embedder.pipeline.core.errors import InputError, OutputError, WeightsError
from shard_embedder.pipeline.core.formatting import format_count, format_size
from shard_embedder.pipeline.core.schema import EMBEDDING
from shard_embedder.pipeline.output.names import EMBEDDINGS
from shard_embedder.pipeline.planning.job import prepare_job

NUM_NEIGHBOURS = 5
# Views are turned, cropped, flipped and blurred: they are less alike than images stored twice.
NEAR = 0.7
# Small shards for the photos, so that there are some.
VIEWS_A_SHARD = 64
IMAGES_A_SHARD = 1000
BACKBONE = "resnet18"
RANDOM = "random:0"
DOWNLOAD_TIMEOUT_S = 30
KEEP = ("cls", "json:class", "json:path")
_MARKER = "made-by-demo.txt"
_OUT = rich.console.Console(highlight=False, soft_wrap=True)
_EPILOG = """\
Without --images the demo takes the photos that scikit-image ships, makes a dozen augmented views of each, and
counts how often the nearest neighbour of a view is a view of the same photo. Only the weights are downloaded.
With --images it packs your own images as they are, and a neighbour is right if it lies in the same folder.
Run again with the same images and settings, the demo embeds nothing; with others, it embeds all of them.

Weights are torchvision's DEFAULT. If they cannot be downloaded, the demo says so and takes random ones.
"""
_EXIT_CODES = {
    EXIT_OK: "every step ran",
    EXIT_USAGE: "the demo cannot start; any other code is that of the step that failed",
}


def run_job(name: str, *arguments: str) -> None:
    """Run one of `jobs/`, and show how a user does. Raises `CommandError` with its exit code if it fails."""
    _OUT.print(f"$ {to_type(name)} {shlex.join(arguments)}", style="cyan", markup=False)
    command = import_module(f"shard_embedder.jobs.{Path(name).stem}")
    # The demo has its own settings, and its files are on this machine only.
    kept = {key: os.environ.pop(key) for key in [*os.environ] if key.startswith("EMBED_") or key == "RAY_ADDRESS"}
    try:
        code = command.main(list(arguments))
    finally:
        os.environ.update(kept)
    if code:
        raise CommandError(f"{name} ended with exit code {code}", code)


def pack(images: Path, shards: Path, output: Path, samples_a_shard: int) -> None:
    """Pack `images`. Shards that come out the same stay, and so does what was embedded from them."""
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


def choose_weights(backbone: str, weights: str | None, shards: Path, output: Path) -> str:
    """The weights to embed with: those asked for, else DEFAULT, else random ones with a notice.

    Removes an output that was made with other settings.

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
        _check_job(backbone, RANDOM, shards, output)
        _show_notice(str(error), backbone)
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
        _OUT.print("the output cannot be used with these settings: the demo removes it and embeds again")
        shutil.rmtree(output)


def _show_notice(fault: str, backbone: str) -> None:
    text = (
        f"{fault}\n\nThe demo goes on with RANDOM WEIGHTS. Every step runs as usual, but NEIGHBOURS MEAN LITTLE: "
        "these weights were never trained, and see light and coarse texture only. Near-duplicates are left out. "
        f"For real neighbours: {_again(backbone, weights=f'path/to/{backbone}.pth')}"
    )
    panel = rich.panel.Panel.fit(rich.text.Text(text), title="RANDOM WEIGHTS", style="bold yellow", padding=(1, 2))
    rich.console.Console(highlight=False, width=80).print("", panel)


def show_parquet(output: Path) -> None:
    """Print where the Parquet is and what is in it."""
    folder = output / EMBEDDINGS
    parts = sorted(folder.rglob("*.parquet"))
    tables = [pq.read_table(part) for part in parts]
    size = format_size(sum(part.stat().st_size for part in parts))
    rows = format_count(sum(map(len, tables)), "row")
    say = _OUT.print
    say(f"\n{from_here(folder)}: {rows} in {format_count(len(parts), 'part')}, {size}", style="bold", markup=False)
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


def claim_folder(folder: Path, images: Path | None) -> None:
    """Make `folder` the demo's own. Raises `InputError` if it has other content, or is inside `images`."""
    if images is not None and folder.is_relative_to(images):
        raise InputError(f"--output must lie outside of --images, got {str(folder)!r} in {str(images)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / _MARKER
    if any(folder.iterdir()) and not marker.exists():
        raise InputError(f"--output must be new, empty, or from an earlier demo, got {str(folder)!r}")
    marker.write_text("jobs/demo.py made this folder, and replaces what is in it.\n")


def run_demo(own_images: Path | None, folder: Path, backbone: str, weights: str | None) -> None:
    """The demo, from images to the contact sheet.

    Raises:
        CommandError: a step failed.
        PipelineError: a step cannot start.
    """
    started = time.monotonic()
    claim_folder(folder, own_images)
    shards, output, sheet, pairs = (folder / name for name in ("shards", "output", "contact-sheet.png", "pairs.html"))
    if own_images is not None:
        images = own_images
        _step(1, f"take the images in {images} as they are")
    else:
        images = folder / "views"
        _step(1, f"make {NUM_VIEWS} augmented views of each photo")
        _OUT.print(f"{make_views(images)} views in {images}", markup=False)

    _step(2, "pack them into WebDataset shards")
    pack(images, shards, output, VIEWS_A_SHARD if own_images is None else IMAGES_A_SHARD)

    _step(3, "embed the shards into Parquet")
    chosen = choose_weights(backbone, weights, shards, output)
    is_random = chosen.startswith("random")
    run_job(
        "embed.py", "--backbone", backbone, "--weights", chosen,
        "--input", str(shards), "--output", str(output), "--keep", *KEEP,
    )  # fmt: skip

    _step(4, "find the nearest neighbours of each image by cosine over the stored Parquet")
    stored = read_stored(output)
    show_parquet(output)
    pages = [output / "report.html"]
    if len(stored.ids) > 1:
        neighbours = find_neighbours(stored.embeddings, NUM_NEIGHBOURS)
        verdict = describe_score(stored, neighbours, "photo" if own_images is None else "folder")
        alarm = "random weights: neighbours mean little" if is_random else ""
        lines = [verdict, f"{backbone}, weights {Path(chosen).name}"]
        draw_sheet(stored, neighbours, images, lines, alarm).save(sheet)
        _OUT.print(f"\n{verdict}", style="bold", markup=False)
        pages = [sheet, *pages]
    else:
        _OUT.print("\none image has no neighbours: there is nothing to compare it with")

    pairs.unlink(missing_ok=True)
    if own_images is None and not is_random:
        _step(5, f"find pairs of views above a cosine of {NEAR}; those of one photo are right")
        run_job(
            "duplicates.py", str(output), "--threshold", str(NEAR), "--group-pattern", "^(.*)/[0-9]+$",
            "--pairs", str(pairs.with_suffix(".parquet")), "--html", str(pairs), "--input", str(shards),
        )  # fmt: skip
        pages.insert(1, pairs)

    took = f"{time.monotonic() - started:.0f} s"
    _OUT.print(
        f"\nmade  {format_count(len(stored.ids), 'embedding')} in {from_here(output / EMBEDDINGS)}, in {took}",
        markup=False,
    )
    _OUT.print(f"open  {', '.join(map(from_here, pages))}", markup=False)
    _OUT.print(f"next  {next_step(own_images, folder, backbone, RANDOM if is_random else weights)}", markup=False)


def next_step(own_images: Path | None, folder: Path, backbone: str, weights: str | None) -> str:
    """What to do after the demo, with a command that can be typed as the demo was."""
    if weights == RANDOM:
        return f"use trained weights: {_again(backbone, weights=f'path/to/{backbone}.pth')}"
    if own_images is None:
        return f"use your own photos: {_again(backbone, weights=weights, images='path/to/photos')}"
    index = shlex.quote(from_here(folder / "index"))
    output = shlex.quote(from_here(folder / "output"))
    search = f"{to_type('search.py')} {index} PHOTO" + (
        "" if weights is None else f" --weights {shlex.quote(weights)}"
    )
    return f"search by photo: {to_type('index.py')} {output} {index} && {search}"


def _again(backbone: str, *, weights: str | None, images: str | None = None) -> str:
    """The command that runs the demo again, as it was typed, with other weights or images."""
    # make takes no backbone.
    by_make = backbone == BACKBONE and to_type("demo.py").startswith("python ")
    names = ("WEIGHTS=", "IMAGES=") if by_make else ("--weights ", "--images ")
    parts = [f"{name}{shlex.quote(value)}" for name, value in zip(names, (weights, images), strict=True) if value]
    if by_make:
        return " ".join(["make demo", *parts])
    return " ".join([to_type("demo.py"), *([] if backbone == BACKBONE else [f"--backbone {backbone}"]), *parts])


def _step(number: int, text: str) -> None:
    _OUT.print(f"\n[{number}] {text}", style="bold green", markup=False)


def parser() -> Parser:
    """The command line."""
    top = Parser(
        "demo.py",
        description=__doc__,
        epilog=_EPILOG,
        examples=["--images photos/"],
        exit_codes=_EXIT_CODES,
        interrupted="run it again to go on",
    )
    top.add_argument(
        "--images", metavar="FOLDER", type=local_path, help="your own images (default: scikit-image's photos)"
    )
    top.add_argument(
        "--output",
        metavar="FOLDER",
        type=local_path,
        default=Path("demo"),
        help="folder for all results (default: demo)",
    )
    top.add_argument("--backbone", metavar="NAME", default=BACKBONE, help=f"as for embed.py (default: {BACKBONE})")
    top.add_argument(
        "--weights", metavar="W", help="as for embed.py (default: DEFAULT, or random:0 if it cannot be downloaded)"
    )
    return top


def _run(flags: argparse.Namespace) -> int:
    images = flags.images and flags.images.resolve()
    run_demo(images, flags.output.resolve(), flags.backbone, flags.weights)
    return EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Run the demo, and return its exit code: 0, 2 where it cannot start, or that of the step that failed."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
