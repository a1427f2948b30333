"""Calls in daemon threads: one that hangs, as on a mount that is gone, may be left behind; others are repeated."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


def begin(call: Callable[[], _T], name: str) -> Future[_T]:
    """What `call` will return or raise; it runs in a daemon thread of this name."""
    answer: Future[_T] = Future()
    answer.set_running_or_notify_cancel()

    def make() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=make, name=name, daemon=True).start()
    return answer


def call_within(seconds: float, call: Callable[[], _T], what: str) -> _T:
    """`call()`, which is left behind where it takes longer.

    Raises:
        TimeoutError: it did.
    """
    answer = begin(call, "bounded")
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        if answer.done():
            raise
        raise TimeoutError(f"{what} did not answer for {seconds:.0f} s") from error


@contextmanager
def repeating(call: Callable[[], object], every_s: float, name: str) -> Iterator[None]:
    """Make `call` every so many seconds while the block runs, in a daemon thread of this name."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            call()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
