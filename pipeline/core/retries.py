"""One layer of retries for every store."""

from __future__ import annotations

import errno
import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from botocore.exceptions import (
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from shard_embedder.pipeline.core.errors import PipelineError, StoreError
from shard_embedder.pipeline.core.redact import describe

# Refusals (4xx) that do not mean what was asked, only how it went.
_PASSING_STATUSES = frozenset({408, 409, 425, 429})
_PASSING_CODES = frozenset({"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"})
_NOT_IMPLEMENTED = 501
# No disk has a file of such a name.
_NO_SUCH_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EILSEQ)
_LASTING = (PipelineError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# What botocore says before it asks the store.
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)

_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoreLimits:
    """When an object store is given up, and in what pieces it is read."""

    retry_s: float = 60.0  # no attempt begins later than this after the first
    quiet_s: float = 3.0  # after so long without success a call is said to be tried again
    max_pause_s: float = 8.0  # between two attempts
    request_timeout_s: float = 20.0  # a request that shows no byte for this long is tried again
    slowest_bytes_per_s: int = 120_000  # and so is one that moves, but slower than this
    chunk_bytes: int = 8 * 2**20  # read at once
    # On a store without conditional writes: after so long two that write one name at once see who of them has it.
    settle_s: float = 5.0


LIMITS = StoreLimits()

_given_up = threading.Event()


class Refusal(NamedTuple):
    """How an S3 store said no: the HTTP status, and its own code, such as `AccessDenied`."""

    status: int
    code: str


def refusal(error: BaseException) -> Refusal | None:
    """What an S3 store answered, where `error` is such an answer."""
    answer = error if isinstance(error, ClientError) else error.__cause__
    if not isinstance(answer, ClientError):
        return None
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return Refusal(status, str(answer.response.get("Error", {}).get("Code")))


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, _LASTING):
        return False
    no = refusal(error)
    if no is not None:
        return not is_lasting(no.status) or no.code in _PASSING_CODES
    status = getattr(error, "status", None)  # as aiohttp has it
    if isinstance(status, int):
        return not is_lasting(status)
    return getattr(error, "errno", None) not in _NO_SUCH_NAME


def is_lasting(status: int) -> bool:
    """Whether an HTTP status says that the same request will never succeed."""
    return (400 <= status < 500 and status not in _PASSING_STATUSES) or status == _NOT_IMPLEMENTED


def with_retries(what: str, call: Callable[[], _T], limits: StoreLimits = LIMITS) -> _T:
    """`call()`, again after a fault that may pass, with growing pauses, for `limits.retry_s`.

    Where this process has just given up a call, the next gets one attempt until one succeeds: a store that is
    away costs a task its patience once, and not for each of its shards. After some seconds a warning is logged.

    Raises:
        StoreError: transient, when every attempt failed.
        FileNotFoundError, PermissionError and other lasting errors: at once, as they are.
        PermissionError, OSError: at once, where there are no credentials, or no such name can be.
    """
    started = time.monotonic()
    attempt = 0
    is_told = False
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
            pause = min(limits.max_pause_s, 0.1 * 2**attempt) * random.uniform(0.5, 1.0)
            elapsed = time.monotonic() - started
            if elapsed + pause > limits.retry_s or _given_up.is_set():
                _given_up.set()
                raise StoreError(
                    f"{what} failed {attempt} times in {elapsed:.0f} s, at last with {describe(error)}",
                    transient=True,
                ) from error
            if elapsed + pause > limits.quiet_s and not is_told:
                is_told = True
                left_s = limits.retry_s - elapsed
                _LOG.warning("%s failed, and is tried again for up to %.0f s: %s", what, left_s, describe(error))
            time.sleep(pause)
        else:
            _given_up.clear()
            return result
