"""The input spec as shards: brace ranges, globs, folders and list files, on disk or object storage."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import InputError, SettingsError
from pipeline.storage import FileInfo, list_files, locate, read_bytes, stat, to_url

SUFFIX = ".tar"
# Up to so many named shards of one folder are asked for one by one, more by listing the folder.
_STAT_AT_MOST = 16
_WILDCARD = re.compile(r"[*?\[]")


class Shard(NamedTuple):
    """One input `.tar`. `name` is its path below the input's prefix, without the suffix."""

    name: str
    url: str
    num_bytes: int
    version: str


class ShardSet(NamedTuple):
    """The shards of an input in the order of their names, and the URL prefix that their names lack."""

    prefix: str
    shards: list[Shard]


def find_shards(inputs: Iterable[str]) -> ShardSet:
    """Expand the input to shards with size and version.

    Each of `inputs` is a shard, a brace range (`{00000..00099}`), a glob (`*`, `?`, `[]`; `**` for any
    depth), a folder, or a list file (`.txt`, one of these a line; `#` begins a comment). The prefix is
    the folder below which all of them lie, before the first brace or wildcard.

    Raises:
        InputError: nothing found, a named shard is missing, or the store refuses.
        SettingsError: malformed braces, or two stores in one input.
    """
    patterns = [pattern for spec in inputs for pattern in _expand_list(spec)]
    located = [(locate(_before_brace(pattern)), pattern) for pattern in patterns]
    filesystems = {id(fs): fs for (fs, _), _ in located}
    if len(filesystems) != 1:
        raise SettingsError(f"input must lie in one store, got {len(filesystems)}: {', '.join(patterns[:4])}")
    fs = next(iter(filesystems.values()))
    folders = [_fixed_folder(fs, pattern) for pattern in patterns]
    root = os.path.commonpath(folders) if len(set(folders)) > 1 else folders[0]
    found: dict[str, FileInfo] = {}
    for pattern in patterns:
        for info in _find(fs, pattern):
            found[info.path] = info
    if not found:
        raise InputError(f"no {SUFFIX} shard found for input {' '.join(inputs)}")
    shards = [
        Shard(_name(root, info.path), to_url(fs, info.path), info.num_bytes, info.version)
        for info in sorted(found.values())
    ]
    return ShardSet(to_url(fs, root), shards)


def _expand_list(spec: str) -> Iterator[str]:
    if not spec.endswith(".txt"):
        yield spec
        return
    try:
        lines = read_bytes(spec).decode().splitlines()
    except FileNotFoundError as error:
        raise InputError(f"list file {spec} not found") from error
    for line in lines:
        entry = line.split("#", 1)[0].strip()
        if entry:
            yield entry


def _before_brace(pattern: str) -> str:
    return re.split(r"[{*?\[]", pattern, maxsplit=1)[0]


def _fixed_folder(fs: fsspec.AbstractFileSystem, pattern: str) -> str:
    """The folder of a pattern before its first brace or wildcard, in `fs`."""
    fixed = _before_brace(pattern)
    path = locate(fixed)[1]
    if fixed == pattern and not pattern.endswith(SUFFIX):
        return path.rstrip("/")  # a folder
    return path.rstrip("/") if fixed.endswith("/") else path.rpartition("/")[0]


def _find(fs: fsspec.AbstractFileSystem, pattern: str) -> Iterator[FileInfo]:
    try:
        paths = [locate(expanded)[1] for expanded in braceexpand(pattern)]
    except ValueError as error:
        raise SettingsError(f"input {pattern} has unbalanced braces") from error
    named: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if _WILDCARD.search(path):
            yield from _glob(fs, path)
        elif path.endswith(SUFFIX) and not (isinstance(fs, LocalFileSystem) and os.path.isdir(path)):
            named[path.rpartition("/")[0]].append(path)
        else:
            yield from (info for info in _list(fs, path) if info.path.endswith(SUFFIX))
    for folder, members in named.items():
        yield from _named(fs, folder, members)


def _list(fs: fsspec.AbstractFileSystem, folder: str, *, recursive: bool = True) -> Iterator[FileInfo]:
    try:
        yield from list_files(fs, folder, recursive=recursive)
    except Exception as error:
        raise InputError(f"cannot list {to_url(fs, folder)}: {type(error).__name__}: {error}") from error


def _glob(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[FileInfo]:
    fixed = _WILDCARD.split(path, maxsplit=1)[0].rpartition("/")[0]
    rest = path[len(fixed) + 1 :]
    matches = re.compile(_glob_regex(rest)).fullmatch
    for info in _list(fs, fixed, recursive="/" in rest or "**" in rest):
        if info.path.endswith(SUFFIX) and matches(info.path[len(fixed) + 1 :]):
            yield info


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression where `*` stays within a folder and `**` does not."""
    pieces = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern)
    wild = {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}
    return "".join(
        wild.get(piece) or (fnmatch.translate(piece)[4:-3] if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )


def _named(fs: fsspec.AbstractFileSystem, folder: str, paths: list[str]) -> Iterator[FileInfo]:
    missing = []
    if len(paths) > _STAT_AT_MOST:
        listed = {info.path: info for info in _list(fs, folder, recursive=False)}
        for path in paths:
            if path in listed:
                yield listed[path]
            else:
                missing.append(path)
    else:
        for path in paths:
            try:
                yield stat(fs, path)
            except FileNotFoundError:
                missing.append(path)
            except Exception as error:
                raise InputError(f"cannot look at {to_url(fs, path)}: {type(error).__name__}: {error}") from error
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        names = ", ".join(to_url(fs, path) for path in missing[:4])
        raise InputError(f"{len(missing)} of {len(paths)} shards named in the input are missing: {names}{more}")


def _name(root: str, path: str) -> str:
    name = path[len(root) :].lstrip("/").removesuffix(SUFFIX)
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InputError(f"shard {path} has a path that cannot name its output")
    return name
