"""A shard's bytes, read forward in chunks; a fault is retried from the byte reached."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

from shard_embedder.pipeline.core.errors import ShardChangedError, ShardError, StoreError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits, with_retries
from shard_embedder.pipeline.core.storage import FileInfo, ShortReadError, locate, read_range, stat
from shard_embedder.pipeline.core.threads import begin


class ShardStream:
    """Reads one file forward, in chunks fetched one ahead; a fault is retried from the byte reached."""

    def __init__(self, url: str, num_bytes: int, version: str, limits: StoreLimits = LIMITS) -> None:
        self.position = 0
        self.num_bytes = num_bytes
        self._limits = limits
        self._fs, self._path = locate(url, limits)
        self._version = version
        self._chunk = memoryview(b"")
        self._chunk_start = 0
        self._ahead: tuple[int, Future[bytes]] | None = None

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._ahead = None

    def _fetch(self, start: int) -> bytes:
        end = min(start + self._limits.chunk_bytes, self.num_bytes)

        def once() -> bytes:
            try:
                return read_range(self._fs, self._path, start, end, self._limits)
            except ShortReadError:
                # Where the file is another one by now, trying again does not help.
                self._compare(stat(self._fs, self._path, self._limits))
                raise

        try:
            return with_retries(f"reading bytes {start} to {end}", once, self._limits)
        except ShardError:
            raise
        except StoreError as error:
            raise ShardError(str(error), transient=error.transient) from error
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
        if ahead is not None and ahead[0] <= position < ahead[0] + self._limits.chunk_bytes:
            start, future = ahead
            data = future.result()
        else:
            data = self._fetch(position)
        following = start + len(data)
        if following < self.num_bytes:
            self._ahead = following, begin(partial(self._fetch, following), "read-ahead")
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
            now = with_retries(
                "asking for its version", lambda: stat(self._fs, self._path, self._limits), self._limits
            )
        except FileNotFoundError as error:
            raise ShardChangedError("listed, but not found when it was read", transient=True) from error
        except PermissionError as error:
            raise ShardChangedError(f"not permitted to read it: {describe(error)}") from error
        except Exception as error:
            raise ShardChangedError(
                f"cannot tell whether it changed: {describe(error)}", transient=isinstance(error, StoreError)
            ) from error
        self._compare(now)

    def _compare(self, now: FileInfo) -> None:
        if (now.num_bytes, now.version) != (self.num_bytes, self._version):
            raise ShardChangedError(
                f"changed while it was read: planned {self.num_bytes} bytes version {self._version}, "
                f"now {now.num_bytes} bytes version {now.version}",
                transient=True,
            )
