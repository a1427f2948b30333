"""What the processes of a job hold in memory, seen from outside while it runs.

A worker's own memory is what it shares with nobody (`RssAnon`); what it sees of Ray's object store is counted once,
as the store's. Ray gives a worker the name of what it runs, and the same worker runs other stages in turn: its memory
counts for the stage that it is at. Linux only.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from shard_embedder.pipeline.core.schema import STAGE_DECODE, STAGE_EMBED, STAGE_READ, STAGE_WRITE

# Often enough for a stage of a small run, which takes a few tenths of a second.
_LOOK_EVERY_S = 0.05
_MIB = 2**20
# How Ray names what works for a stage, after the functions and the class of `pipeline.flow`: in the title of its
# process, and in the timeline of its tasks.
WORKERS = {
    STAGE_READ: "MapBatches(read)",
    STAGE_DECODE: "MapBatches(decode)",
    STAGE_EMBED: "MapBatches(Embedder)",
    STAGE_WRITE: "MapBatches(write)",
}
_DRIVER = "driver"
_STORE = "store"
_SPILLED = "spilled"


def peaks(command: list[str], environment: Mapping[str, str], cwd: Path) -> tuple[dict[str, float], str, int]:
    """Run a job on a Ray of its own, and look at its processes until it ends.

    Returns:
        the most MiB at any look, by `memory_STAGE_mib` of one worker of each stage, `memory_driver_mib`, and of the
        object store: `memory_store_mib`, and what it spilled to disk, `memory_spilled_mib`; what the job printed; its
        exit code.
    """
    most: dict[str, int] = defaultdict(int, {_STORE: 0, _SPILLED: 0})
    shared_before = _shared_memory()
    # Not below the scratch folder: the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as session, tempfile.TemporaryFile() as printed:
        job = subprocess.Popen(
            command, cwd=cwd, env={**environment, "RAY_TMPDIR": session}, stdout=printed, stderr=subprocess.STDOUT
        )
        while job.poll() is None:
            for kind, num_bytes in _look(job.pid):
                most[kind] = max(most[kind], num_bytes)
            most[_STORE] = max(most[_STORE], _shared_memory() - shared_before)
            most[_SPILLED] = max(most[_SPILLED], _spilled(Path(session)))
            time.sleep(_LOOK_EVERY_S)
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    return {f"memory_{kind}_mib": num_bytes / _MIB for kind, num_bytes in most.items()}, text, job.returncode


def _look(driver: int) -> Iterator[tuple[str, int]]:
    """Bytes of each process of interest below the driver."""
    for pid, name in processes(driver):
        with suppress(OSError, KeyError):
            own = int(_status(pid)["RssAnon"].split()[0]) * 1024
            if pid == driver:
                yield _DRIVER, own
            for stage, worker in WORKERS.items():
                if name.startswith("ray::") and worker in name:
                    yield stage, own


def processes(root: int) -> Iterator[tuple[int, str]]:
    """A process and all below it, each with its name."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                children[int(_status(int(entry))["PPid"])].append(int(entry))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        waiting += children[pid]
        with suppress(OSError):
            yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0].decode(errors="replace")


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _shared_memory() -> int:
    """Bytes of this machine's shared memory in use, where the object store is; whoever else uses it counts too."""
    found = os.statvfs("/dev/shm")
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def _spilled(session: Path) -> int:
    """Bytes that the object store has on disk now."""
    total = 0
    for folder in session.glob("*/ray_spilled_objects*"):
        for path in folder.rglob("*"):
            with suppress(OSError):
                total += path.stat().st_size
    return total
