"""One run at a time on one output: a lease that dies with its holder.

`OUTPUT/.lease/` holds one claim a generation, `00000001.json`; the highest is the lease. A run takes the lease by
creating the claim of the next generation. Only one of several callers can, and nobody writes that file again. The
holder shows that it lives by a beat beside the claim, `00000001-TOKEN.beat`, every `renew_s`. Another run watches the
beat: if it moves, the holder lives; if it stands still for `expire_s`, the holder is dead. No clock of one machine is
compared with another's.

Generations start again at 1 after a release, so a run that was paused meanwhile may find its own number taken. The
token in the claim tells them apart: each lease draws its own, and the holder compares it before every beat and
whenever it is asked for proof. The numbered generations are the fencing tokens of Kleppmann, "How to do distributed
locking", 2016.

Two runs may overlap by a second. That is harmless: parts do not depend on who writes them. The lease prevents paying
twice, and two runs that both take the output for new. On a store without conditional writes, two runs that begin
within the same seconds may both get the lease (`writing.create`). The one whose claim was overwritten notices at its
next beat, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_type_hints

from shard_embedder.pipeline.core.errors import OutputBusyError, OutputError, StoredDataError, StoreError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.storage import join, list_files, locate, read_bytes
from shard_embedder.pipeline.core.writing import clear_temporary, create, delete, remove_folder, write_bytes
from shard_embedder.pipeline.output.names import LEASE_FOLDER
from shard_embedder.pipeline.output.typed import check_types

_CLAIM = re.compile(r"(\d{8})\.json", re.ASCII)
_TOKEN = re.compile(r"[0-9a-f]{32}", re.ASCII)
_OWN_FILE = re.compile(r"(\d{8})(?:\.json|-[0-9a-f]{32}\.beat)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class LeaseTimes:
    """How often a lease is renewed, when it expires, and how often a waiting run looks at it."""

    renew_s: float = 15.0
    expire_s: float = 60.0
    look_s: float = 1.0


TIMES = LeaseTimes()


@dataclass(frozen=True)
class _Claim:
    """The holder of a lease, as its claim names it."""

    token: str
    holder: str
    host: str
    machine: str
    pid: int
    started: str | None
    since: str

    def __str__(self) -> str:
        return f"run {self.holder}, process {self.pid} on {self.host}, since {self.since}"


@dataclass(frozen=True)
class _Look:
    """The lease of an output at one moment; `claim` is None if it is gone, or still empty."""

    generation: int
    claim: _Claim | None = None
    beat: bytes = b""


class Lease:
    """A lease that is held: a thread renews it until it is released."""

    def __init__(
        self, output: str, generation: int, claim: _Claim, times: LeaseTimes = TIMES, limits: StoreLimits = LIMITS
    ) -> None:
        self._output = output
        self._generation = generation
        self._claim = claim
        self._times = times
        # One beat that waits for the store must not delay the next.
        self._limits = replace(limits, retry_s=min(limits.retry_s, times.renew_s))
        self._beat = 0
        self._lost: str | None = None
        self._trouble = ""
        self._renewed_at = time.monotonic()
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._renewer = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._renewer.start()

    def check(self) -> None:
        """Raise if the lease is known to be lost. Ask the store only if it was not renewed for `expire_s`.

        Raises:
            OutputBusyError: another run has taken the lease over, or someone has removed it.
            StoreError: it could not be renewed for `expire_s`, so that another run may have it.
        """
        if self._lost is not None:
            raise OutputBusyError(self._lost)
        if time.monotonic() - self._renewed_at > self._times.expire_s:
            self.confirm()

    def confirm(self) -> None:
        """Ask the store whether the lease is still this run's, and renew it: before a write that needs the lease.

        Raises:
            OutputBusyError: another run has taken the lease over, or someone has removed it.
            StoreError: the store does not answer, and the lease was not renewed for `expire_s`.
        """
        try:
            self._renew()
        except (OSError, OutputError) as error:
            self._trouble = describe(error)
        if self._lost is not None:
            raise OutputBusyError(self._lost)
        silent_s = time.monotonic() - self._renewed_at
        if silent_s > self._times.expire_s:
            raise StoreError(
                f"the lease of {self._output} could not be renewed for {silent_s:.0f} s, and another run may have it"
                + (f": {self._trouble}" if self._trouble else "")
            )

    def release(self) -> None:
        """Stop renewing, and remove the temporary files and leases that this and earlier runs left."""
        self._released.set()
        self._renewer.join(self._times.renew_s)
        if self._renewer.is_alive():
            return  # a disk that hangs would hold this process too; the lease expires
        # A lease that cannot be removed expires. Nothing is written here: the disk may be full.
        with contextlib.suppress(OSError, OutputError):
            self._compare()
            if self._lost is None:
                clear_temporary(self._output)
                delete(self._output, _files(self._output, self._generation, self._limits), self._limits)
            else:
                delete(self._output, [self._beat_name], self._limits)
            remove_folder(self._output, LEASE_FOLDER)

    @property
    def _beat_name(self) -> str:
        return _beat_name(self._generation, self._claim.token)

    def _keep(self) -> None:
        while not self._released.wait(self._times.renew_s) and self._lost is None:
            try:
                self._renew()
            except Exception as error:
                # The next beat may succeed, and `check` knows the age of the last one that did.
                self._trouble = describe(error)

    def _renew(self) -> None:
        """Write a beat, if the lease is still this run's."""
        with self._lock:
            began = time.monotonic()
            self._compare()
            if self._lost is None:
                self._beat += 1
                write_bytes(self._output, self._beat_name, b"%d" % self._beat, self._limits)
                self._renewed_at = began

    def _compare(self) -> None:
        """Compare the lease with this run's own, and note if it is lost."""
        newest = max(_generations(self._output, self._limits), default=0)
        claim = _read(self._output, newest, self._limits) if newest else None
        if claim is None:
            self._lost = (
                f"the lease of {self._output} is gone: another run took it over and ended, or someone removed it"
            )
        elif newest != self._generation or claim.token != self._claim.token:
            self._lost = f"another run took over {self._output}: {claim}"


@contextlib.contextmanager
def hold(
    output: str,
    on_wait: Callable[[str], None],
    run: str | None = None,
    times: LeaseTimes = TIMES,
    limits: StoreLimits = LIMITS,
) -> Iterator[Lease]:
    """Hold the lease of `output` while the block runs. If another holder seems dead, wait until that is sure.

    `run` names the holder. `on_wait` gets one sentence that says what the wait is for.

    Raises:
        OutputBusyError: a living run holds it.
        OutputError: the output cannot be written.
    """
    try:
        lease = _acquire(output, on_wait, run or uuid.uuid4().hex[:12], times, limits)
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {describe(error)}") from error
    try:
        yield lease
    finally:
        lease.release()


def _acquire(output: str, on_wait: Callable[[str], None], run: str, times: LeaseTimes, limits: StoreLimits) -> Lease:
    own = _Claim(
        token=uuid.uuid4().hex,
        holder=run,
        host=platform.node(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    watched: _Look | None = None
    watched_since = 0.0
    is_told = is_refused = False
    while True:
        seen = _look(output, limits)
        holder, now = seen.claim, time.monotonic()
        if holder is not None and holder.token == own.token:
            return Lease(output, seen.generation, own, times, limits)
        is_new = seen != watched
        if is_new:
            if holder is not None and watched is not None and watched.claim == holder:
                raise OutputBusyError(f"{output} is held by {holder}: wait for its end, or stop it")
            watched, watched_since, is_refused = seen, now, False
        alive = None if holder is None else _is_alive(holder)
        if alive:
            raise OutputBusyError(f"{output} is held by {holder}: wait for its end, or stop it")
        has_stood = now - watched_since > times.expire_s
        if seen.generation == 0 or alive is False or has_stood:
            claimed = _claim_name(seen.generation + 1)
            if create(output, claimed, json.dumps(asdict(own)).encode(), limits):
                return Lease(output, seen.generation + 1, own, times, limits)
            # Another run was faster, which the next look shows; or something else has that name.
            if is_refused and has_stood:
                raise StoredDataError(
                    f"{join(output, claimed)} is in the way, and no lease; delete it if no run is going on"
                )
            is_refused = True
        elif not is_told and not (holder is None and is_new):
            by = holder or "a run that does not say who it is"
            on_wait(f"{output} is held by {by}, which may be dead: watching it for {times.expire_s:.0f} s")
            is_told = True
        time.sleep(times.look_s)


def _look(output: str, limits: StoreLimits) -> _Look:
    newest = max(_generations(output, limits), default=0)
    claim = _read(output, newest, limits) if newest else None
    if claim is None:
        return _Look(newest)
    try:
        beat = read_bytes(join(output, _beat_name(newest, claim.token)), limits)
    except FileNotFoundError:
        beat = b""
    return _Look(newest, claim, beat)


def _claim_name(generation: int) -> str:
    return f"{LEASE_FOLDER}/{generation:08d}.json"


def _beat_name(generation: int, token: str) -> str:
    return f"{LEASE_FOLDER}/{generation:08d}-{token}.beat"


def _names(output: str, limits: StoreLimits) -> list[str]:
    fs, folder = locate(join(output, LEASE_FOLDER), limits)
    return [Path(info.path).name for info in list_files(fs, folder, recursive=False, limits=limits)]


def _generations(output: str, limits: StoreLimits) -> list[int]:
    matches = (_CLAIM.fullmatch(name) for name in _names(output, limits))
    return [int(match[1]) for match in matches if match]


def _files(output: str, generation: int, limits: StoreLimits) -> list[str]:
    """The claims and beats of this generation and those before it."""
    matches = (_OWN_FILE.fullmatch(name) for name in _names(output, limits))
    return [f"{LEASE_FOLDER}/{match[0]}" for match in matches if match and int(match[1]) <= generation]


def _read(output: str, generation: int, limits: StoreLimits) -> _Claim | None:
    """The claim of a generation; None if it is gone or, for an instant on a disk without hard links, empty."""
    url = join(output, _claim_name(generation))
    try:
        data = read_bytes(url, limits)
        return _parse(data) if data else None
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, RecursionError) as error:
        raise StoredDataError(f"{url} is no lease: {error!r}; delete it if no run is going on") from error


def _parse(data: bytes) -> _Claim:
    content = json.loads(data)
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object, got {type(content).__name__}")
    claim = _Claim(**{name: content[name] for name in get_type_hints(_Claim)})
    check_types(claim)
    # It becomes part of a file name.
    if not _TOKEN.fullmatch(claim.token):
        raise ValueError("its token is none")
    return claim


def _machine() -> str:
    """Names where process ids are comparable: one boot of one kernel, and one namespace of ids in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_alive(holder: _Claim) -> bool | None:
    """Whether the holder's process runs; None if it ran on another machine."""
    if not holder.machine or holder.machine != _machine():
        return None
    return holder.started is not None and holder.started == _started(holder.pid)


def _started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot; None if it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The process name before the parenthesis may hold anything.
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
