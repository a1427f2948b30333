"""One run at a time on one output: a lease that dies with its holder.

`OUTPUT/.lease/` holds one small file a generation; the highest is the lease. It is taken by making the next
generation's file, which of several callers only one can; its holder writes it anew every `RENEW_S`. Who finds
a lease watches it: one that moves belongs to a living run, one that stands still for `EXPIRE_S` to a dead one.
No clock of one machine is compared with another's. Source of the numbered generations: the fencing tokens of
Kleppmann, "How to do distributed locking", 2016.

That two runs never overlap by a second is not promised, and not needed: parts do not depend on who writes
them. What the lease keeps away is paying twice, and two runs that each believe the output to be new.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import OutputBusyError, OutputError, ShardError, StoredDataError
from pipeline.core.redact import describe
from pipeline.core.storage import (
    clear_temporary,
    create,
    delete,
    join,
    list_files,
    locate,
    read_bytes,
    remove_folder,
    write_bytes,
)
from pipeline.output.names import LEASE_FOLDER

RENEW_S = 15.0
EXPIRE_S = 60.0
_LOOK_EVERY_S = 1.0


class Lease:
    """A lease that is held: a thread renews it until it is released."""

    def __init__(self, output: str, generation: int, content: dict[str, Any]) -> None:
        self._output = output
        self._generation = generation
        self._content = content
        self._lost: str | None = None
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise `OutputBusyError` where another run has taken the lease over."""
        if self._lost is not None:
            raise OutputBusyError(
                f"another run took over {self._output}, since the lease of this one was not renewed for "
                f"{EXPIRE_S:.0f} s: {self._lost}"
            )

    def release(self) -> None:
        """Stop renewing, and remove what temporary files and leases of this and earlier runs are left."""
        self._released.set()
        self._renewer.join()
        if self._lost is not None:
            return
        # A lease that cannot be removed expires.
        with contextlib.suppress(OSError, ShardError, OutputError):
            clear_temporary(self._output)
            old = [number for number in _generations(self._output) if number <= self._generation]
            delete(self._output, [_name(number) for number in old])
            remove_folder(self._output, LEASE_FOLDER)

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            self._content["beat"] += 1
            try:
                newest = max(_generations(self._output), default=0)
                if newest > self._generation:
                    holder = _read(self._output, newest)
                    self._lost = _shown(holder) if holder is not None else "one that has ended since"
                    return
                write_bytes(self._output, _name(self._generation), _encoded(self._content))
            except (OSError, OutputError):
                # The store is away, for other runs too; the next beat may reach it.
                continue


@contextlib.contextmanager
def hold(output: str, on_wait: Callable[[str], None], run: str | None = None) -> Iterator[Lease]:
    """Hold the lease of `output` while the block runs; wait where its holder seems dead until that is sure.

    `run` names the holder, and is no other's. `on_wait` is told once, in words, what is waited for.

    Raises:
        OutputBusyError: a living run holds it.
        OutputError: the output cannot be written.
    """
    try:
        lease = _acquire(output, on_wait, run or uuid.uuid4().hex[:12])
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {describe(error)}") from error
    try:
        yield lease
    finally:
        lease.release()


def _acquire(output: str, on_wait: Callable[[str], None], run: str) -> Lease:
    own = {
        "holder": run,
        "host": platform.node(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "beat": 0,
    }
    seen: dict[str, Any] | None = None
    seen_at = 0.0
    while True:
        newest = max(_generations(output), default=0)
        found = _read(output, newest) if newest else None
        if newest and found is None:
            continue  # released between listing and reading
        alive = None if found is None else _is_alive(found)
        if found is None or alive is False:
            expired = True
        elif found["holder"] == own["holder"]:
            return Lease(output, newest, own)
        elif alive or (seen is not None and seen["holder"] == found["holder"] and seen["beat"] != found["beat"]):
            raise OutputBusyError(f"{output} is held by {_shown(found)}: wait for its end, or stop it")
        elif seen is None or seen["holder"] != found["holder"]:
            seen, seen_at, expired = found, time.monotonic(), False
            on_wait(f"{output} is held by {_shown(found)}, which may be dead: watching it for {EXPIRE_S:.0f} s")
        else:
            expired = time.monotonic() - seen_at > EXPIRE_S
        if expired and create(output, _name(newest + 1), _encoded(own)):
            return Lease(output, newest + 1, own)
        if not expired:
            time.sleep(_LOOK_EVERY_S)


def _shown(holder: dict[str, Any]) -> str:
    return f"run {holder['holder']}, process {holder['pid']} on {holder['host']}, since {holder['since']}"


def _name(generation: int) -> str:
    return f"{LEASE_FOLDER}/{generation:08d}.json"


def _encoded(content: dict[str, Any]) -> bytes:
    return json.dumps(content).encode()


def _generations(output: str) -> list[int]:
    fs, folder = locate(join(output, LEASE_FOLDER))
    stems = (Path(info.path).stem for info in list_files(fs, folder, recursive=False))
    return [int(stem) for stem in stems if stem.isdecimal()]


def _read(output: str, generation: int) -> dict[str, Any] | None:
    """What a lease says, or None where it is gone."""
    url = join(output, _name(generation))
    try:
        content = json.loads(read_bytes(url))
        if not {"holder", "host", "machine", "pid", "started", "since", "beat"} <= content.keys():
            raise ValueError("it lacks a field")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise StoredDataError(f"{url} is no lease: {error}; delete it if no run is going on") from error
    return dict(content)


def _machine() -> str:
    """Where process numbers mean the same: one boot of one kernel, and one namespace of numbers in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the holder's process runs; None where that cannot be told, as on another machine."""
    if not holder["machine"] or holder["machine"] != _machine():
        return None
    return holder["started"] is not None and holder["started"] == _started(holder["pid"])


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot; None where it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name before it, in parentheses, may hold anything.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
