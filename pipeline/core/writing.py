"""Files on local disk or object storage, written whole or not at all, made once, and deleted."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits, refusal, with_retries
from shard_embedder.pipeline.core.storage import is_s3, join, locate, read_bytes, stat, timeout_option

TEMPORARY_FOLDER = ".tmp"
# S3 allows 5 GiB in one PUT. s3fs sends one PUT below twice its chunk size, else a multipart upload, of
# which a death leaves unseen pieces that cost money.
_PUT_BYTES = 5 * 2**30
# In one request of S3, and in requests at once.
_DELETE_AT_ONCE = 1000
_DELETES_AT_ONCE = 16
# How a disk and an S3 store refuse a name: it is too long, or something else lies there or in its way.
_BAD_NAMES = (
    errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.EILSEQ,
    errno.EINVAL,
)  # fmt: skip
_BAD_KEYS = ("KeyTooLongError", "KeyTooLong", "InvalidArgument", "InvalidURI", "InvalidObjectName", "InvalidKey")
_PRECONDITION_FAILED = 412
# How a store answers to what it does not have.
_UNSUPPORTED = (400, 405, 411, 501)
# How a disk does that has no hard links, such as most of FUSE, Azure Files and exFAT.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EACCES, errno.EINVAL)


def write_bytes(root: str, name: str, data: bytes, limits: StoreLimits = LIMITS) -> None:
    """Write `root`/`name` so that it is there whole or not at all: by rename, or by one PUT.

    On local disk the bytes go through `root`/.tmp, so that a death leaves nothing elsewhere. A PUT that is
    tried again writes the same bytes, whether or not the first took effect.

    Raises:
        OSError: the disk is full, or the like.
        PermissionError: at once.
        StoreError: what may pass did not.
    """
    fs, path = locate(join(root, name), limits)
    if not isinstance(fs, LocalFileSystem):
        chunk = {"chunksize": _PUT_BYTES} if is_s3(fs) else {}

        def put() -> None:
            fs.pipe_file(path, data, **chunk, **timeout_option(fs, limits, len(data)))

        with_retries(f"writing {name}", put, limits)
        return
    with _temporary(root, path, data) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """A temporary file beside the local file `path`, which takes its place if the block ends without an error.

    A device or a pipe is written to as it is: there is nothing to replace.
    """
    whole = Path(os.path.realpath(path))
    if whole.exists() and not whole.is_file():
        yield whole
        return
    temporary = whole.with_name(f".{whole.name}.{os.getpid()}")
    try:
        with name_in_errors(whole, temporary):
            yield temporary
            os.replace(temporary, whole)
    finally:
        temporary.unlink(missing_ok=True)


def refuses_name(error: OSError) -> bool:
    """Whether a write failed for the name that it was to have, and one of another name may succeed."""
    no = refusal(error)
    return error.errno in _BAD_NAMES if no is None else no.code in _BAD_KEYS


def create(root: str, name: str, data: bytes, limits: StoreLimits = LIMITS) -> bool:
    """Write `root`/`name` where there is no such file yet; false where there is.

    Of several callers at once one gets true, on local disk and on stores with conditional writes (S3's
    `If-None-Match`). A store without them gets the file after a look whether it is there, and `limits.settle_s`
    later the file must be the caller's still: there two get true where the write of one takes longer than that.
    Where an answer was lost on its way the call is tried again, and then says false of a file that it made itself:
    `data` must tell whose it is.

    A disk without hard links holds the file empty for an instant, and keeps it so where the caller dies then.

    Raises:
        OSError: as `write_bytes` does.
    """
    fs, path = locate(join(root, name), limits)
    if isinstance(fs, LocalFileSystem):
        return _create_local(root, path, data)

    def put() -> None:
        fs.pipe_file(path, data, mode="create", **timeout_option(fs, limits, len(data)))

    try:
        with_retries(f"writing {name}", put, limits)
    except FileExistsError:
        return False
    except OSError as error:
        no = refusal(error)
        if no is not None and no.status == _PRECONDITION_FAILED:
            return False
        if no is None or no.status not in _UNSUPPORTED:
            raise
        return _create_unconditionally(root, name, data, limits)
    return True


def _create_unconditionally(root: str, name: str, data: bytes, limits: StoreLimits) -> bool:
    """The last of those that write at once has the file, and the others find that out."""
    url = join(root, name)
    with contextlib.suppress(FileNotFoundError):
        with_retries(f"looking at {url}", lambda: stat(*locate(url, limits), limits), limits)
        return False
    write_bytes(root, name, data, limits)
    time.sleep(limits.settle_s)
    return read_bytes(url, limits) == data


def _create_local(root: str, path: str, data: bytes) -> bool:
    """By a link to a finished file, which fails where the name is taken."""
    with _temporary(root, path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_without_links(temporary, path)
    return True


def _create_without_links(temporary: str, path: str) -> bool:
    """By an empty file, which one caller can make, and then the finished one in its place."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    os.replace(temporary, path)
    return True


@contextlib.contextmanager
def name_in_errors(path: str | Path, temporary: str | Path | None = None) -> Iterator[None]:
    """Name `path` in an error of its disk: the system itself does not say which disk is full.

    An error that names another file than `temporary`, through which `path` is written, stays as it is.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, temporary, str(temporary)):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def _temporary(root: str, path: str, data: bytes) -> Iterator[str]:
    """`data` on its disk, in a file below `root`/.tmp that is gone at the end, unless it became `path`."""
    temporary = os.path.join(os.path.abspath(root), TEMPORARY_FOLDER, uuid.uuid4().hex)
    try:
        with name_in_errors(path, temporary):
            for file_path in (path, temporary):
                os.makedirs(os.path.dirname(file_path), exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
    finally:
        # What stands in the place of a folder has no files in it.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.unlink(temporary)


def delete(root: str, names: list[str], limits: StoreLimits = LIMITS) -> None:
    """Delete files below `root`; those already gone are no fault."""
    fs, base = locate(root, limits)
    if isinstance(fs, LocalFileSystem):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(base, name))
        return
    rest = names
    if is_s3(fs):
        while rest:
            some, later = rest[:_DELETE_AT_ONCE], rest[_DELETE_AT_ONCE:]
            try:
                with_retries("deleting old parts", functools.partial(_delete_many, fs, base, some, limits), limits)
            except OSError as error:
                # Google's S3, among others, has no request that deletes many.
                no = refusal(error)
                if no is None or (no.status not in _UNSUPPORTED and no.code != "SignatureDoesNotMatch"):
                    raise
                break
            rest = later
    with ThreadPoolExecutor(_DELETES_AT_ONCE, thread_name_prefix="delete") as pool:
        for _ in pool.map(lambda name: _delete_one(fs, f"{base}/{name}", limits), rest):
            pass


def _delete_one(fs: fsspec.AbstractFileSystem, path: str, limits: StoreLimits) -> None:
    def once() -> None:
        if is_s3(fs):
            bucket, key, _ = fs.split_path(path)
            fs.call_s3("delete_object", Bucket=bucket, Key=key, **timeout_option(fs, limits))
        else:
            fs.rm_file(path, **timeout_option(fs, limits))

    with contextlib.suppress(FileNotFoundError):
        with_retries("deleting an old part", once, limits)


def _delete_many(fs: fsspec.AbstractFileSystem, base: str, names: list[str], limits: StoreLimits) -> None:
    """Not by `fs.rm`, which takes `[`, `*` and `?` in names for wildcards and tells no failures."""
    bucket, prefix, _ = fs.split_path(base)
    keys = [{"Key": f"{prefix}/{name}" if prefix else name} for name in names]
    answer = fs.call_s3(
        "delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}, **timeout_option(fs, limits)
    )
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
