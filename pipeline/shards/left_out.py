"""Files of an input that are no shards: counted by kind, so that none is passed over without a word."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping

SUFFIX = ".tar"
# What may hold a tar, and is not read; and the program that makes a `.tar` of it, where it is one compressed.
_ARCHIVES = {
    ".tgz": "gunzip", ".gz": "gunzip", ".tbz2": "bunzip2", ".bz2": "bunzip2", ".txz": "unxz", ".xz": "unxz",
    ".tzst": "unzstd", ".zst": "unzstd", ".lz4": "unlz4", ".zip": None, ".7z": None, ".rar": None,
}  # fmt: skip
# A piece that begins with a dot, and is not `.` or `..`, which no listing should have.
_HIDDEN_PIECE = re.compile(r"(?:^|/)\.(?!\.?(?:/|$))")
_HIDDEN, _NO_EXTENSION, _OTHERS = "hidden", "without an extension", "of other kinds"
_MAX_KINDS, _MAX_KINDS_SHOWN, _MAX_EXTENSION = 100, 8, 16


def is_tar(path: str) -> bool:
    """Whether a path is a shard's by its name."""
    return path[-len(SUFFIX) :].lower() == SUFFIX


def is_hidden(path: str) -> bool:
    """Whether a relative path is of a hidden file, or of one in a hidden folder."""
    return _HIDDEN_PIECE.search(path) is not None


def add_left_out(left_out: Counter[str], path: str) -> None:
    """Count one file, by its extension and that before it where it is `.tar`."""
    stem, extension = os.path.splitext(path.rpartition("/")[2].lower())
    if is_hidden(path):
        kind = _HIDDEN
    elif not extension:
        kind = _NO_EXTENSION
    else:
        kind = f"{SUFFIX}{extension}" if is_tar(stem) else extension
    is_known = kind in left_out or (len(left_out) < _MAX_KINDS and len(kind) <= _MAX_EXTENSION)
    left_out[kind if kind.isprintable() and (is_known or kind == _NO_EXTENSION) else _OTHERS] += 1


def archives_among(left_out: Mapping[str, int]) -> dict[str, int]:
    """Those that may hold a tar."""
    return {kind: count for kind, count in left_out.items() if kind.endswith(tuple(_ARCHIVES))}


def how_to_read(archives: Mapping[str, int]) -> str:
    """What makes shards of archives, such as `decompress them with gunzip`."""
    found = {program for end, program in _ARCHIVES.items() if any(kind.endswith(end) for kind in archives)}
    programs = " or ".join(f"`{program}`" for program in sorted(filter(None, found)))
    steps = [f"decompress them with {programs}"] if programs else []
    return ", and ".join([*steps, *(["make a .tar of each other one"] if None in found else [])])


def format_left_out(left_out: Mapping[str, int]) -> str:
    """In a few words, such as `2 .tar.gz, 1 .json`: what may hold a tar comes first."""
    archives = archives_among(left_out)
    kinds = sorted(left_out, key=lambda kind: (kind not in archives, kind == _OTHERS, -left_out[kind], kind))
    shown = [f"{left_out[kind]:,} {kind}" for kind in kinds[:_MAX_KINDS_SHOWN]]
    rest = sum(left_out[kind] for kind in kinds[_MAX_KINDS_SHOWN:])
    return ", ".join([*shown, *([f"and {rest:,} more"] if rest else [])])
