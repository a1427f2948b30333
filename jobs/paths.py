"""Paths that a command is given, looked at before its work starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import SettingsError


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
    from pipeline.shards import find_shards  # noqa: PLC0415

    if path is not None:
        check_file("--html", path)
        if inputs:
            find_shards(inputs)
