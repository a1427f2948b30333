"""Counts the tries of work that may end its process, on this machine. Knows nothing of what the work is."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def counted_try(name: str) -> Iterator[int]:
    """Try the work of this name; yields how many tries before this one did not come to their end.

    A file holds a byte for each try: a process that dies, and a block that raises, leave it. It is locked meanwhile,
    so that a try of another process that is still at work is not counted. Where there can be no file, it yields 0.
    """
    try:
        path = _folder() / hashlib.sha256(name.encode()).hexdigest()[:32]
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield 0
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            num_before = os.fstat(handle).st_size
            os.write(handle, b".")
        except OSError:
            yield 0
            return
        yield num_before
        with suppress(OSError):
            # For whoever has opened it already.
            os.ftruncate(handle, 0)
            path.unlink()
    finally:
        os.close(handle)


def _folder() -> Path:
    """A folder of this user's alone. Raises `OSError` where it is another's."""
    folder = Path(tempfile.gettempdir()) / f"shard-embedder-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise PermissionError(f"{folder} is not this user's alone")
    return folder
