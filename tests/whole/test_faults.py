"""Faults through whole jobs on Ray: a failing network, and a full disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.output.names import UNCOUNTED_FILE
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.executor import Executor
from shard_embedder.pipeline.run.in_process import InProcess
from shard_embedder.pipeline.run.on_ray import OnRay
from shard_embedder.pipeline.run.passes import run
from shard_embedder.pipeline.verify.proof import verify
from tests.conftest import Done, S3Server, SmallDisk, start_ray, write_shard
from tests.faults.proxy import FaultProxy
from tests.outputs import IN_PROCESS, UNHEARD, job_for, rows, stored

# A Ray of its own, before any that is shared: whose would have to be started again.
pytestmark = pytest.mark.head

RunJob = Callable[..., Done]
SMALL = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--device", "cpu")
SMALL += ("--precision", "fp32", "--part-rows", "4")
SAMPLES = 6
OUTPUT_FILES = {"run.json", "embeddings", "report.json", "report.html", "reports"}
# Above this a shard is a read task of its own, so that its fault keeps no other shard waiting.
ALONE_BYTES = 33 * 2**20


def embed(input: Path | str, output: Path | str, executor: Executor, limits: StoreLimits = LIMITS) -> dict[str, Any]:
    """One run, with its report."""
    settings = {"backbone": "squeezenet1_1", "weights": "random:3", "precision": "fp32"}
    config = parse({"input": [str(input)], "output": str(output), **settings, "part_rows": 4})
    job = replace(prepare_job(config), limits=limits)
    return run(job, make_plan(job.shards, config.output), UNHEARD, executor)


@pytest.fixture(scope="module")
def between(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy before the store, for this process and the workers of a Ray of its own."""
    with FaultProxy(s3_server.environment["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage._filesystem.cache_clear()
        yield proxy
    storage._filesystem.cache_clear()


@pytest.fixture(scope="module")
def ray_session(between: FaultProxy) -> Iterator[None]:
    ray.shutdown()
    start_ray()
    yield
    ray.shutdown()


@pytest.fixture
def proxy(between: FaultProxy) -> Iterator[FaultProxy]:
    between.rules.clear()
    between.requests.clear()
    yield between
    between.rules.clear()


# Shard, whether it is read in a task of its own, then method, fault and how often.
PASSING = [
    ("a-burst", False, "GET", "slow_down", 5),
    ("b-reset", False, "GET", "reset", 2),
    ("c-cut", False, "GET", "cut", 2),
    ("d-short", False, "GET", "short", 2),
    ("e-gone", False, "GET", "missing", 1),
    ("f-put-burst", False, "PUT", "slow_down", 4),
    ("g-put-lost", False, "PUT", "lost", 1),
    ("h-put-late", False, "PUT", "late", 1),
    ("i-stall", True, "GET", "stall", 1),
    ("j-silent", True, "GET", "silent", 1),
]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_job_through_faults_that_pass_ends_as_one_without_them(
    proxy: FaultProxy, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    direct = s3_server.filesystem()
    shards, newer = tmp_path / "in", tmp_path / "newer"
    for number, (name, alone, method, fault, times) in enumerate(PASSING):
        write_shard(shards / f"{name}.tar", 10 * number, pad_bytes=ALONE_BYTES * alone)
        proxy.add(fault, rf"/{name}\.", method, times)
    for number, (name, method) in enumerate({"k-replaced-before": "GET", "l-replaced-after": "HEAD"}.items()):
        write_shard(shards / f"{name}.tar", 500 + 10 * number)
        write_shard(newer / f"{name}.tar", 900 + 10 * number)
        proxy.meanwhile(
            lambda name=name: direct.put_file(str(newer / f"{name}.tar"), f"{s3_url}/in/{name}.tar"),
            rf"/{name}\.tar",
            method,
        )
    direct.put(str(shards), f"{s3_url}/in", recursive=True)
    proxy.add("slow_down", "list-type=2", "GET", 2)
    proxy.add("empty", "list-type=2", "GET", 1)
    proxy.add("slow_down", "delete", "POST", 2)
    proxy.add("slow_down", r"run\.json", "PUT", 1)
    proxy.add("lost", r"report\.json", "PUT", 1)
    # What answers nothing is tried again after two seconds, and what fails soon after.
    report = embed(f"{s3_url}/in", f"{s3_url}/out", OnRay(), StoreLimits(request_timeout_s=2.0, max_pause_s=0.5))
    assert report["balanced"]
    assert report["verdict"]["happened"].startswith("every sample is one stored row: ")
    assert not [rule for rule in proxy.rules if rule.times > 0], "every fault happened"
    for path in newer.iterdir():
        path.rename(shards / path.name)
    assert embed(shards, tmp_path / "expected", InProcess())["balanced"]
    direct.get(f"{s3_url}/out/", str(tmp_path / "out"), recursive=True)
    assert rows(tmp_path / "out") == rows(tmp_path / "expected")
    assert not rows(tmp_path / "out", "errors")
    assert verify(str(tmp_path / "out")).findings == []


# Shard, then the fault of each of its GETs (and HEADs where both), and what its error row must say.
LASTING = [
    ("b-denied", "GET", "denied", "shard fault: not permitted to read it: PermissionError"),
    ("c-gone", "GET|HEAD", "missing", "shard fault: listed, but not found when it was read"),
]
# What is tried again for as long as a job's limits say.
TRIED_AGAIN = {"d-busy": "slow_down", "e-reset": "reset", "f-stall": "stall", "g-short": "short"}


@pytest.mark.slow
def test_a_fault_that_outlasts_the_patience_of_a_job_is_named_when_that_ends(
    proxy: FaultProxy, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    shards = tmp_path / "in"
    for number, (name, fault) in enumerate(TRIED_AGAIN.items()):
        write_shard(shards / f"{name}.tar", 10 * number)
        proxy.add(fault, rf"/in/{name}\.", "GET", times=10_000)
    s3_server.filesystem().put(str(shards), f"{s3_url}/in", recursive=True)
    job = job_for(f"{s3_url}/in", tmp_path / "out", max_passes=1)
    impatient = replace(job, limits=StoreLimits(retry_s=1.0, request_timeout_s=0.5))
    run(impatient, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)
    errors = rows(tmp_path / "out", "errors")
    assert [row["shard"] for row in errors] == [*TRIED_AGAIN], "one row a shard"
    for row in errors:
        assert re.match(
            r"shard fault: reading bytes 0 to \d+ failed \d times in \d s, at last with", row["reason"]
        ), row


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_job_through_faults_that_last_names_each_shard_and_the_next_one_makes_it_whole(
    run_job: RunJob, proxy: FaultProxy, s3_server: S3Server, s3_url: str, tmp_path: Path
) -> None:
    direct = s3_server.filesystem()
    shards = tmp_path / "in"
    write_shard(shards / "a-good.tar", 0)
    for number, (name, method, fault, _) in enumerate(LASTING, 1):
        write_shard(shards / f"{name}.tar", 10 * number, pad_bytes=ALONE_BYTES)
        proxy.add(fault, rf"/in/{name}\.", method, times=10_000)
    direct.put(str(shards), f"{s3_url}/in", recursive=True)
    job = ("embed.py", "--input", f"{s3_url}/in", "--output", f"{s3_url}/out", *SMALL)
    done = run_job(*job, "--max-passes", "1")
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"^exit 3: \d+ of \d+ shards are incomplete\. ", done.stdout.splitlines()[-1])
    direct.get(f"{s3_url}/out/", str(tmp_path / "out"), recursive=True)
    assert [row["shard"] for row in rows(tmp_path / "out")] == ["a-good"] * SAMPLES
    errors = rows(tmp_path / "out", "errors")
    assert [row["shard"] for row in errors] == [name for name, *_ in LASTING], "one row a shard"
    for row, (name, _, _, reason) in zip(errors, LASTING, strict=True):
        assert (row["image_id"], row["sample_index"], row["stage"]) == (None, None, "read")
        assert re.match(reason, row["reason"]), row
        assert f"BROKEN    {name}: {row['reason'].removeprefix('shard fault: ')}" in done.stdout
        # One layer of retries: three on top of each other would be some hundred requests.
        assert proxy.count("GET", rf"/in/{name}\.") <= 20
    proxy.rules.clear()
    again = run_job(*job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"1 done, {len(LASTING)} pending ({len(LASTING)} broken before)" in again.stdout
    assert embed(shards, tmp_path / "expected", InProcess())["balanced"]
    direct.get(f"{s3_url}/out/", str(tmp_path / "whole"), recursive=True)
    assert rows(tmp_path / "whole") == rows(tmp_path / "expected")
    assert not rows(tmp_path / "whole", "errors")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_ends_the_job_with_its_path_and_with_space_again_the_next_goes_on(
    run_job: RunJob, small_disk: SmallDisk, tmp_path: Path
) -> None:
    shards, out = tmp_path / "in", small_disk.folder / "out"
    for number in range(20):
        write_shard(shards / f"s-{number:02d}.tar", 10 * number)
    job = ("embed.py", "--input", shards, *SMALL, "--output")
    ballast = small_disk.fill(0)
    none = run_job(*job, out)
    assert none.returncode == 2, none.stdout + none.stderr
    assert f"cannot write to {out}" in none.stderr
    assert "No space left on device" in none.stderr
    assert not [path for path in out.rglob("*") if path.is_file()]
    ballast.unlink()

    full = run_job(*job, out)
    assert full.returncode == 4, full.stdout + full.stderr
    assert re.search(rf"PROBLEM   pass 1: .*No space left on device: '{out}/(embeddings|errors)/s-\d\d", full.stdout)
    assert "pass 2" not in full.stdout, "what cannot be stored is not embedded again"
    assert full.stdout.splitlines()[-1].startswith("exit 4: ")
    before = stored(out)
    assert before
    # The report may be what there was no space for.
    assert {path.name for path in out.iterdir()} <= {*OUTPUT_FILES, UNCOUNTED_FILE}

    small_disk.resize(8192)
    again = run_job(*job, out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert embed(shards, tmp_path / "expected", InProcess())["balanced"]
    assert stored(out) == stored(tmp_path / "expected")
    assert {name: stored(out)[name] for name in before} == before, "what was stored stayed as it was"
    assert {path.name for path in out.iterdir()} == OUTPUT_FILES

    # A run without work writes a report only where there is none of a run that had some. A page of memory is left,
    # which the run needs to say that it runs.
    (out / "report.json").unlink()
    small_disk.fill(4096)
    unreported = run_job(*job, out)
    assert unreported.returncode == 4, unreported.stdout + unreported.stderr
    message = f"the report cannot be stored: OSError: [Errno 28] No space left on device: '{out}/report."
    (last,) = unreported.stdout.splitlines()[-1:]
    assert last.startswith("exit 4: ")
    assert message in last
    assert last.endswith("Run the same command again.")
    assert stored(out) == stored(tmp_path / "expected")
