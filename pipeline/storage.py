"""Files on local disk or object storage through fsspec: list, read with retries, write whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import SettingsError, ShardChangedError, ShardError

CHUNK_BYTES = 8 * 2**20
READ_ATTEMPTS = 5
# A request that shows no byte for this long is given up and tried again.
REQUEST_TIMEOUT_S = 20
TEMPORARY_FOLDER = ".tmp"

_T = TypeVar("_T")


class FileInfo(NamedTuple):
    """A stored file. `version` changes when its content does: the ETag, or the modification time."""

    path: str
    num_bytes: int
    version: str


@functools.lru_cache(maxsize=32)
def _filesystem(protocol: str) -> fsspec.AbstractFileSystem:
    if protocol in ("file", "local"):
        return LocalFileSystem(auto_mkdir=False)
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": REQUEST_TIMEOUT_S,
            "read_timeout": REQUEST_TIMEOUT_S,
            "retries": {"max_attempts": READ_ATTEMPTS, "mode": "standard"},
        }
    try:
        return fsspec.filesystem(protocol, **options)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"no filesystem for {protocol}:// URLs: {error}") from error


def locate(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL or local path, and the path in it.

    Raises:
        SettingsError: a URL that carries credentials, or of an unknown scheme.
    """
    if "://" not in url:
        return _filesystem("file"), os.path.abspath(url)
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise SettingsError(
            f"a {parts.scheme}:// URL must not carry credentials: give them by the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by the machine's role"
        )
    if parts.scheme in ("pipe", "exec"):
        raise SettingsError(f"{parts.scheme}: URLs run commands and are not read")
    fs = _filesystem(parts.scheme)
    return fs, fs._strip_protocol(url)


def to_url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The inverse of `locate`: a plain path on local disk, else a URL."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def join(url: str, *names: str) -> str:
    """`url` and names below it, with single slashes."""
    return "/".join([url.rstrip("/") or "/", *names]).replace("//", "/", 1 if url == "/" else 0)


def _version(info: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "contentHash", "mtime", "LastModified", "updated", "created"):
        if info.get(key) is not None:
            value = info[key]
            return f"{value:.9f}" if isinstance(value, float) else str(value).strip('"')
    return ""


def _file_info(info: dict[str, Any]) -> FileInfo:
    return FileInfo(info["name"], int(info["size"] or 0), _version(info))


def stat(fs: fsspec.AbstractFileSystem, path: str) -> FileInfo:
    """Size and version of one file as they are now. Raises `FileNotFoundError`."""
    if isinstance(fs, LocalFileSystem):
        status = os.stat(path)
        return FileInfo(path, status.st_size, str(status.st_mtime_ns))
    fs.invalidate_cache(fs._parent(path))
    return _file_info(fs.info(path))


def list_files(fs: fsspec.AbstractFileSystem, folder: str, *, recursive: bool = True) -> Iterator[FileInfo]:
    """Every file below `folder`, in no set order; nothing where there is no such folder."""
    if isinstance(fs, LocalFileSystem):
        yield from _list_local(folder, recursive)
        return
    fs.invalidate_cache()
    try:
        found = fs.find(folder, detail=True, **({} if recursive else {"maxdepth": 1}))
    except FileNotFoundError:
        return
    for info in found.values():
        if info["type"] == "file":
            yield _file_info(info)


def _list_local(folder: str, recursive: bool) -> Iterator[FileInfo]:
    try:
        entries = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    with entries:
        for entry in entries:
            if entry.is_dir():
                if recursive:
                    yield from _list_local(entry.path, recursive)
            elif entry.is_file():
                status = entry.stat()
                yield FileInfo(entry.path, status.st_size, str(status.st_mtime_ns))


def with_retries(what: str, call: Callable[[], _T]) -> _T:
    """`call()`, again after a fault that may pass, at most `READ_ATTEMPTS` times with growing pauses.

    Raises:
        FileNotFoundError, PermissionError: at once, they do not pass.
        ShardError: transient, when every attempt failed.
    """
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:
            if attempt == READ_ATTEMPTS:
                raise ShardError(
                    f"{what} failed {attempt} times, at last with {type(error).__name__}: {error}",
                    transient=True,
                ) from error
        time.sleep(min(8.0, 0.1 * 2**attempt) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


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
            data: bytes = self._fs.cat_file(self._path, start=start, end=end)
            if len(data) != end - start:
                self.check_unchanged()
                raise OSError(f"asked for bytes {start} to {end}, got {len(data)} bytes")
            return data

        try:
            return with_retries(f"reading bytes {start} to {end}", once)
        except FileNotFoundError as error:
            raise ShardError("listed, but not found when it was read", transient=True) from error
        except PermissionError as error:
            raise ShardError(f"not permitted to read it: {error}") from error

    def _load(self, position: int) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            data = ahead[1].result()
        else:
            if ahead is not None:
                ahead[1].cancel()
            data = self._fetch(position)
        following = position + len(data)
        if following < self.num_bytes:
            self._ahead = following, self._fetcher.submit(self._fetch, following)
        self._chunk, self._chunk_start = memoryview(data), position

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes; fewer only where the file ends. Raises `ShardError`."""
        pieces: list[memoryview] = []
        wanted = min(num_bytes, self.num_bytes - self.position)
        while wanted > 0:
            offset = self.position - self._chunk_start
            if not 0 <= offset < len(self._chunk):
                self._load(self.position)
                offset = 0
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
        except (FileNotFoundError, PermissionError, ShardError) as error:
            raise ShardChangedError(f"cannot tell whether it changed: {error}", transient=True) from error
        if (now.num_bytes, now.version) != (self.num_bytes, self._version):
            raise ShardChangedError(
                f"changed while it was read: planned {self.num_bytes} bytes version {self._version}, "
                f"now {now.num_bytes} bytes version {now.version}",
                transient=True,
            )


def read_bytes(url: str) -> bytes:
    """A whole file. Raises `FileNotFoundError`, or what the store raises when retries are used up."""
    fs, path = locate(url)
    return with_retries(f"reading {url}", lambda: bytes(fs.cat_file(path)))


def read_tail(url: str, num_bytes: int) -> bytes:
    """The last `num_bytes` bytes of a file, or all of a shorter one. Raises as `read_bytes` does."""
    fs, path = locate(url)

    def tail() -> bytes:
        size = stat(fs, path).num_bytes
        return bytes(fs.cat_file(path, start=max(0, size - num_bytes), end=size))

    return with_retries(f"reading the end of {url}", tail)


def write_bytes(root: str, name: str, data: bytes) -> None:
    """Write `root`/`name` so that it is there whole or not at all: by rename, or by one PUT.

    On local disk the bytes go through `root`/.tmp, so that a death leaves nothing elsewhere.
    """
    fs, path = locate(join(root, name))
    if not isinstance(fs, LocalFileSystem):
        # Below twice the chunk size s3fs sends one PUT; above, a multipart upload that shows when complete.
        with_retries(f"writing {name}", lambda: fs.pipe_file(path, data))
        return
    temporary = os.path.join(os.path.abspath(root), TEMPORARY_FOLDER, uuid.uuid4().hex)
    os.makedirs(os.path.dirname(temporary), exist_ok=True)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def delete(root: str, names: list[str]) -> None:
    """Delete files below `root`; those already gone are no fault."""
    fs, base = locate(root)
    if isinstance(fs, LocalFileSystem):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(base, name))
        return
    for start in range(0, len(names), 1000):
        paths = [f"{base}/{name}" for name in names[start : start + 1000]]
        with_retries("deleting old parts", functools.partial(_bulk_delete, fs, paths))


def _bulk_delete(fs: fsspec.AbstractFileSystem, paths: list[str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        fs.rm(paths)


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
