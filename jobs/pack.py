#!/usr/bin/env python3
"""Pack the images of a folder tree into WebDataset shards."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobs.support.command import Parser, at_least, local_path
from pipeline.core.errors import PipelineError, SettingsError
from pipeline.shards.keys import IMAGE_EXTENSIONS, printable
from pipeline.shards.pack import (
    Found,
    PackConfig,
    Packed,
    check_old_shards,
    count_of,
    describe_left_out,
    find_images,
    pack,
)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
LINE_EVERY_S = 30.0
_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_EPILOG = """\
A sample has three members: KEY.<extension> (the file's own bytes), KEY.json (its path below FOLDER and its
class) and KEY.cls (the number of its class).

key    the path below FOLDER without the extension: dogs/rex.jpg is dogs/rex. As a key ends at the first dot
       of the basename, a dot before that is written %2E; so are, as %XX of their UTF-8 bytes, the characters
       % ~ and backslash, and what cannot be printed. urllib.parse.unquote gives the name back.
       Where images differ only in their extension, each keeps it: rex~jpg and rex~png.
class  the folder that the image lies in, as a path below FOLDER; its number is its place among all such
       folders in sorted order. An image directly in FOLDER has no class, and no .cls.

Files that are no images, and hidden ones (.name), are left out, counted and told. Links are followed, but
not out of FOLDER without --follow-links, and not to a folder that holds them. The same images give the same
shards, bit for bit. Shards appear in SHARDS when all are written, the first of them last: a set that was
interrupted lacks number 00000.

exit codes:
  0    every image is packed
  1    an image could not be read, or a shard not written
  2    wrong usage: no such folder, no images, or SHARDS holds shards already
  130  interrupted (143 by SIGTERM)
"""


def parse_bytes(text: str) -> int:
    """`N`, or `N` with KiB, MiB or GiB, as a number of bytes. Raises `SettingsError`."""
    match = re.fullmatch(r"(\d+)\s*([KMG]iB)?", text.strip(), re.IGNORECASE)
    if not match:
        raise SettingsError(f"max_bytes must be N, NKiB, NMiB or NGiB, got {text!r}")
    return int(match.group(1)) * _UNITS[(match.group(2) or "").upper()]


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """Show progress while the block runs: a bar on a terminal, a line every 30 s elsewhere."""
    if sys.stderr.isatty():
        columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=rich.console.Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda: bar.advance(task)
        return
    done, last = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= LINE_EVERY_S:
            last = time.monotonic()
            print(f"packed {done} of {total} images", file=sys.stderr, flush=True)

    yield advance


def _print_summary(config: PackConfig, found: Found, packed: Packed) -> None:
    num_classes = len({image.label for image in found.images} - {""})
    without = sum(not image.label for image in found.images)
    classes = count_of(num_classes, "class") + (f" ({count_of(without, 'image')} without one)" if without else "")
    names = packed.names[0] if len(packed.names) == 1 else f"{packed.names[0]} to {packed.names[-1]}"
    print(f"packed {count_of(packed.num_images, 'image')} ({decimal(packed.num_bytes)}) of {classes}")
    print(f"into   {count_of(len(packed.names), 'shard')} in {printable(str(config.shards))}: {names}")
    if found.left_out:
        print(describe_left_out(found.left_out))


def parser() -> Parser:
    """The command line."""
    top = Parser(
        prog="pack.py",
        description=__doc__,
        epilog=_EPILOG,
    )
    top.add_argument("folder", metavar="FOLDER", type=local_path, help="images, in folders of any depth")
    top.add_argument(
        "shards", metavar="SHARDS", type=local_path, help="folder for the shards, made where it is missing"
    )
    top.add_argument(
        "--follow-links", action="store_true", help="follow links that lead out of FOLDER, too: it must be trusted"
    )
    top.add_argument("--prefix", metavar="NAME", default="images", help="shards are NAME-00000.tar ... (images)")
    top.add_argument("--max-samples", metavar="N", type=at_least(1), default=10_000, help="samples a shard (10000)")
    top.add_argument(
        "--max-bytes",
        metavar="N",
        default="1GiB",
        help="size of a shard in bytes, or with KiB, MiB, GiB (1GiB); a single larger image is a shard of its own",
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


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Pack, and return the exit code."""
    top = parser()
    flags = vars(top.parse_args(arguments))
    signal.signal(signal.SIGTERM, _terminate)
    try:
        flags["max_bytes"] = parse_bytes(flags["max_bytes"])
        flags["extensions"] = tuple(extension.lower().lstrip(".") for extension in flags["extensions"])
        config = PackConfig(**flags)
        check_old_shards(config)
        found = find_images(config.folder, config.extensions, follow_links=config.follow_links)
        with progress(len(found.images)) as on_image:
            packed = pack(config, found, on_image)
        _print_summary(config, found, packed)
        return EXIT_OK
    except PipelineError as error:
        top.tell(error)
        return EXIT_USAGE
    except OSError as error:
        top.tell(f"{error}; SHARDS has no whole new set of shards")
        return EXIT_FAILED
    except KeyboardInterrupt:
        top.tell("interrupted; SHARDS has no whole new set of shards")
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
