"""What the command lines share: the parser, whose errors show no secret, and types of arguments."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pipeline.core.errors import SettingsError
from pipeline.core.redact import redact


def check_file(name: str, path: str) -> None:
    """Raise `SettingsError` where no file can be written at the `path` that the option `name` gives."""
    place = Path(path)
    if place.is_dir():
        raise SettingsError(f"{name} must be a file, got the folder {path!r}")
    if not place.parent.is_dir():
        raise SettingsError(f"{name} must be in a folder that is there, got {path!r}")
    if not os.access(place if place.exists() else place.parent, os.W_OK):
        raise SettingsError(f"{name} must be a file that can be written, got {path!r}")


def check_page(path: str | None, inputs: Sequence[str]) -> None:
    """Raise `SettingsError` where the page of --html cannot be written, or --input names no shard for it."""
    # PyArrow and fsspec take a while to import: who asks for help shall not wait for them.
    from pipeline.shards.find import find_shards  # noqa: PLC0415

    if path is not None:
        check_file("--html", path)
        if inputs:
            find_shards(inputs)


class Parser(argparse.ArgumentParser):
    """A command's: texts stay as they are written, options are not shortened, and no secret is shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """End with 2 and the message, in one line: some usages take a screen."""
        self.exit(2, f"{self.prog}: error: {redact(message)}; {self.prog} --help tells the options\n")

    def tell(self, error: object) -> None:
        """Print what went wrong after the usage was right."""
        print(f"{self.prog}: {redact(str(error))}", file=sys.stderr)


def not_empty(text: str) -> str:
    """The type of an argument that names a place: an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r}")
    return text


def local_path(text: str) -> Path:
    """The type of an argument that is a path on this machine."""
    return Path(not_empty(text))


def at_least(least: int, *words: str) -> Callable[[str], int | str]:
    """The type of an argument that is a whole number, or one of `words`, which stay as they are."""
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
