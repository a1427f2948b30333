"""`ray job submit` and `jobs/submit.py` against a real Ray head."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core.writing import write_bytes
from tests.conftest import ROOT, S3Server, free_ports, hearing_sigint, write_shards

pytestmark = pytest.mark.head

SUBMIT = ROOT / "jobs" / "submit.py"
BINARIES = Path(sys.executable).parent
# Ray writes a token to the home folder, and then wants it everywhere, unless told which it is. With PATH as in an
# activated environment, a shebang finds the Python that has Ray.
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
    "RAY_AUTH_MODE": "disabled",
}


# submit.py with less patience than it has: the seconds of `Patience`, as JSON.
LESS_PATIENT = """
import json, sys
sys.path.insert(0, sys.argv[1])
from shard_embedder.jobs import submit
sys.exit(submit.main(sys.argv[3:], submit.Patience(**json.loads(sys.argv[2]))))
"""


def wait_for(happened: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with suppress(OSError):
            if result := happened():
                return result
        time.sleep(0.2)
    raise AssertionError(f"did not happen within {timeout_s} s")


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a Ray head that is this module's own, with its own folder, so that none other joins it."""
    port, dashboard, agent, agent_grpc, client = free_ports(5)
    # Below /tmp, as the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as folder:
        options = [
            f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--dashboard-agent-grpc-port={agent_grpc}", f"--ray-client-server-port={client}", "--num-cpus=2",
            "--object-store-memory=80000000", f"--temp-dir={folder}", "--disable-usage-stats",
        ]  # fmt: skip
        process = subprocess.Popen(
            [BINARIES / "ray", "start", "--head", "--block", *options],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        address = f"http://127.0.0.1:{dashboard}"
        try:
            # A job is taken only once the agent, which starts it, is there.
            for url in (f"http://127.0.0.1:{agent}/api/local_raylet_healthz", f"{address}/api/jobs/"):
                wait_for(lambda url=url: urllib.request.urlopen(url, timeout=5).status == 200, 180)
            yield address
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


Popen = subprocess.Popen[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all jobs: each submits a folder of its own in it."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def start(folder: Path) -> Iterator[Callable[..., Popen]]:
    """Start submit.py in a folder of its own, in which `script` is job.py."""
    processes = []

    def popen(
        *arguments: object, script: str = "", patience: dict[str, float] | None = None, **environment: str
    ) -> Popen:
        command = [str(SUBMIT)] if patience is None else ["-c", LESS_PATIENT, str(ROOT), json.dumps(patience)]
        work = folder / f"work-{len(processes)}"
        for path in OTHER_FILES:
            write_bytes(str(work), path, b"")
        (work / "job.py").write_text(script)
        with hearing_sigint():
            process = subprocess.Popen(
                [sys.executable, *command, *map(str, arguments)],
                cwd=work,
                env={**ENVIRONMENT, **environment},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        processes.append(process)
        return process

    yield popen
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


def status(head: str, submission_id: str) -> str:
    with urllib.request.urlopen(f"{head}/api/jobs/{submission_id}", timeout=10) as response:
        return str(json.load(response)["status"])


class Proxy:
    """Hands TCP connections on to a port, until told to cut all that are open, or to hand nothing on any more."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.stopped = threading.Event()
        self.open: list[socket.socket] = []
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.server.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self.open += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self.copy, args=(one, other), daemon=True).start()

    def copy(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self.stopped.is_set():
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> int:
        """Cut the open connections, and say how many sockets that were."""
        cut, self.open = self.open, []
        for one in cut:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        return len(cut)


OTHER_FILES = ("kept/a.txt", ".venv/b.txt", ".git/c.txt", "demo/d.txt", "kept/demo/e.txt")
TELLS_ALL = """
import os, sys
from pathlib import Path
print('arguments', sys.argv[1:])
print('input', os.environ['EMBED_INPUT'], os.environ.get('EMBED_OUTPUT'))
print('files', sorted(str(p) for p in Path().rglob('*.txt')))
print('a trouble', file=sys.stderr)
sys.exit(7)
"""
COUNTS_ITS_STARTS = """
import pathlib, sys, time
go_on, started = map(pathlib.Path, sys.argv[1:])
started.write_text(started.read_text() + 'x' if started.exists() else 'x')
while not go_on.exists():
    time.sleep(0.1)
"""
TELLS_OF_SIGTERM = """
import pathlib, signal, sys, time
started, told = map(pathlib.Path, sys.argv[1:])
def end(number, frame):
    told.touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
started.touch()
time.sleep(300)
"""
PRINTS_40_LINES = """
import pathlib, sys, time
for i in range(40):
    while i == 20 and not pathlib.Path(sys.argv[1]).exists():
        time.sleep(0.02)
    print(f'line {i}')
    time.sleep(0.02)
"""
WAITS = """
import pathlib, sys, time
print('begun')
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.1)
"""
IS_QUIET = """
import sys, time
print('begun')
time.sleep(float(sys.argv[1]))
sys.exit(7)
"""


@dataclass(frozen=True)
class Begun:
    """Clients whose jobs run at the same time: most of a job is seconds in which nothing computes."""

    all_told: Popen
    killed: Popen
    locked: Popen
    stopped: Popen
    cut: Popen
    proxy: Proxy


@pytest.fixture(scope="module")
def begun(head: str, start: Callable[..., Popen], folder: Path) -> Begun:
    proxy = Proxy(int(head.rsplit(":", 1)[1]))
    return Begun(
        all_told=start(
            "--address", head, "--env", "EMBED_INPUT", "--", sys.executable, "job.py", "--backbone", "a b",
            script=TELLS_ALL, EMBED_INPUT="s3://bkt/{0..9}.tar", EMBED_OUTPUT="not forwarded",
        ),
        killed=start("--address", head, "--", "sh", "-c", "kill -9 $$"),
        locked=start(*weekly(head, folder), script=COUNTS_ITS_STARTS),
        stopped=start(
            "--address", head, "--submission-id", "stopped", "--stop-on-interrupt", "--",
            sys.executable, "job.py", folder / "stopped-started", folder / "told", script=TELLS_OF_SIGTERM,
        ),
        cut=start(
            "--address", f"http://127.0.0.1:{proxy.port}", "--", sys.executable, "job.py", folder / "uncut",
            script=PRINTS_40_LINES,
        ),
        proxy=proxy,
    )  # fmt: skip


def weekly(head: str, folder: Path) -> tuple[object, ...]:
    """The arguments of a job that goes on until it may end."""
    files = folder / "weekly-ends", folder / "weekly-started"
    return ("--address", head, "--submission-id", "weekly", "--", sys.executable, "job.py", *files)


@pytest.mark.slow
def test_the_jobs_output_variables_arguments_and_exit_code_come_through_and_a_signal_as_a_shell_says_it(
    begun: Begun,
) -> None:
    out, err = begun.all_told.communicate(timeout=120)
    assert begun.all_told.returncode == 7, err
    assert "arguments ['--backbone', 'a b']\n" in out
    assert "input s3://bkt/{0..9}.tar None\n" in out
    assert "files ['kept/a.txt', 'kept/demo/e.txt']\n" in out
    assert "a trouble\n" in out
    assert "FAILED, exit code 7" in err
    _, err = begun.killed.communicate(timeout=120)
    assert begun.killed.returncode == 137, err


@pytest.mark.slow
def test_a_submitted_job_reads_and_writes_s3(head: str, s3_server: S3Server, s3_url: str, tmp_path: Path) -> None:
    """By Ray's own command, as the README has it."""
    write_shards(tmp_path / "in", num_shards=3, samples_each=6)
    fs = s3_server.filesystem()
    fs.put(str(tmp_path / "in"), f"{s3_url}/shards", recursive=True)
    variables = {**s3_server.environment}
    variables |= {"EMBED_INPUT": f"{s3_url}/shards/photos-{{00000..00002}}.tar", "EMBED_OUTPUT": f"{s3_url}/out"}
    small = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--device", "cpu")
    submit = [
        BINARIES / "ray", "job", "submit", f"--address={head}", "--working-dir", ".",
        "--runtime-env-json", json.dumps({"env_vars": variables, "excludes": [".venv", ".git", "demo"]}),
        "--", "jobs/embed.py", *small, "--precision", "fp32", "--part-rows", "4",
    ]  # fmt: skip
    done = subprocess.run(submit, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exit 0: every sample is one stored row" in done.stdout
    fs.get(f"{s3_url}/out/", str(tmp_path / "out"), recursive=True)
    tables = [pq.read_table(path) for path in (tmp_path / "out" / "embeddings").glob("*.parquet")]
    keys = sorted(key for table in tables for key in table["image_id"].to_pylist())
    assert keys == [f"{shard:03d}-{i:04d}" for shard in range(3) for i in range(6)]
    left = (path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert not any(s3_server.environment["AWS_SECRET_ACCESS_KEY"].encode() in data for data in left)
    assert s3_server.environment["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr


@pytest.mark.slow
def test_an_id_is_a_lock_and_sigterm_leaves_the_job_running(
    head: str, begun: Begun, start: Callable[..., Popen], folder: Path
) -> None:
    wait_for((folder / "weekly-started").exists)
    second = start(*weekly(head, folder), script=COUNTS_ITS_STARTS)
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert "job weekly is RUNNING on this cluster: nothing was started" in err

    begun.locked.send_signal(signal.SIGTERM)
    _, err = begun.locked.communicate(timeout=60)
    assert begun.locked.returncode == 143
    assert "job weekly goes on" in err
    assert status(head, "weekly") == "RUNNING"
    (folder / "weekly-ends").touch()
    wait_for(lambda: status(head, "weekly") == "SUCCEEDED")

    third = start(*weekly(head, folder), script=COUNTS_ITS_STARTS)
    _, err = third.communicate(timeout=60)
    assert third.returncode == 2
    assert "job weekly has run on this cluster already (SUCCEEDED)" in err
    assert (folder / "weekly-started").read_text() == "x"


@pytest.mark.slow
def test_ctrl_c_stops_the_job_where_that_is_asked_for(head: str, begun: Begun, folder: Path) -> None:
    wait_for((folder / "stopped-started").exists)
    begun.stopped.send_signal(signal.SIGINT)
    _, err = begun.stopped.communicate(timeout=60)
    assert begun.stopped.returncode == 130, err
    assert (folder / "told").exists()
    assert status(head, "stopped") == "STOPPED"


@pytest.mark.slow
def test_a_cut_connection_costs_no_line_of_the_log_and_prints_none_twice(begun: Begun, folder: Path) -> None:
    lines = []
    for line in begun.cut.stdout or ():
        if line.startswith("line "):
            lines.append(line)
        if line == "line 19\n":
            (folder / "uncut").touch()
            assert begun.proxy.cut() > 0
    _, err = begun.cut.communicate(timeout=120)
    assert begun.cut.returncode == 0, err
    assert lines == [f"line {i}\n" for i in range(40)]


@pytest.mark.slow
def test_a_cluster_that_stops_answering_is_given_up_and_a_quiet_job_is_not_taken_for_one(
    head: str, start: Callable[..., Popen], folder: Path
) -> None:
    go_on = folder / "silent-ends"
    proxy = Proxy(int(head.rsplit(":", 1)[1]))
    patience = {"quiet_s": 0.75, "lost_s": 3.0}
    silent = start(
        "--address", f"http://127.0.0.1:{proxy.port}", "--submission-id", "silent", "--",
        sys.executable, "job.py", go_on, script=WAITS, patience={**patience, "answer_s": 3.0},
    )  # fmt: skip
    quiet = start("--address", head, "--", sys.executable, "job.py", 5, script=IS_QUIET, patience=patience)
    assert silent.stdout is not None
    assert "begun\n" in iter(silent.stdout.readline, "")
    proxy.stopped.set()
    # Requests that nobody answers are still under way when it ends.
    _, err = silent.communicate(timeout=120)
    assert silent.returncode == 69, err
    assert "nothing heard of job silent for 3 s, it may still run: no answer within 3 s" in err
    assert status(head, "silent") == "RUNNING"
    go_on.touch()
    out, err = quiet.communicate(timeout=120)
    assert quiet.returncode == 7, err
    assert out.count("begun\n") == 1
    wait_for(lambda: status(head, "silent") == "SUCCEEDED")


@pytest.mark.parametrize("code", [401, 403])
def test_a_cluster_that_wants_another_token_is_told_apart_from_one_that_is_not_there(start, code):
    asked = []

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers["Authorization"])
            self.send_error(code)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        job = start("--address", address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="sesame")
        _, err = job.communicate(timeout=60)
        server.shutdown()
    assert job.returncode == 2
    assert "RAY_AUTH_MODE must be token and RAY_AUTH_TOKEN the cluster's token: Authentication " in err
    assert "Traceback" not in err
    assert "sesame" not in err
    assert asked == ["Bearer sesame"]


def test_a_token_that_was_promised_and_is_not_there_is_told_before_anything_is_asked(start, tmp_path):
    job = start("--address", "http://127.0.0.1:9", RAY_AUTH_MODE="token", HOME=str(tmp_path))
    _, err = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "RAY_AUTH_MODE must be token and RAY_AUTH_TOKEN the cluster's token: " in err
    assert "Traceback" not in err


def test_a_cluster_that_takes_connections_and_never_answers_is_given_up(start):
    with socket.create_server(("127.0.0.1", 0)) as server:
        job = start("--address", f"http://127.0.0.1:{server.getsockname()[1]}", patience={"lost_s": 1.0})
        _, err = job.communicate(timeout=60)
    assert job.returncode == 69
    assert "the cluster did not answer for 1 s" in err


def test_a_cluster_that_is_not_there_is_told_apart_from_a_job_that_failed(start):
    (port,) = free_ports(1)
    job = start("--address", f"http://127.0.0.1:{port}")
    _, err = job.communicate(timeout=60)
    assert job.returncode == 69
    assert "the cluster cannot be reached" in err
