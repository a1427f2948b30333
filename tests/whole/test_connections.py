"""A run speaks to nobody but the machine it runs on, where all that it is given lies there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, write_shards

# For every Python process of the run. A datagram socket that is connected sends nothing: Ray finds its address so.
_WATCH = """
import os, socket, sys

def is_own(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.socket(family).bind((host, 0))
    except OSError:
        return False
    return True

def watch(event, values):
    if event == "socket.connect":
        to = values[1] if values[0].type & socket.SOCK_STREAM else None
    elif event == "socket.sendto":
        to = values[1]
    elif event == "socket.getaddrinfo":
        to = values[:1]
    else:
        return
    host = to[0] if isinstance(to, tuple) else None
    # Ray asks at its start on which cloud it is, also where its usage statistics are off.
    is_clouds = host in ("169.254.169.254", "metadata.google.internal") and "/ray/dashboard/" in sys.argv[0]
    if host and host not in ("localhost", socket.gethostname()) and not is_clouds and not is_own(host):
        with open(os.path.join(os.environ["WATCHED"], "asked"), "a") as file:
            print(sys.argv, event, to, file=file)

sys.addaudithook(watch)
with open(os.path.join(os.environ["WATCHED"], "processes"), "a") as file:
    print(os.getpid(), file=file)
"""


@pytest.mark.slow
def test_no_process_of_a_run_opens_a_connection_to_another_machine(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    (tmp_path / "sitecustomize.py").write_text(_WATCH)
    command = [
        sys.executable, str(ROOT / "jobs" / "embed.py"), "--input", str(tmp_path / "in"),
        "--output", str(tmp_path / "out"), "--backbone", "squeezenet1_1", "--weights", "random:0",
        "--device", "cpu",
    ]  # fmt: skip
    # Where CI is said, some telemetry is silent by itself.
    environment = {name: text for name, text in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    environment |= {"PYTHONPATH": str(tmp_path), "WATCHED": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # The driver, Ray's own and the workers of the stages.
    assert len((tmp_path / "processes").read_text().split()) > 5
    asked = tmp_path / "asked"
    assert not asked.exists(), asked.read_text()
