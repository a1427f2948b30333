"""Files on local disk or object storage through fsspec: list, read with retries, write whole or not at all.

There is one layer of retries, `with_retries`: those of s3fs and botocore are switched off, since layers
multiply. A request that shows no byte for `REQUEST_TIMEOUT_S` is given up; one that goes on slower than
`SLOWEST_BYTES_PER_S` too; and no attempt begins later than `RETRY_S` after the first. So an endpoint that
refuses or answers 503 is given up after 60 s, one that swallows requests after 80 s, and the read of one
chunk ends after 150 s whatever the network does.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import random
import stat as modes
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

import fsspec
from botocore.exceptions import (  # type: ignore[import-untyped]
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import SettingsError, ShardChangedError, ShardError
from pipeline.redact import REFUSAL, has_secret, redact

CHUNK_BYTES = 8 * 2**20
# A request that shows no byte for this long is given up and tried again.
REQUEST_TIMEOUT_S = 20.0
# So is one that moves, but slower than this.
SLOWEST_BYTES_PER_S = 120_000
# No attempt begins later than this after the first.
RETRY_S = 60.0
_MAX_PAUSE_S = 8.0
TEMPORARY_FOLDER = ".tmp"
_S3 = ("s3", "s3a")
# S3 allows 5 GiB in one PUT. s3fs sends one PUT below twice its chunk size, else a multipart upload, of
# which a death leaves unseen pieces that cost money.
_PUT_BYTES = 5 * 2**30
_DELETE_AT_ONCE = 1000
# Refusals (4xx) that do not mean what was asked, only how it went.
_PASSING_STATUSES = frozenset({408, 409, 425, 429})
_PASSING_CODES = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"})
_LASTING = (
    ShardError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)
# What botocore says before it asks the store.
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)

_T = TypeVar("_T")
_given_up = threading.Event()


class _ShortReadError(OSError):
    """An answer that looks whole and holds fewer bytes than asked for."""


class FileInfo(NamedTuple):
    """A stored file. `version` changes when its content does: the ETag, or the modification time."""

    path: str
    num_bytes: int
    version: str


@functools.lru_cache(maxsize=32)
def _filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    if protocol in ("file", "local"):
        return LocalFileSystem(auto_mkdir=False)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        options["config_kwargs"] = {
            "connect_timeout": REQUEST_TIMEOUT_S,
            "read_timeout": REQUEST_TIMEOUT_S,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        options["session"] = _s3_session()
    try:
        fs = fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError, OSError) as error:
        first = str(error).strip().partition("\n")[0]
        raise SettingsError(f"no filesystem for {protocol}:// URLs: {first}") from error
    if protocol in _S3:
        fs.retries = 1
    return fs


def _s3_session() -> Any:
    """A session that reads times fast: dateutil takes two thirds of a listing's time."""
    # A quarter of a second in every worker, which only S3 needs.
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]  # noqa: PLC0415

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    return session


def _parse_time(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp  # type: ignore[import-untyped]  # noqa: PLC0415  as above

        parsed: datetime = parse_timestamp(value)
        return parsed


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL or local path, and the path in it.

    Names are taken as they are: `%`, `#` and `?` mean themselves.

    Raises:
        SettingsError: a URL that carries credentials, or of an unknown scheme.
    """
    if "://" not in url:
        return _filesystem("file"), os.path.abspath(url)
    scheme, _, rest = url.partition("://")
    authority = rest.split("/", 1)[0]
    if has_secret(url) or "@" in authority or (scheme in _S3 and ":" in authority and authority[:4] != "arn:"):
        raise SettingsError(f"a {scheme}:// URL {REFUSAL}")
    if "::" in scheme or scheme in ("pipe", "exec"):
        raise SettingsError(f"{scheme}:// URLs are not read: name the store itself, such as s3://")
    fs = _filesystem(scheme)
    return fs, fs._strip_protocol(url)


def to_url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The inverse of `locate`: a plain path on local disk, else a URL."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def join(url: str, *names: str) -> str:
    """`url` and names below it, with single slashes."""
    return "/".join([url.rstrip("/"), *names])


def describe(error: BaseException) -> str:
    """An error's type and text without what may be a secret in it."""
    text = redact(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return not isinstance(fs.protocol, str) and "s3" in fs.protocol


def _within(fs: fsspec.AbstractFileSystem, num_bytes: int = 0) -> dict[str, float]:
    """Option of a call that ends it after a while; local calls have none."""
    return {"timeout": 2 * REQUEST_TIMEOUT_S + num_bytes / SLOWEST_BYTES_PER_S} if fs.async_impl else {}


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "contentHash", "mtime", "LastModified", "updated", "created"):
        if info.get(key) is not None:
            value = info[key]
            return f"{value:.9f}" if isinstance(value, float) else str(value).strip('"')
    return ""


def _file_info(info: dict[str, Any]) -> FileInfo:
    return FileInfo(info["name"], int(info["size"] or 0), _version(info))


def stat(fs: fsspec.AbstractFileSystem, path: str) -> FileInfo:
    """Size and version of one file as they are now; not tried again.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
    """
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        if modes.S_ISDIR(status.st_mode):
            raise FileNotFoundError(f"{path} is a folder")
        return FileInfo(path, status.st_size, str(status.st_mtime_ns))
    fs.invalidate_cache(fs._parent(path))
    info = fs.info(path, **_within(fs))
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{path} is a folder")
    return _file_info(info)


def list_files(fs: fsspec.AbstractFileSystem, folder: str, *, recursive: bool = True) -> Iterator[FileInfo]:
    """Every file below `folder`, in no set order; nothing where there is no such folder.

    A link to a file or folder is what it leads to; one that leads nowhere, or to itself, is a file of 0 bytes, so
    that whoever reads it finds out. A link to a folder above itself is not followed.

    Raises:
        PermissionError, ShardError: the folder cannot be listed.
    """
    if isinstance(fs, LocalFileSystem):
        yield from _list_local(folder, recursive)
    elif _is_s3(fs):
        yield from _list_s3(fs, folder, recursive)
    else:
        yield from _list_other(fs, folder, recursive)


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """No search for garbage in cycles: among a million files there is none, and a listing takes a third longer."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _list_local(folder: str, recursive: bool, above: tuple[tuple[int, int], ...] = ()) -> Iterator[FileInfo]:
    try:
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in above:
            return
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            try:
                status = entry.stat()
            except OSError as error:
                if not isinstance(error, FileNotFoundError) and error.errno != errno.ELOOP:
                    raise
                if entry.is_symlink():
                    yield FileInfo(entry.path, 0, "")
                continue
            if modes.S_ISDIR(status.st_mode):
                if recursive:
                    yield from _list_local(entry.path, recursive, (*above, identity))
            elif modes.S_ISREG(status.st_mode):
                yield FileInfo(entry.path, status.st_size, str(status.st_mtime_ns))


def _list_s3(fs: fsspec.AbstractFileSystem, folder: str, recursive: bool) -> Iterator[FileInfo]:
    """Page by page: `fs.find` would hold every entry as a dictionary, twice."""
    bucket, key, _ = fs.split_path(folder)
    query = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **({} if recursive else {"Delimiter": "/"})}

    def page() -> dict[str, Any]:
        answer: dict[str, Any] = fs.call_s3("list_objects_v2", **query, **_within(fs))
        if "IsTruncated" not in answer:
            raise OSError("the answer is not a listing")
        return answer

    while True:
        try:
            answer = with_retries(f"listing s3://{folder}", page)
        except FileNotFoundError:
            return
        for entry in answer.get("Contents", ()):
            # A key that ends in a slash stands for a folder.
            if not entry["Key"].endswith("/"):
                yield FileInfo(f"{bucket}/{entry['Key']}", entry["Size"], entry["ETag"].strip('"'))
        if not answer["IsTruncated"]:
            return
        query["ContinuationToken"] = answer["NextContinuationToken"]


def _list_other(fs: fsspec.AbstractFileSystem, folder: str, recursive: bool) -> Iterator[FileInfo]:
    fs.invalidate_cache()
    depth = {} if recursive else {"maxdepth": 1}
    try:
        found = with_retries(f"listing {folder}", lambda: fs.find(folder, detail=True, **depth))
    except FileNotFoundError:
        return
    for info in found.values():
        if info["type"] == "file":
            yield _file_info(info)


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, _LASTING):
        return False
    refusal = error if isinstance(error, ClientError) else error.__cause__
    if isinstance(refusal, ClientError):
        status = refusal.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
        code = refusal.response.get("Error", {}).get("Code")
        return not 400 <= status < 500 or status in _PASSING_STATUSES or code in _PASSING_CODES
    return True


def with_retries(what: str, call: Callable[[], _T]) -> _T:
    """`call()`, again after a fault that may pass, with growing pauses, for `RETRY_S`.

    Where this process has just given up a call, the next gets one attempt until one succeeds: a store that is
    away costs a task its patience once, and not for each of its shards.

    Raises:
        ShardError: transient, when every attempt failed.
        FileNotFoundError, PermissionError and other lasting errors: at once, as they are.
        PermissionError, OSError: at once, where there are no credentials, or no such name can be.
    """
    started = time.monotonic()
    attempt = 0
    while True:
        attempt += 1
        try:
            result = call()
        except _NO_CREDENTIALS as error:
            raise PermissionError(
                f"{what} takes credentials, by the environment or the machine's role: {error}"
            ) from error
        except ParamValidationError as error:
            raise OSError(f"{what}: {' '.join(str(error).split())}") from error
        except Exception as error:
            if not _may_pass(error):
                _given_up.clear()  # the store has answered
                raise
            pause = min(_MAX_PAUSE_S, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
            elapsed = time.monotonic() - started
            if elapsed + pause > RETRY_S or _given_up.is_set():
                _given_up.set()
                raise ShardError(
                    f"{what} failed {attempt} times in {elapsed:.0f} s, at last with {describe(error)}",
                    transient=True,
                ) from error
            time.sleep(pause)
        else:
            _given_up.clear()
            return result


def _read_range(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end`, all of them; not tried again."""
    if end <= start:
        return b""
    data = bytes(fs.cat_file(path, start=start, end=end, **_within(fs, end - start)))
    if len(data) != end - start:
        raise _ShortReadError(f"asked for bytes {start} to {end}, got {len(data)} bytes")
    return data


class ShardStream:
    """Reads one file forward, in chunks fetched one ahead; a fault is retried from the byte reached."""

    def __init__(self, url: str, num_bytes: int, version: str) -> None:
        self.position = 0
        self.num_bytes = num_bytes
        self._fs, self._path = locate(url)
        self._version = version
        self._chunk = memoryview(b"")
        self._chunk_start = 0
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._fetcher.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, start: int) -> bytes:
        end = min(start + CHUNK_BYTES, self.num_bytes)

        def once() -> bytes:
            try:
                return _read_range(self._fs, self._path, start, end)
            except _ShortReadError:
                # Where the file is another one by now, trying again does not help.
                self._compare(stat(self._fs, self._path))
                raise

        try:
            return with_retries(f"reading bytes {start} to {end}", once)
        except ShardError:
            raise
        except FileNotFoundError as error:
            raise ShardError("listed, but not found when it was read", transient=True) from error
        except PermissionError as error:
            raise ShardError(f"not permitted to read it: {describe(error)}") from error
        except Exception as error:
            raise ShardError(f"cannot be read: {describe(error)}") from error

    def _load(self, position: int) -> None:
        """Make the chunk that holds `position` the present one, and begin to fetch the one after it."""
        ahead, self._ahead = self._ahead, None
        start = position
        if ahead is not None and ahead[0] <= position < ahead[0] + CHUNK_BYTES:
            start, future = ahead
            data = future.result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            data = self._fetch(position)
        following = start + len(data)
        if following < self.num_bytes:
            self._ahead = following, self._fetcher.submit(self._fetch, following)
        self._chunk, self._chunk_start = memoryview(data), start

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes; fewer only where the file ends. Raises `ShardError`."""
        pieces: list[memoryview] = []
        wanted = min(num_bytes, self.num_bytes - self.position)
        while wanted > 0:
            offset = self.position - self._chunk_start
            if not 0 <= offset < len(self._chunk):
                self._load(self.position)
                offset = self.position - self._chunk_start
            piece = self._chunk[offset : offset + wanted]
            pieces.append(piece)
            self.position += len(piece)
            wanted -= len(piece)
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def skip(self, num_bytes: int) -> bool:
        """Go forward without reading; false where the file ends before."""
        whole = self.position + num_bytes <= self.num_bytes
        self.position = min(self.position + num_bytes, self.num_bytes)
        return whole

    def check_unchanged(self) -> None:
        """Raise `ShardChangedError` unless the file is still the one that was planned."""
        try:
            now = with_retries("asking for its version", lambda: stat(self._fs, self._path))
        except FileNotFoundError as error:
            raise ShardChangedError("listed, but not found when it was read", transient=True) from error
        except PermissionError as error:
            raise ShardChangedError(f"not permitted to read it: {describe(error)}") from error
        except Exception as error:
            raise ShardChangedError(
                f"cannot tell whether it changed: {describe(error)}", transient=isinstance(error, ShardError)
            ) from error
        self._compare(now)

    def _compare(self, now: FileInfo) -> None:
        if (now.num_bytes, now.version) != (self.num_bytes, self._version):
            raise ShardChangedError(
                f"changed while it was read: planned {self.num_bytes} bytes version {self._version}, "
                f"now {now.num_bytes} bytes version {now.version}",
                transient=True,
            )


def read_bytes(url: str) -> bytes:
    """A whole file, in chunks of which each is tried again.

    Raises:
        FileNotFoundError, PermissionError: at once.
        ShardError: what may pass did not.
    """
    fs, path = locate(url)
    size = with_retries(f"reading {url}", lambda: stat(fs, path)).num_bytes
    chunks = [
        with_retries(
            f"reading {url}",
            functools.partial(_read_range, fs, path, start, min(start + CHUNK_BYTES, size)),
        )
        for start in range(0, size, CHUNK_BYTES)
    ]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_tail(url: str, num_bytes: int, size: int | None = None) -> bytes:
    """The last `num_bytes` bytes of a file, or all of a shorter one. Raises as `read_bytes` does.

    `size` is the file's, where it is known: that saves a request.
    """
    fs, path = locate(url)

    def tail() -> bytes:
        end = stat(fs, path).num_bytes if size is None else size
        return _read_range(fs, path, max(0, end - num_bytes), end)

    return with_retries(f"reading the end of {url}", tail)


def write_bytes(root: str, name: str, data: bytes) -> None:
    """Write `root`/`name` so that it is there whole or not at all: by rename, or by one PUT.

    On local disk the bytes go through `root`/.tmp, so that a death leaves nothing elsewhere. A PUT that is
    tried again writes the same bytes, whether or not the first took effect.

    Raises:
        OSError: the disk is full, or the like.
        PermissionError: at once.
        ShardError: what may pass did not.
    """
    fs, path = locate(join(root, name))
    if not isinstance(fs, LocalFileSystem):
        chunk = {"chunksize": _PUT_BYTES} if _is_s3(fs) else {}
        with_retries(f"writing {name}", lambda: fs.pipe_file(path, data, **chunk, **_within(fs, len(data))))
        return
    with _named(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _temporary(root, data) as temporary:
            os.replace(temporary, path)


def create(root: str, name: str, data: bytes) -> bool:
    """Write `root`/`name` where there is no such file yet; false where there is.

    Of several callers at once one gets true, on local disk and on stores with conditional writes (S3's
    `If-None-Match`); on others two in the same instant may. Where an answer was lost on its way the call is
    tried again, and then says false of a file that it made itself: `data` must tell whose it is.

    Raises:
        OSError, PermissionError, ShardError: as `write_bytes` does.
    """
    fs, path = locate(join(root, name))
    if isinstance(fs, LocalFileSystem):
        return _create_local(root, path, data)
    try:
        with_retries(f"writing {name}", lambda: fs.pipe_file(path, data, mode="create", **_within(fs, len(data))))
    except FileExistsError:
        return False
    except OSError as error:
        refusal = error.__cause__
        if isinstance(refusal, ClientError) and refusal.response["Error"]["Code"] in ("PreconditionFailed", "412"):
            return False
        raise
    return True


def _create_local(root: str, path: str, data: bytes) -> bool:
    """By a link to a finished file, which fails where the name is taken."""
    with _named(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with _temporary(root, data) as temporary:
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
    return True


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Name `path` in an error of its disk: the system itself does not say which disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


@contextlib.contextmanager
def _temporary(root: str, data: bytes) -> Iterator[str]:
    """`data` on its disk, in a file below `root`/.tmp that is gone at the end, unless it was renamed."""
    temporary = os.path.join(os.path.abspath(root), TEMPORARY_FOLDER, uuid.uuid4().hex)
    os.makedirs(os.path.dirname(temporary), exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def delete(root: str, names: list[str]) -> None:
    """Delete files below `root`; those already gone are no fault."""
    fs, base = locate(root)
    if isinstance(fs, LocalFileSystem):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(base, name))
        return
    for start in range(0, len(names), _DELETE_AT_ONCE):
        some = names[start : start + _DELETE_AT_ONCE]
        with_retries("deleting old parts", functools.partial(_delete, fs, base, some))


def _delete(fs: fsspec.AbstractFileSystem, base: str, names: list[str]) -> None:
    """Not by `fs.rm`, which takes `[`, `*` and `?` in names for wildcards and tells no failures."""
    if not _is_s3(fs):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(f"{base}/{name}", **_within(fs))
        return
    bucket, prefix, _ = fs.split_path(base)
    keys = [{"Key": f"{prefix}/{name}" if prefix else name} for name in names]
    answer = fs.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}, **_within(fs))
    failed = [item for item in answer.get("Errors", ()) if item.get("Code") != "NoSuchKey"]
    if failed:
        code, key = failed[0].get("Code"), failed[0].get("Key")
        kind = PermissionError if code == "AccessDenied" else OSError
        raise kind(f"{len(failed)} of {len(names)} old parts cannot be deleted: {code} for {key}")


def remove_folder(root: str, name: str) -> None:
    """Remove an empty folder below `root` on local disk; object storage has none."""
    fs, path = locate(join(root, name))
    if isinstance(fs, LocalFileSystem):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def clear_temporary(root: str) -> None:
    """Remove what a run that died left in `root`/.tmp on local disk."""
    fs, base = locate(root)
    folder = os.path.join(base, TEMPORARY_FOLDER)
    if isinstance(fs, LocalFileSystem) and os.path.isdir(folder):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)
        with contextlib.suppress(OSError):
            os.rmdir(folder)
