"""The input spec as shards: brace ranges, globs, folders and list files, on disk or object storage."""

from __future__ import annotations

import fnmatch
import itertools
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

from shard_embedder.pipeline.core.errors import InputError, NoShardError, SettingsError, StoreError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.redact import REFUSAL, describe, has_secret
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits, with_retries
from shard_embedder.pipeline.core.storage import (
    UNKNOWN_SIZE,
    FileInfo,
    is_http,
    list_files,
    locate,
    missing_bucket,
    read_bytes,
    stat,
    to_url,
    without_gc,
)
from shard_embedder.pipeline.shards.keys import printable
from shard_embedder.pipeline.shards.left_out import (
    SUFFIX,
    add_left_out,
    archives_among,
    format_left_out,
    how_to_read,
    is_hidden,
    is_tar,
)


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
_HTTP = ("http://", "https://")
_WILDCARD = re.compile(r"[*?\[]")
# A piece that begins with a dot, and is not `.` or `..`, which no listing should have.
_HIDDEN = re.compile(r"/\.(?!\.?(?:/|$))")
# A path with a piece that is empty, `.` or `..`.
_NO_NAME = re.compile(r"(?:^|/)\.{0,2}(?:/|$)")


class Shard(NamedTuple):
    """One input `.tar`. `name` is its path below the input's prefix, without the suffix (`.TAR` stays)."""

    name: str
    url: str
    num_bytes: int
    version: str


class Refused(NamedTuple):
    """A shard of the input that cannot be embedded, and why. `name` can be stored, whatever the true one is."""

    name: str
    reason: str


class ShardSet(NamedTuple):
    """The shards of an input in the order of their names, and the URL prefix that their names lack.

    `left_out` counts the other files that folders and globs of the input hold, by kind, such as `.tar.gz`.
    """

    prefix: str
    shards: list[Shard]
    refused: list[Refused]
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

    A shard whose name cannot name an output, or that its web server cannot give piece by piece, is refused alone.
    A web server's URL is named by its path: a `?` there begins a query, and is no wildcard.

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
    inside = _shared_folder({folder for _, folder in fixed})
    if not _is_utf8(inside):
        raise InputError(f"the folder of the input must be UTF-8, got {inside!a}")
    found: dict[str, FileInfo] = {}
    named: dict[str, list[str]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        for spec in _expand_braces(pattern):
            if _has_wildcard(spec):
                _add(found, partial(_glob, fs, spec, limits), spec, left_out, limits)
                continue
            path = locate(spec, limits)[1]
            if _is_shard(fs, spec, path):
                named[_without_query(path).rpartition("/")[0]].append(path)
            else:
                _add(found, partial(_below, fs, path, limits), spec, left_out, limits)
    unknown = [path for path, info in found.items() if info.num_bytes == UNKNOWN_SIZE]
    refused: list[Refused] = []
    for path, info in itertools.chain(_named(fs, named, limits), _look_at(fs, unknown, limits)):
        if isinstance(info, FileInfo):
            found[path] = info
        else:
            found.pop(path, None)
            refused.append(Refused(printable(_name(inside, path)), info or "it is listed, and not there"))
    for path in found:
        if not path.endswith(SUFFIX) and path + SUFFIX in found:
            raise InputError(f"shards must have names of their own, got {path} and {path}{SUFFIX}")
    shards = _shards(fs, inside, found, refused)
    if is_http(fs) and len({shard.name for shard in shards}) < len(shards):
        raise InputError("two URLs of the input differ in their query alone: a shard is named by its path")
    root = inside if inside.rstrip("/") in ("", "http:", "https:") else inside.removesuffix("/")
    return ShardSet(root if is_http(fs) else to_url(fs, root), shards, sorted(refused), left_out)


def shards_below(folder: str, limits: StoreLimits = LIMITS) -> list[Shard]:
    """The shards below a folder, whose name is taken as it stands, in the order of their names.

    Raises:
        InputError: it cannot be listed, or there are none.
    """
    fs, path = locate(folder, limits)
    found: dict[str, FileInfo] = {}
    _add(found, partial(_below, fs, path, limits), folder, Counter(), limits)
    return _shards(fs, _shared_folder({path.rstrip("/") or path}), found, [])


def _shared_folder(folders: set[str]) -> str:
    """The folder that all of `folders` are or lie in, with a slash at its end; empty where that is the store."""
    shared: list[str] = []
    for pieces in zip(*(folder.rstrip("/").split("/") if folder else [] for folder in folders), strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return "".join(f"{piece}/" for piece in shared)


def _shards(
    fs: fsspec.AbstractFileSystem, inside: str, found: dict[str, FileInfo], refused: list[Refused]
) -> list[Shard]:
    """`found`, which this empties, in the order of the paths; those whose names cannot be are added to `refused`."""
    url = inside if is_http(fs) else to_url(fs, inside)
    shards: list[Shard] = []
    # One at a time, since a million infos beside a million shards would be twice the memory.
    for path in sorted(found):
        _, num_bytes, version = found.pop(path)
        name = _name(inside, path)
        if not path.startswith(inside):
            raise InputError(f"shard {path} cannot name its output: it must lie below {inside}")
        if fault := _name_fault(name):
            refused.append(Refused(printable(name), fault))
        else:
            shards.append(Shard(name, f"{url}{path[len(inside) :]}", num_bytes, version))
    return shards


def _expand_list(spec: str, limits: StoreLimits) -> Iterator[str]:
    if not _without_query(spec).endswith(".txt"):
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
        if _without_query(entry).endswith(".txt"):
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
    pattern = _without_query(pattern)
    if "{" in pattern or _has_wildcard(pattern):
        fs, path = locate(_split_fixed(pattern)[0], limits)
        return fs, path.rstrip("/") or path
    fs, path = locate(pattern, limits)
    return fs, (path.rpartition("/")[0] if _is_shard(fs, pattern, path) else path.rstrip("/") or path)


def _without_query(url: str) -> str:
    """A web server's URL without what comes after its path; elsewhere a question mark is a name's, or a wildcard."""
    return url.partition("?")[0] if url.startswith(_HTTP) else url


def _has_wildcard(spec: str) -> bool:
    if spec.startswith(_HTTP):
        # In the path alone: a host may be an address in brackets.
        return bool(re.search(r"/.*[*\[]", _without_query(spec).partition("://")[2]))
    return bool(_WILDCARD.search(spec))


def _is_shard(fs: fsspec.AbstractFileSystem, spec: str, path: str) -> bool:
    """Whether a spec without wildcards names a shard, and not a folder."""
    is_folder = spec.endswith("/") or (isinstance(fs, LocalFileSystem) and os.path.isdir(path))
    return is_tar(_without_query(path)) and not is_folder


def _add(
    found: dict[str, FileInfo],
    listing: Callable[[Counter[str]], Iterator[FileInfo]],
    spec: str,
    left_out: Counter[str],
    limits: StoreLimits,
) -> None:
    count = 0
    others: Counter[str] = Counter()
    for info in listing(others):
        found[info.path] = info
        count += 1
    if not count:
        raise NoShardError(f"no {SUFFIX} shard found for input {spec}{_why_none(spec, others, limits)}")
    left_out.update(others)


def _why_none(spec: str, left_out: Mapping[str, int], limits: StoreLimits) -> str:
    """What is known of a spec that gave no shard."""
    archives = archives_among(left_out)
    if archives:
        return f"; it holds {format_left_out(archives)}, and only plain {SUFFIX} is read: {how_to_read(archives)}"
    if "://" in spec:
        return _no_bucket(*locate(spec, limits), limits)
    if _has_wildcard(spec):
        if not os.path.exists(spec):
            return ""
        return ", whose *, ? and [] stand for other characters; in brackets, as [[], they stand for themselves"
    if not os.path.exists(spec):
        return ": there is no such folder"
    if os.path.isdir(spec):
        return "; a folder of images must hold an image, and be the only input"
    return f": a file must be a {SUFFIX}, or a .txt list of what an input may be; for images, name their folder"


def _no_bucket(fs: fsspec.AbstractFileSystem, path: str, limits: StoreLimits) -> str:
    bucket = missing_bucket(fs, path, limits)
    return "" if bucket is None else f": there is no bucket {bucket}"


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
        yield from list_files(fs, folder, recursive=recursive, with_pipes=True, limits=limits)
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
) -> Iterator[tuple[str, FileInfo | str]]:
    """The shards that the input names, by folder, or why one cannot be read."""
    missing: list[str] = []
    # A web server may list nothing.
    is_listed = {folder: len(paths) > _STAT_AT_MOST and not is_http(fs) for folder, paths in named.items()}
    single = [path for folder, paths in named.items() if not is_listed[folder] for path in paths]
    for path, info in _look_at(fs, single, limits):
        if info is None:
            missing.append(path)
        else:
            yield path, info
    for folder, paths in named.items():
        if is_listed[folder]:
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
            f"{_no_bucket(fs, missing[0], limits)}"
        )


def _look_at(
    fs: fsspec.AbstractFileSystem, paths: list[str], limits: StoreLimits
) -> Iterator[tuple[str, FileInfo | str | None]]:
    """Look at shards one by one: what is there, why it cannot be read, or None where there is none."""
    with ThreadPoolExecutor(_STATS_AT_ONCE, thread_name_prefix="look") as pool:
        yield from zip(paths, pool.map(lambda path: _look(fs, path, limits), paths), strict=True)


def _look(fs: fsspec.AbstractFileSystem, path: str, limits: StoreLimits) -> FileInfo | str | None:
    url = to_url(fs, path)
    try:
        return with_retries(f"looking at {url}", lambda: stat(fs, path, limits), limits)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StoreError as error:
        if not error.transient:
            return f"it cannot be read: {error}"
        raise InputError(f"cannot look at {url}: {describe(error)}") from error
    except Exception as error:
        raise InputError(f"cannot look at {url}: {describe(error)}") from error


def _name(inside: str, path: str) -> str:
    """A shard's path below the folder `inside`, without the suffix."""
    return _without_query(path)[len(inside) :].removesuffix(SUFFIX)


def _name_fault(name: str) -> str | None:
    """Why no output can be named after a shard of this name."""
    if not _is_utf8(name):
        return "its name must be UTF-8"
    if _NO_NAME.search(name):
        return "its name must have no empty folder in it, and no `.` or `..`"
    if len(name.rpartition("/")[2].encode()) > _MAX_BASENAME_BYTES:
        return f"its name must have at most {_MAX_BASENAME_BYTES} bytes"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
