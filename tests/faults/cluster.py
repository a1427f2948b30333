"""A cluster of real Ray nodes on this machine, and how its processes are found and killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.conftest import S3Server, free_ports

# `ray start` turns 127.0.0.1 into the machine's address on its network; these stay on loopback.
_HEAD, _NODE = "127.0.0.3", "127.0.0.2"
WATCH = Path(__file__).parent / "watch"


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def title(pid: int) -> str:
    try:
        return _of(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _of(pid: int | str, name: str) -> bytes:
    # Thousands are read while a victim is looked for.
    file = os.open(f"/proc/{pid}/{name}", os.O_RDONLY)
    try:
        return os.read(file, 65536)
    finally:
        os.close(file)


class Look:
    """The processes of this machine at one moment: to look takes some ms of a core."""

    def __init__(self) -> None:
        self._children: dict[int, list[int]] = defaultdict(list)
        self._titles: dict[int, str] = {}
        for entry in os.scandir("/proc"):
            if entry.name.isdigit():
                with suppress(OSError, IndexError):
                    parent = _of(entry.name, "stat").rpartition(b")")[2].split(None, 2)[1]
                    self._children[int(parent)].append(int(entry.name))

    def descendants(self, *roots: int) -> list[int]:
        """Pids of processes and everything below them, parents first."""
        found = list(roots)
        for pid in found:
            found += self._children[pid]
        return found

    def title(self, pid: int) -> str:
        """As `title`, once."""
        if pid not in self._titles:
            self._titles[pid] = title(pid)
        return self._titles[pid]


def kill_tree(root: int) -> None:
    """SIGKILL a process and everything below it, as when their machine vanishes."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        # Stopped first, so that none starts another in between.
        for pid in Look().descendants(root):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def kill_worker(pid: int, pattern: re.Pattern[str]) -> bool:
    """SIGKILL one process, if at that very moment it is at work for a stage."""
    try:
        os.kill(pid, signal.SIGSTOP)
        # It cannot turn to other work now.
        at_work = bool(pattern.match(title(pid))) and _alive(pid)
        os.kill(pid, signal.SIGKILL if at_work else signal.SIGCONT)
    except ProcessLookupError:
        return False
    return at_work


# A node without what reads its logs to drivers, and without what would start more nodes: two Python processes less.
LEAN = ("--no-monitor", "--include-log-monitor=false")
# The head finds that a node is gone by five looks in a row at a port where nobody answers: in 3 s instead of 15.
SOON = {"RAY_health_check_period_ms": "500"}


class Cluster:
    """Two Ray nodes on this machine, of which the second may die."""

    def __init__(self, environment: dict[str, str], log: Path, cpus_each: int = 1) -> None:
        self.folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")
        # Another address of loopback than that of the S3 server, whose ports are free while it is down.
        self.port, self._client_port = free_ports(2)
        self.address = f"{_HEAD}:{self.port}"
        self._environment = {**environment, **SOON, "RAY_USAGE_STATS_ENABLED": "0"}
        self._environment.pop("RAY_ADDRESS", None)
        self._log = log
        self._cpus = f"--num-cpus={cpus_each}"
        self.head: subprocess.Popen[bytes] | None = None
        self.node: subprocess.Popen[bytes] | None = None

    def _ray(self, *options: str) -> subprocess.Popen[bytes]:
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", self._cpus, *LEAN, *options]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*command, "--object-store-memory=100000000"],
                env=self._environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def start(self) -> None:
        """Start both nodes, and wait until they are there."""
        self.head = self._ray(
            "--head", f"--port={self.port}", f"--node-ip-address={_HEAD}", "--include-dashboard=false",
            f"--ray-client-server-port={self._client_port}", f"--temp-dir={self.folder}",
        )  # fmt: skip
        _wait_for("the head", self._listens)
        self.start_node()
        _wait_for("both nodes", lambda: self.num_nodes() == 2)

    def start_node(self) -> None:
        """Start the second node; it joins while others work."""
        self.node = self._ray(f"--address={self.address}", f"--node-ip-address={_NODE}")

    def keep_node(self) -> None:
        """Start the second node again where it did not come up: a busy machine may be too slow for Ray."""
        if self.node is not None and self.node.poll() is not None:
            self.start_node()

    def kill_node(self) -> None:
        """Kill the second node with all its workers."""
        assert self.node is not None
        kill_tree(self.node.pid)
        self.node.wait()

    def _listens(self) -> bool:
        with suppress(OSError), socket.create_connection((_HEAD, self.port), 1):
            return True
        return False

    def num_nodes(self) -> int:
        """Nodes that the head takes for alive."""
        from ray._raylet import GcsClient

        with suppress(Exception):
            return sum(node.state == 0 for node in GcsClient(address=self.address).get_all_node_info().values())
        return 0

    def stop(self) -> None:
        """Kill what is left."""
        for process in (self.node, self.head):
            if process is not None and process.poll() is None:
                kill_tree(process.pid)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_store(store: S3Server) -> None:
    """Start it; again where another process has taken one of its ports meanwhile."""
    for attempt in range(3):
        try:
            return store.start()
        except RuntimeError:
            store.stop()
            if attempt == 2:
                raise
            time.sleep(5)


def _wait_for(what: str, ready: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not come up within {seconds:.0f} s")
        time.sleep(0.2)
