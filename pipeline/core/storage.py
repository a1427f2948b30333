"""Files on local disk or object storage through fsspec: found, listed, and read with retries.

`writing.py` writes and deletes them. There is one layer of retries, `with_retries`: those of s3fs and botocore are
switched off, since layers multiply. `StoreLimits` bound it. By default an endpoint that refuses or answers 503 is
given up after 60 s, one that swallows requests after 80 s, and the read of one chunk ends after 150 s whatever the
network does.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import re
import stat as modes
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import fsspec
import fsspec.asyn
from fsspec.implementations.local import LocalFileSystem

from shard_embedder.pipeline.core.errors import SettingsError, StoreError
from shard_embedder.pipeline.core.redact import REFUSAL, has_secret
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits, is_lasting, with_retries
from shard_embedder.pipeline.core.threads import call_within

_S3 = ("s3", "s3a")
_MAX_WAYS = 1000
# What changes with a file, by the names that stores have for it, and the best first.
_VERSIONS = ("ETag", "etag", "md5Hash", "contentHash", "mtime", "LastModified", "Last-Modified", "updated", "created")


class ShortReadError(OSError):
    """An answer that looks whole and holds fewer bytes than asked for."""


UNKNOWN_SIZE = -1


class FileInfo(NamedTuple):
    """A stored file. `version` changes when its content does: the ETag, or the modification time.

    `num_bytes` is `UNKNOWN_SIZE` where a listing does not tell it, as that of a web server; `stat` does, or why not.
    """

    path: str
    num_bytes: int
    version: str


@functools.lru_cache(maxsize=32)
def _filesystem(protocol: str, limits: StoreLimits) -> fsspec.AbstractFileSystem:
    if protocol in ("file", "local"):
        return LocalFileSystem(auto_mkdir=False)
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in _S3:
        options["config_kwargs"] = {
            "connect_timeout": limits.request_timeout_s,
            "read_timeout": limits.request_timeout_s,
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
    from aiobotocore.session import AioSession  # noqa: PLC0415

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
    return session


def _parse_time(value: Any) -> datetime:
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):
        from botocore.utils import parse_timestamp  # noqa: PLC0415  as above

        parsed: datetime = parse_timestamp(value)
        return parsed


def locate(url: str, limits: StoreLimits = LIMITS) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URL or local path, and the path in it.

    Names are taken as they are: `%`, `#` and `?` mean themselves.

    Raises:
        SettingsError: a URL that carries credentials, or of an unknown scheme.
    """
    if "://" not in url:
        return _filesystem("file", limits), os.path.abspath(url)
    scheme, _, rest = url.partition("://")
    authority = rest.split("/", 1)[0]
    if has_secret(url) or "@" in authority or (scheme in _S3 and ":" in authority and authority[:4] != "arn:"):
        raise SettingsError(f"a {scheme}:// URL {REFUSAL}")
    if "::" in scheme or scheme in ("pipe", "exec"):
        raise SettingsError(f"{scheme}:// URLs are not read: name the store itself, such as s3://")
    fs = _filesystem(scheme, limits)
    return fs, fs._strip_protocol(url)


def to_url(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """The inverse of `locate`: a plain path on local disk, else a URL."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def join(url: str, *names: str) -> str:
    """`url` and names below it, with single slashes."""
    return "/".join([url.rstrip("/"), *names])


def is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether it is object storage that speaks S3."""
    return not isinstance(fs.protocol, str) and "s3" in fs.protocol


def is_http(fs: fsspec.AbstractFileSystem) -> bool:
    """Whether it is a web server: one that may list nothing, and whose URLs may have a query."""
    return not isinstance(fs.protocol, str) and "http" in fs.protocol


def timeout_option(fs: fsspec.AbstractFileSystem, limits: StoreLimits, num_bytes: int = 0) -> dict[str, float]:
    """Option of a call that ends it after a while; some filesystems have none."""
    return {"timeout": _patience(limits, num_bytes)} if fs.async_impl else {}


def _patience(limits: StoreLimits, num_bytes: int = 0) -> float:
    return 2 * limits.request_timeout_s + num_bytes / limits.slowest_bytes_per_s


def _version(info: Mapping[str, Any]) -> str:
    """What changes with the content: its hash or tag, else when it was written, else the word that there is none."""
    for key in _VERSIONS:
        value = info.get(key)
        if isinstance(value, datetime):
            # A listing tells the fraction of a second, and a HEAD does not.
            return f"modified {value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        if isinstance(value, float):
            return f"{value:.9f}"
        if value:
            return ("modified " if key == "Last-Modified" else "") + str(value).strip('"')
    return "by size"


def _file_info(info: dict[str, Any]) -> FileInfo:
    return FileInfo(info["name"], UNKNOWN_SIZE if info["size"] is None else int(info["size"]), _version(info))


def stat(fs: fsspec.AbstractFileSystem, path: str, limits: StoreLimits = LIMITS) -> FileInfo:
    """Size and version of one file as they are now; not tried again.

    Raises:
        FileNotFoundError: there is no such file, or it is a folder.
        StoreError: it is a pipe or a device; or a web server does not tell the size, or cannot read from the middle
            of a large file.
    """
    if is_http(fs):
        return _stat_http(fs, path, limits)
    if isinstance(fs, LocalFileSystem):
        status = call_within(_patience(limits), lambda: os.stat(path), "the disk")
        if modes.S_ISDIR(status.st_mode):
            raise FileNotFoundError(f"{path} is a folder")
        _check_regular(status)
        return FileInfo(path, status.st_size, str(status.st_mtime_ns))
    fs.invalidate_cache(fs._parent(path))
    info = fs.info(path, **timeout_option(fs, limits))
    if info.get("type") == "directory":
        raise FileNotFoundError(f"{path} is a folder")
    return _file_info(info)


def _check_regular(status: os.stat_result) -> None:
    if not modes.S_ISREG(status.st_mode):
        raise StoreError("it is no file, but a pipe, a socket or a device")


def _stat_http(fs: fsspec.AbstractFileSystem, url: str, limits: StoreLimits) -> FileInfo:
    """By asking for the first byte: a HEAD is often refused, or tells another size."""
    status, headers = fsspec.asyn.sync(fs.loop, _first_byte, fs, url, timeout=2 * limits.request_timeout_s)
    if status in (404, 410):
        raise FileNotFoundError(f"{url} is not there: its server answers {status}")
    if status in (401, 403):
        raise PermissionError(f"{url} is not public: its server answers {status}")
    if status not in (200, 206, 416):
        raise_for = StoreError if is_lasting(status) else OSError
        raise raise_for(f"its server answers {status}")
    if status == 200:
        size = headers.get("Content-Length", "") if not headers.get("Content-Encoding") else ""
    else:
        size = headers.get("Content-Range", "").rpartition("/")[2]
    if not re.fullmatch("[0-9]{1,18}", size):
        raise StoreError("its server does not tell its size")
    if status == 200 and int(size) > limits.chunk_bytes:
        raise StoreError(f"its server answers no byte ranges, which reading its {size} bytes takes")
    return FileInfo(url, int(size), _version(headers))


async def _first_byte(fs: Any, url: str) -> tuple[int, Mapping[str, str]]:
    session = await fs.set_session()
    headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), headers=headers) as answer:
        return answer.status, answer.headers


def list_files(
    fs: fsspec.AbstractFileSystem,
    folder: str,
    *,
    recursive: bool = True,
    with_pipes: bool = False,
    limits: StoreLimits = LIMITS,
) -> Iterator[FileInfo]:
    """Every file below `folder`, in no set order; nothing where there is no such folder.

    A link to a file or folder is what it leads to; one that leads nowhere, or to itself, is a file of 0 bytes, so
    that whoever reads it finds out. A link to a folder above itself is not followed. Pipes, sockets and devices are
    no files; `with_pipes` they are told of, with `UNKNOWN_SIZE`.

    Raises:
        PermissionError, StoreError: the folder cannot be listed.
    """
    if isinstance(fs, LocalFileSystem):
        listed = _list_local(folder, recursive, Counter())
        yield from (info for info in listed if with_pipes or info.num_bytes != UNKNOWN_SIZE)
    elif is_s3(fs):
        yield from _list_s3(fs, folder, recursive, limits)
    else:
        yield from _list_other(fs, folder, recursive, limits)


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


def _list_local(
    folder: str, recursive: bool, ways: Counter[tuple[int, int]], above: tuple[tuple[int, int], ...] = ()
) -> Iterator[FileInfo]:
    """`ways` counts how often each folder was come by: links in linked folders double that at each step."""
    try:
        status = os.stat(folder)
        identity = status.st_dev, status.st_ino
        if identity in above:
            return
        ways[identity] += 1
        if ways[identity] > _MAX_WAYS:
            raise StoreError(f"links lead in more than {_MAX_WAYS} ways to {folder}: name folders without them")
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
                    yield from _list_local(entry.path, recursive, ways, (*above, identity))
            else:
                is_file = modes.S_ISREG(status.st_mode)
                yield FileInfo(entry.path, status.st_size if is_file else UNKNOWN_SIZE, str(status.st_mtime_ns))


def _list_s3(fs: fsspec.AbstractFileSystem, folder: str, recursive: bool, limits: StoreLimits) -> Iterator[FileInfo]:
    """Page by page: `fs.find` would hold every entry as a dictionary, twice."""
    bucket, key, _ = fs.split_path(folder)
    query = {"Bucket": bucket, "Prefix": f"{key}/" if key else "", **({} if recursive else {"Delimiter": "/"})}

    seen: set[str] = set()

    def page() -> dict[str, Any]:
        answer: dict[str, Any] = fs.call_s3("list_objects_v2", **query, **timeout_option(fs, limits))
        if "IsTruncated" not in answer or any({"Key", "Size"} - entry.keys() for entry in answer.get("Contents", ())):
            raise OSError("the answer is not a listing")
        if answer["IsTruncated"] and answer.get("NextContinuationToken") in (None, "", *seen):
            raise OSError("the store says that there is more, and gives no new token to ask for it")
        return answer

    while True:
        try:
            answer = with_retries(f"listing s3://{folder}", page, limits)
        except FileNotFoundError:
            return
        for entry in answer.get("Contents", ()):
            # A key that ends in a slash stands for a folder.
            if not entry["Key"].endswith("/"):
                yield FileInfo(f"{bucket}/{entry['Key']}", entry["Size"], _version(entry))
        if not answer["IsTruncated"]:
            return
        query["ContinuationToken"] = answer["NextContinuationToken"]
        seen.add(answer["NextContinuationToken"])


def missing_bucket(fs: fsspec.AbstractFileSystem, path: str, limits: StoreLimits = LIMITS) -> str | None:
    """The S3 bucket of a path, where it is certain that it is not there: a listing has nothing then."""
    if not is_s3(fs):
        return None
    bucket: str = fs.split_path(path)[0]
    try:
        with_retries(f"looking at bucket {bucket}", lambda: fs.call_s3("head_bucket", Bucket=bucket), limits)
    except FileNotFoundError:
        return bucket
    except OSError:  # it may be listed and not looked at
        pass
    return None


def _list_other(
    fs: fsspec.AbstractFileSystem, folder: str, recursive: bool, limits: StoreLimits
) -> Iterator[FileInfo]:
    fs.invalidate_cache()
    depth = {} if recursive else {"maxdepth": 1}
    folder = f"{folder.rstrip('/')}/" if is_http(fs) else folder
    try:
        found = with_retries(f"listing {folder}", lambda: fs.find(folder, detail=True, **depth), limits)
    except FileNotFoundError:
        return
    for info in found.values():
        # What is no folder but a file itself has no facts here.
        if info.get("type") == "file":
            yield _file_info(info)


def read_range(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int, limits: StoreLimits = LIMITS) -> bytes:
    """Bytes `start` to `end`, all of them; not tried again."""
    if end <= start:
        return b""
    if isinstance(fs, LocalFileSystem):
        patience = _patience(limits, end - start)
        data = call_within(patience, functools.partial(_read_local, path, start, end), "the disk")
    else:
        data = bytes(fs.cat_file(path, start=start, end=end, **timeout_option(fs, limits, end - start)))
    if len(data) != end - start:
        raise ShortReadError(f"asked for bytes {start} to {end}, got {len(data)} bytes")
    return data


def _read_local(path: str, start: int, end: int) -> bytes:
    """Without waiting for who writes to a pipe, which a shard may have become since it was listed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor))
        pieces: list[bytes] = []
        while start < end and (piece := os.pread(descriptor, end - start, start)):
            pieces.append(piece)
            start += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(descriptor)


def read_bytes(url: str, limits: StoreLimits = LIMITS) -> bytes:
    """A whole file, in chunks of which each is tried again.

    Raises:
        FileNotFoundError, PermissionError: at once.
        StoreError: what may pass did not.
    """
    fs, path = locate(url, limits)
    size = with_retries(f"reading {url}", lambda: stat(fs, path, limits), limits).num_bytes
    chunks = [
        with_retries(
            f"reading {url}",
            functools.partial(read_range, fs, path, start, min(start + limits.chunk_bytes, size), limits),
            limits,
        )
        for start in range(0, size, limits.chunk_bytes)
    ]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_tail(url: str, num_bytes: int, size: int | None = None, limits: StoreLimits = LIMITS) -> bytes:
    """The last `num_bytes` bytes of a file, or all of a shorter one. Raises as `read_bytes` does.

    `size` is the file's, where it is known: that saves a request.
    """
    fs, path = locate(url, limits)

    def tail() -> bytes:
        end = stat(fs, path, limits).num_bytes if size is None else size
        return read_range(fs, path, max(0, end - num_bytes), end, limits)

    return with_retries(f"reading the end of {url}", tail, limits)
