"""The input spec as shards: brace ranges, globs, folders and list files, on disk or object storage."""

from __future__ import annotations

import fnmatch
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import fsspec
from braceexpand import braceexpand
from fsspec.implementations.local import LocalFileSystem

from pipeline.core.errors import InputError, SettingsError
from pipeline.core.formatting import format_count
from pipeline.core.redact import REFUSAL, describe, has_secret
from pipeline.core.retries import LIMITS, StoreLimits, with_retries
from pipeline.core.storage import FileInfo, list_files, locate, read_bytes, stat, to_url, without_gc
from pipeline.shards.left_out import SUFFIX, add_left_out, archives_among, format_left_out, is_hidden, is_tar


class Pending(NamedTuple):
    """A shard to embed, and which of its parts are already stored."""

    name: str
    url: str
    num_bytes: int
    version: str
    stored_parts: tuple[int, ...] = ()


# Up to so many named shards of one folder are asked for one by one, more by listing the folder.
_STAT_AT_MOST = 16
_STATS_AT_ONCE = 32
_MAX_NAMED = 10_000_000
# A part's file is named after its shard, with 40 bytes more, and file systems take 255.
_MAX_BASENAME_BYTES = 200
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)")
_WILDCARD = re.compile(r"[*?\[]")
# A path with a piece that is empty, `.` or `..`.
_NO_NAME = re.compile(r"(?:^|/)\.{0,2}(?:/|$)")


class Shard(NamedTuple):
    """One input `.tar`. `name` is its path below the input's prefix, without the suffix (`.TAR` stays)."""

    name: str
    url: str
    num_bytes: int
    version: str


class ShardSet(NamedTuple):
    """The shards of an input in the order of their names, and the URL prefix that their names lack.

    `left_out` counts the other files that folders and globs of the input hold, by kind, such as `.tar.gz`.
    """

    prefix: str
    shards: list[Shard]
    left_out: Counter[str]


@without_gc()
def find_shards(inputs: Iterable[str], limits: StoreLimits = LIMITS) -> ShardSet:
    """Expand the input to shards with size and version.

    Each of `inputs` is a shard, a brace range (`{00000..00099}`), a glob (`*`, `?`, `[]`; `**` for any
    depth), a folder, or a list file (`.txt`: one of these a line, as they would be given here; `#` at
    the begin of a line or after a space begins a comment). What is named must be there: every
    alternative in braces, every folder, and at least one shard for each glob. In folders and globs,
    other files than `.tar` (or `.TAR`) and names that begin with a dot are left out, and counted; a file
    that two of the inputs reach counts twice. The prefix is the folder below which all of the input lies,
    before the first brace or wildcard.

    Raises:
        InputError: nothing found, a named shard is missing, or the store refuses.
        SettingsError: credentials, malformed braces, or two stores in one input.
    """
    inputs = list(inputs)
    # Before anything that shows one of them.
    if any(map(has_secret, inputs)):
        raise SettingsError(f"input {REFUSAL}")
    patterns = [pattern for spec in inputs for pattern in _expand_list(spec, limits)]
    if not patterns:
        raise InputError(f"no shard is named in input {' '.join(inputs)}")
    fixed = [_fixed_folder(pattern, limits) for pattern in patterns]
    filesystems = {id(fs): fs for fs, _ in fixed}
    if len(filesystems) != 1:
        raise SettingsError(f"input must lie in one store, got {len(filesystems)}: {', '.join(patterns[:4])}")
    fs = next(iter(filesystems.values()))
    folders = {folder for _, folder in fixed}
    root = os.path.commonpath(folders) if len(folders) > 1 else folders.pop()
    found: dict[str, FileInfo] = {}
    named: dict[str, list[str]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        for spec in _expand_braces(pattern):
            if _WILDCARD.search(spec):
                _add(found, partial(_glob, fs, spec, limits), spec, left_out)
                continue
            path = locate(spec, limits)[1]
            if _is_shard(fs, spec, path):
                named[path.rpartition("/")[0]].append(path)
            else:
                _add(found, partial(_below, fs, path, limits), spec, left_out)
    found.update(_named(fs, named, limits))
    # One at a time, since a million infos beside a million shards would be twice the memory.
    paths = sorted(found)
    for path in paths:
        if not path.endswith(SUFFIX) and path + SUFFIX in found:
            raise InputError(f"shards must have names of their own, got {path} and {path}{SUFFIX}")
    shards = list(_shards(fs, root, (found.pop(path) for path in paths)))
    return ShardSet(to_url(fs, root), shards, left_out)


def shards_below(folder: str, limits: StoreLimits = LIMITS) -> list[Shard]:
    """The shards below a folder, whose name is taken as it stands, in the order of their names.

    Raises:
        InputError: it cannot be listed, or there are none.
    """
    fs, path = locate(folder, limits)
    found: dict[str, FileInfo] = {}
    _add(found, partial(_below, fs, path, limits), folder, Counter())
    return list(_shards(fs, path, sorted(found.values())))


def _shards(fs: fsspec.AbstractFileSystem, root: str, infos: Iterable[FileInfo]) -> Iterator[Shard]:
    inside = f"{root.rstrip('/')}/" if root else ""
    url = to_url(fs, inside)
    for path, num_bytes, version in infos:
        yield Shard(_name(inside, path), f"{url}{path[len(inside) :]}", num_bytes, version)


def _expand_list(spec: str, limits: StoreLimits) -> Iterator[str]:
    if not spec.endswith(".txt"):
        yield spec
        return
    try:
        text = read_bytes(spec, limits).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"list file {spec} not found") from error
    except SettingsError:
        raise
    except Exception as error:
        raise InputError(f"list file {spec} cannot be read: {describe(error)}") from error
    for number, line in enumerate(text.split("\n"), 1):
        entry = re.sub(r"(^|\s)#.*", "", line).strip()
        if has_secret(entry):
            raise SettingsError(f"list file {spec} must not carry credentials, and does in line {number}")
        if entry.endswith(".txt"):
            raise InputError(f"list file {spec} names another list file: {entry}")
        if entry:
            yield entry


def _expand_braces(pattern: str) -> Iterator[str]:
    # Before braceexpand, which holds whole ranges.
    ranges = [abs(int(match[2]) - int(match[1])) + 1 for match in _RANGE.finditer(pattern)]
    if math.prod(ranges) > _MAX_NAMED:
        raise SettingsError(f"the braces of input {pattern} must name at most {_MAX_NAMED} shards")
    try:
        yield from braceexpand(pattern)
    except ValueError as error:
        raise SettingsError(f"input {pattern} has unbalanced braces") from error


def _split_fixed(pattern: str) -> tuple[str, str]:
    """A pattern with wildcards or braces as the folder before the first of them, and the rest."""
    start = min(pattern.find(mark) for mark in "{*?[" if mark in pattern)
    folder, slash, begun = pattern[:start].rpartition("/")
    # The folder of `*.tar` is the working folder, of `/*.tar` the root, of `s3://*/a.tar` the store.
    folder = "." if not slash else folder + slash if not folder or folder.endswith(":/") else folder
    return folder, begun + pattern[start:]


def _fixed_folder(pattern: str, limits: StoreLimits) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store and folder of a pattern before its first brace or wildcard."""
    if re.search(r"[{*?\[]", pattern):
        fs, path = locate(_split_fixed(pattern)[0], limits)
        return fs, path.rstrip("/") or path
    fs, path = locate(pattern, limits)
    return fs, (path.rpartition("/")[0] if _is_shard(fs, pattern, path) else path)


def _is_shard(fs: fsspec.AbstractFileSystem, spec: str, path: str) -> bool:
    """Whether a spec without wildcards names a shard, and not a folder."""
    is_folder = spec.endswith("/") or (isinstance(fs, LocalFileSystem) and os.path.isdir(path))
    return is_tar(path) and not is_folder


def _add(
    found: dict[str, FileInfo],
    listing: Callable[[Counter[str]], Iterator[FileInfo]],
    spec: str,
    left_out: Counter[str],
) -> None:
    count = 0
    others: Counter[str] = Counter()
    for info in listing(others):
        found[info.path] = info
        count += 1
    if not count:
        raise InputError(f"no {SUFFIX} shard found for input {spec}{_why_none(spec, others)}")
    left_out.update(others)


def _why_none(spec: str, left_out: Mapping[str, int]) -> str:
    """What is known of a spec that gave no shard."""
    archives = archives_among(left_out)
    if archives:
        return f"; it holds {format_left_out(archives)}, and only plain {SUFFIX} is read: decompress them"
    if _WILDCARD.search(spec):
        if not os.path.exists(spec):
            return ""
        return ", whose *, ? and [] stand for other characters; in brackets, as [[], they stand for themselves"
    if "://" in spec:
        return ""
    if not os.path.exists(spec):
        return ": there is no such folder"
    if os.path.isdir(spec):
        return "; jobs/pack.py makes shards of a folder of images"
    return f": a file must be a {SUFFIX}, or a .txt list of what an input may be"


def _below(
    fs: fsspec.AbstractFileSystem,
    folder: str,
    limits: StoreLimits,
    left_out: Counter[str],
    *,
    recursive: bool = True,
    matches: Callable[[str], object] = lambda path: True,
) -> Iterator[FileInfo]:
    """Shards below a folder that are neither hidden nor in a hidden folder, by those paths in it that `matches`.

    The other files are counted in `left_out`.
    """
    start = len(folder.rstrip("/")) + 1
    for info in _list(fs, folder, limits, recursive=recursive):
        path = info.path[start:]
        # A path that ends in a slash is a store's mark of a folder.
        if path[-1:] in ("", "/") or not matches(path):
            continue
        if is_tar(path) and not is_hidden(path):
            yield info
        else:
            add_left_out(left_out, path)


def _list(fs: fsspec.AbstractFileSystem, folder: str, limits: StoreLimits, *, recursive: bool) -> Iterator[FileInfo]:
    try:
        yield from list_files(fs, folder, recursive=recursive, limits=limits)
    except Exception as error:
        raise InputError(f"cannot list {to_url(fs, folder)}: {describe(error)}") from error


def _glob(
    fs: fsspec.AbstractFileSystem, spec: str, limits: StoreLimits, left_out: Counter[str]
) -> Iterator[FileInfo]:
    fixed, rest = _split_fixed(spec)
    matches = re.compile(_glob_regex(rest), re.DOTALL).fullmatch
    is_deep = "/" in rest or "**" in rest
    return _below(fs, locate(fixed, limits)[1], limits, left_out, recursive=is_deep, matches=matches)


def _glob_regex(pattern: str) -> str:
    """A glob as a regular expression where `*` stays within a folder and `**` does not."""
    pieces = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", pattern)
    wild = {"*": "[^/]*", "?": "[^/]", "**": ".*", "**/": "(?:.*/)?"}
    return "".join(
        wild.get(piece) or ("(?!/)" + fnmatch.translate(piece)[4:-3] if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )


def _named(
    fs: fsspec.AbstractFileSystem, named: dict[str, list[str]], limits: StoreLimits
) -> Iterator[tuple[str, FileInfo]]:
    """Look at the shards that the input names, by folder."""
    missing: list[str] = []
    single = [path for paths in named.values() if len(paths) <= _STAT_AT_MOST for path in paths]
    with ThreadPoolExecutor(_STATS_AT_ONCE, thread_name_prefix="look") as pool:
        for path, info in zip(single, pool.map(lambda path: _look(fs, path, limits), single), strict=True):
            if info is None:
                missing.append(path)
            else:
                yield path, info
    for folder, paths in named.items():
        if len(paths) > _STAT_AT_MOST:
            wanted = set(paths)
            for info in _list(fs, folder, limits, recursive=False):
                if info.path in wanted:
                    wanted.discard(info.path)
                    yield info.path, info
            missing += wanted
    if missing:
        total = sum(map(len, named.values()))
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        names = ", ".join(to_url(fs, path) for path in sorted(missing)[:4])
        raise InputError(
            f"{len(missing)} of {format_count(total, 'shard')} named in the input not found: {names}{more}"
        )


def _look(fs: fsspec.AbstractFileSystem, path: str, limits: StoreLimits) -> FileInfo | None:
    url = to_url(fs, path)
    try:
        return with_retries(f"looking at {url}", lambda: stat(fs, path, limits), limits)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        raise InputError(f"cannot look at {url}: {describe(error)}") from error


def _name(inside: str, path: str) -> str:
    """A shard's path below the folder `inside`, without the suffix; checked, as it names files."""
    name = path[len(inside) :].removesuffix(SUFFIX)
    base = name.rpartition("/")[2]
    try:
        # All of it: the prefix is told in run.json.
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"shard {path!a} cannot name its output: its path must be UTF-8") from error
    if not path.startswith(inside) or _NO_NAME.search(name):
        raise InputError(f"shard {path} cannot name its output: it must lie below {inside}, and no `..` in its path")
    if len(base.encode()) > _MAX_BASENAME_BYTES:
        raise InputError(
            f"shard {path} cannot name its output: its name must have at most {_MAX_BASENAME_BYTES} bytes"
        )
    return name
