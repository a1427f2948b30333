"""The frame of every command: its parser, the options that several have, its errors and its exit code."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shard_embedder.jobs.support.exit_codes import EXIT_TERMINATED, code_of
from shard_embedder.jobs.support.help_text import wrap
from shard_embedder.pipeline.core.errors import PipelineError, SettingsError
from shard_embedder.pipeline.core.redact import show

if TYPE_CHECKING:
    from shard_embedder.pipeline.retrieval.originals import Input

_INSTALLED = "shard-embedder "
COMMANDS = {
    "embed": "embed every image of WebDataset shards into Parquet: the job",
    "verify": "prove an output, or name its faults",
    "pack": "pack a folder of images into shards",
    "index": "build a FAISS index of an output",
    "search": "find the nearest embeddings of image files",
    "serve": "serve a page that searches an index by images you drop on it",
    "duplicates": "find near-duplicates in an output",
    "submit": "submit the job to a Ray cluster, and exit with its code",
    "demo": "show it all on sample photos",
}
_NAMES = re.compile(rf"(?<![\w/.])({'|'.join(COMMANDS)})\.py\b")


class CommandError(Exception):
    """Ends a command with this message and an exit code of its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def tell(prog: str, message: object) -> None:
    """Print a message of a command to standard error, without secrets."""
    print(f"{prog}: {show(str(message))}", file=sys.stderr, flush=True)


def as_typed(text: str) -> str:
    """Our own `text` with the names of commands as they are typed here: embed.py, or shard-embedder embed."""
    return _NAMES.sub(rf"{_INSTALLED}\1", text) if sys.argv[0].startswith(_INSTALLED) else text


def to_type(script: str) -> str:
    """How to run a command here: `python jobs/embed.py`, or `shard-embedder embed`."""
    typed = as_typed(script)
    return f"python jobs/{script}" if typed == script else typed


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Names commands as they are typed, and breaks no line at a hyphen."""

    def add_argument(self, action: argparse.Action) -> None:
        action.help = action.help and as_typed(action.help)
        super().add_argument(action)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(argparse.ArgumentParser):
    """The parser of one command. It does not reformat texts, and never shows a secret.

    Args:
        prog: the command's name.
        description: what the command does, for --help, and `epilog` what more there is to know.
        examples: arguments to copy, for --help.
        exit_codes: what each exit code means, for --help.
        interrupted: what an interrupted command leaves behind, or how to resume it; shown after "interrupted: ".
    """

    def __init__(
        self, prog: str, *, description: str | None = "", epilog: str = "", examples: Sequence[str] = (),
        exit_codes: Mapping[int, str] | None = None, interrupted: str = "", **options: Any,
    ) -> None:  # fmt: skip
        left = f": {interrupted}" if interrupted else ""
        if exit_codes:
            lines = "".join(f"  {code:<4} {meaning}\n" for code, meaning in exit_codes.items())
            epilog += f"\nexit codes:\n{lines}  130  interrupted (143 by SIGTERM){left}"
        prog = as_typed(prog)
        if examples:
            lines = "".join(f"  {prog} {arguments}\n" for arguments in examples)
            epilog = f"{'example' if len(examples) == 1 else 'examples'}:\n{lines}\n{epilog.lstrip()}"
        # As argparse does for the options.
        width = shutil.get_terminal_size().columns - 2
        super().__init__(
            prog,
            description=wrap(as_typed(description or ""), width),
            epilog=wrap(as_typed(epilog.strip("\n")), width),
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **options,
        )
        self.interrupted = f"interrupted{left}"

    def error(self, message: str) -> NoReturn:
        """Exit with 2 and the message on one line: the usage of some commands fills a screen."""
        self.exit(2, f"{self.prog}: error: {show(message)}; {self.prog} --help tells the options\n")

    def tell(self, message: object) -> None:
        """Print a message to standard error, without secrets."""
        tell(self.prog, message)


class _Terminated(SystemExit):
    """SIGTERM."""


def _terminate(number: int, frame: object) -> NoReturn:
    raise _Terminated(EXIT_TERMINATED)


def run_command(parser: Parser, arguments: list[str] | None, run: Callable[[argparse.Namespace], int]) -> int:
    """Parse the command line, call `run` with the result, and return the command's exit code.

    An error of the pipeline, of a disk or of a store becomes one line on standard error and the exit code of its
    class. So do Ctrl-C and SIGTERM, which reach `run` as exceptions, so that it can clean up.
    """
    flags = parser.parse_args(arguments)
    before = signal.getsignal(signal.SIGTERM)
    # Only the main thread can handle signals.
    hears = threading.current_thread() is threading.main_thread()
    if hears:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return run(flags)
    except CommandError as error:
        parser.tell(error)
        return error.exit_code
    except (PipelineError, OSError) as error:
        parser.tell(error)
        return code_of(error)
    except (KeyboardInterrupt, _Terminated) as stop:
        parser.tell(parser.interrupted)
        return code_of(stop)
    finally:
        if hears:
            signal.signal(signal.SIGTERM, before)


def add_output_argument(parser: Parser) -> None:
    """Add OUTPUT, which embed.py wrote."""
    parser.add_argument("output", type=not_empty, metavar="OUTPUT", help="folder or s3:// prefix that embed.py wrote")


def add_page_options(parser: Parser, page: str, *, also_for: str = "") -> None:
    """Add --html, which writes `page`, and --input, the shards whose images it shows."""
    parser.add_argument("--html", type=not_empty, metavar="FILE", help=f"also write {page}")
    add_input_option(parser, f"for --html{also_for}: ")


def add_input_option(parser: Parser, used_for: str = "") -> None:
    """Add --input, what the output was made of."""
    parser.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="URL",
        help=f"{used_for}the shards or the folder of images, named as for embed.py (default: what embed.py read)",
    )


def check_page_options(flags: argparse.Namespace) -> Input:
    """What --input names. Raises a `PipelineError` if that is nothing, or --html cannot be written."""
    # PyArrow and fsspec take a while to import: --help does not need them.
    from shard_embedder.pipeline.retrieval.originals import find_input  # noqa: PLC0415

    if flags.html is not None:
        check_file("--html", flags.html)
    return find_input(flags.input)


def check_file(option: str, path: str) -> None:
    """Raise `SettingsError` if no file can be written at the `path` of an option."""
    place = Path(path)
    if place.is_dir():
        raise SettingsError(f"{option} must be a file, got the folder {path!r}")
    if not place.parent.is_dir():
        raise SettingsError(f"{option} must be in a folder that is there, got {path!r}")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise SettingsError(f"{option} must be a file that can be written, got {path!r}")


def not_empty(text: str) -> str:
    """Argument type of a path or URL. An empty text would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def local_path(text: str) -> Path:
    """Argument type of a path on this machine."""
    return Path(not_empty(text))


def from_here(path: Path) -> str:
    """`path` as a person would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def at_least(least: int, *words: str) -> Callable[[str], int | str]:
    """Argument type of a whole number of at least `least`, or one of `words`, which stay text."""
    rule = " or ".join([*(f"`{word}`" for word in words), f"a whole number of at least {least}"])

    def parse(text: str) -> int | str:
        if text in words:
            return text
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be {rule}, got {text!r}")
        return number

    return parse
