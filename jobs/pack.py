#!/usr/bin/env python3
"""Pack the images of a folder tree into WebDataset shards."""

from __future__ import annotations

import argparse
import re
import sys

from shard_embedder.jobs.support.command import Parser, at_least, local_path, run_command
from shard_embedder.jobs.support.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_USAGE
from shard_embedder.jobs.support.progress import plain_console, show_progress
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import format_count, format_size
from shard_embedder.pipeline.decoding.versions import INSTALL_HEIF, heif_version
from shard_embedder.pipeline.shards.keys import HEIF_EXTENSIONS, IMAGE_EXTENSIONS, printable
from shard_embedder.pipeline.shards.pack import (
    Found,
    PackConfig,
    Packed,
    check_old_shards,
    describe_left_out,
    find_images,
    pack,
)

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NOTHING_WHOLE = "SHARDS has no whole new set of shards"
_EPILOG = """\
A sample has three members: KEY.<extension> (the file's own bytes), KEY.json (its path below FOLDER and its
class) and KEY.cls (the number of its class).

key    the path below FOLDER without the extension: dogs/rex.jpg is dogs/rex. A key ends at the first dot of
       the basename, so dots before that are written %2E. The characters % ~ and backslash, and what cannot be
       printed, are written as %XX of their UTF-8 bytes. urllib.parse.unquote gives the name back.
       Images that differ only in their extension keep it: rex~jpg and rex~png.
class  the folder of the image, as a path below FOLDER. Its number is its place among all such folders in
       sorted order. An image directly in FOLDER has no class, and no .cls.

Other files, and hidden ones (.name), are left out; the command counts them. Links are followed, but not out of
FOLDER without --follow-links, and not to a folder that holds them. The same images give the same shards, bit for bit.
Shards appear in SHARDS when all are written, the first of them last: an interrupted set lacks number 00000.
"""
_EXIT_CODES = {
    EXIT_OK: "every image is packed",
    EXIT_USAGE: "wrong usage: no such folder, no images, or SHARDS holds shards already",
    EXIT_FAILED: f"an image could not be read, or a shard not written; {_NOTHING_WHOLE}",
}


def parse_bytes(text: str) -> int:
    """`N`, or `N` with KiB, MiB or GiB, as a number of bytes. Raises `SettingsError`."""
    match = re.fullmatch(r"(\d+)\s*([KMG]iB)?", text.strip(), re.IGNORECASE)
    if not match:
        raise SettingsError(f"max_bytes must be N, NKiB, NMiB or NGiB, got {text!r}")
    return int(match.group(1)) * _UNITS[(match.group(2) or "").upper()]


def _print_summary(config: PackConfig, found: Found, packed: Packed) -> None:
    num_classes = len({image.label for image in found.images} - {""})
    without = sum(not image.label for image in found.images)
    classes = format_count(num_classes, "class", "classes")
    if without:
        classes += f" ({format_count(without, 'image')} without one)"
    names = packed.names[0] if len(packed.names) == 1 else f"{packed.names[0]} to {packed.names[-1]}"
    print(f"packed {format_count(packed.num_images, 'image')} ({format_size(packed.num_bytes)}) of {classes}")
    print(f"into   {format_count(len(packed.names), 'shard')} in {printable(str(config.shards))}: {names}")
    num_heif = sum(image.extension in HEIF_EXTENSIONS for image in found.images)
    if num_heif and heif_version() is None:
        print(
            f"HEIC   {format_count(num_heif, 'image')} of these, for which the job needs pillow-heif: {INSTALL_HEIF}"
        )
    if found.left_out:
        print(describe_left_out(found.left_out))


def parser() -> Parser:
    """The command line."""
    top = Parser(
        "pack.py",
        description=__doc__,
        epilog=_EPILOG,
        examples=["photos/ shards/"],
        exit_codes=_EXIT_CODES,
        interrupted=_NOTHING_WHOLE,
    )
    top.add_argument("folder", metavar="FOLDER", type=local_path, help="images, in folders of any depth")
    top.add_argument(
        "shards", metavar="SHARDS", type=local_path, help="folder for the shards; created when it is missing"
    )
    top.add_argument(
        "--follow-links", action="store_true", help="follow links that lead out of FOLDER, too: it must be trusted"
    )
    top.add_argument(
        "--prefix", metavar="NAME", default="images", help="shards are NAME-00000.tar ... (default: images)"
    )
    top.add_argument(
        "--max-samples", metavar="N", type=at_least(1), default=10_000, help="samples a shard (default: 10000)"
    )
    top.add_argument(
        "--max-bytes",
        metavar="N",
        default="1GiB",
        help="size of a shard in bytes, or with KiB, MiB, GiB (default: 1GiB); a larger image gets its own shard",
    )
    top.add_argument(
        "--extensions",
        metavar="EXT",
        nargs="+",
        default=list(IMAGE_EXTENSIONS),
        help=f"which files are images, in upper or lower case ({' '.join(IMAGE_EXTENSIONS)})",
    )
    top.add_argument("--overwrite", action="store_true", help="replace the shards of this prefix in SHARDS")
    return top


def _run(flags: argparse.Namespace) -> int:
    settings = vars(flags)
    settings["max_bytes"] = parse_bytes(flags.max_bytes)
    settings["extensions"] = tuple(extension.lower().lstrip(".") for extension in flags.extensions)
    config = PackConfig(**settings)
    check_old_shards(config)
    found = find_images(config.folder, config.extensions, follow_links=config.follow_links)
    try:
        with show_progress(plain_console(stderr=True)) as on_progress:
            packed = pack(config, found, on_progress)
    except OSError as error:
        raise OSError(f"{error}; {_NOTHING_WHOLE}") from error
    _print_summary(config, found, packed)
    return EXIT_OK


def main(arguments: list[str] | None = None) -> int:
    """Pack, and return the exit code."""
    return run_command(parser(), arguments, _run)


if __name__ == "__main__":
    sys.exit(main())
