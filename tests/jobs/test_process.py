"""A whole job as a process, as a user starts it: what only a process with a Ray of its own shows.

One job answers all of it. It runs by the one command, in a project whose folders have the names of ours, with a log
for machines and, where a process can have one of its own, a small /dev/shm.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.jobs.support.console import has_unused_gpu
from shard_embedder.pipeline.verify.proof import verify
from shard_embedder.pipeline.verify.recompute import Recompute
from tests.conftest import sample_members, write_shards, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.ray]

SMALL = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--precision", "fp32")
_SMALL_SHM = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
_COMMAND = (sys.executable, "-c", "import sys; from shard_embedder.cli import main; sys.exit(main())")


def ran(project: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=project, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One that has run: in which folder, how it ended, and whether its /dev/shm was small."""

    project: Path
    done: subprocess.CompletedProcess[str]
    has_small_shm: bool

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every line of its output as an object; one that is none raises."""
        return [json.loads(line) for line in self.done.stdout.splitlines()]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    project = tmp_path_factory.mktemp("project")
    for folder in ("jobs", "pipeline"):
        (project / folder).mkdir()
        (project / folder / "__init__.py").write_text("raise ImportError('this is the project, and no other')")
    write_shards(project / "in", num_shards=2, samples_each=3)
    write_tar(project / "in" / "bad.tar", [*sample_members("a", 1), ("b.jpg", b"no image")])
    own = _SMALL_SHM if shutil.which("unshare") and ran(project, *_SMALL_SHM, "true").returncode == 0 else ()
    options = ("embed", "--input", "in", "--output", "out", *SMALL)
    return Job(project, ran(project, *own, *_COMMAND, *options, EMBED_LOG_FORMAT="json"), bool(own))


def test_a_project_with_folders_of_the_same_names_can_run_the_job(job: Job) -> None:
    assert job.done.returncode == 0, job.done.stdout + job.done.stderr
    # Without --input it does not load torch. That is done here, where it is loaded.
    verified = ran(job.project, *_COMMAND, "verify", "out")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verify(str(job.project / "out"), [str(job.project / "in")], Recompute()).proven


def test_rays_own_logs_are_on_disk(job: Job) -> None:
    assert not re.search(r"\.cc:\d+", job.done.stdout + job.done.stderr)


def test_a_log_for_machines_tells_a_run_from_its_plan_to_its_exit_code(job: Job) -> None:
    events = [line["event"] for line in job.lines]
    # Nobody asked for a GPU: that there is none is no problem.
    warned = ["problem"] * (job.has_small_shm + has_unused_gpu("auto", "cpu"))
    begun = ["plan", *warned[: job.has_small_shm], "resources", *warned[job.has_small_shm :], "pass"]
    # Every 30 s, of which the start of Ray takes more than one on a busy machine.
    assert [event for event in events if event != "progress"] == [*begun, "summary", "end"]
    assert (events[0], *events[-2:]) == ("plan", "summary", "end")
    report = json.loads((job.project / "out" / "report.json").read_text())
    assert {line["run"] for line in job.lines} == {report["run"]}
    times = [datetime.fromisoformat(line["time"]) for line in job.lines]
    assert times == sorted(times)
    assert all(time.utcoffset() == timedelta(0) for time in times)
    named = {line["event"]: line for line in job.lines}
    plan, summary, end = named["plan"], named["summary"], named["end"]
    assert (plan["num_shards"], plan["num_pending"], plan["shape"]) == (3, 3, [512])
    assert named["resources"]["device"] == "cpu"
    assert {name: summary[name] for name in ("samples", "embedded", "errors", "balanced", "wall_s")} == {
        name: report[name] for name in ("samples", "embedded", "errors", "balanced", "wall_s")
    }
    assert (end["level"], end["exit_code"]) == ("info", 0)
    assert end["happened"] == "every sample is one stored row: 7 embeddings and 1 error for 8 samples"


def test_a_small_shared_memory_is_told_of(job: Job) -> None:
    if not job.has_small_shm:
        pytest.skip("a /dev/shm of its own cannot be made for a process: unshare --mount, and root, are needed")
    problems = [line["message"] for line in job.lines if line["event"] == "problem"]
    assert problems[0].startswith("/dev/shm has 64.0 MiB, so Ray keeps its objects on disk: give it ")
