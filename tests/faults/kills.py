"""Kill anything of a running job at any moment, and compare what it stored with an undisturbed run.

    .venv/bin/python -m tests.faults.kills --kills 100 --seed 1

A job (`jobs/embed.py`, its own process) reads from and writes to SeaweedFS, on a Ray cluster of two nodes on this
machine, or, with `--local`, on the Ray that it starts itself. Kills come at seeded random moments. Only what belongs
to this job and this cluster is killed, by pid, and a kill counts only where its victim was alive and at work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.memory import WORKERS
from shard_embedder.pipeline.core.schema import STAGE_DECODE, STAGE_EMBED, STAGE_READ, STAGE_WRITE
from tests.conftest import ROOT, S3Server
from tests.faults.cluster import WATCH, Cluster, Look, kill_tree, kill_worker, start_store
from tests.faults.kill_plan import (
    DECODE,
    DRIVER,
    EMBED,
    KINDS,
    NODE,
    READ,
    STORE,
    WRITE,
    Kill,
    Load,
    Plan,
    Run,
    make_plan,
    table,
)

# What Ray calls the processes of a stage while they work for it.
_TITLES = {
    kind: re.compile(f"ray::.*{re.escape(WORKERS[stage])}")
    for kind, stage in ((READ, STAGE_READ), (DECODE, STAGE_DECODE), (WRITE, STAGE_WRITE), (EMBED, STAGE_EMBED))
}
# A job in which no part is decoded or embedded for so long hangs.
STUCK_S = 240.0
# How long a victim is looked for, once one was seen.
_PATIENCE_S = 10.0
# How many of the kills to come are looked at for one whose victims are there.
_NEAR = 3
_MAX_ATTEMPTS = 40


class Harness:
    """The S3 server, the cluster if any, and the jobs on them."""

    def __init__(self, load: Load, folder: Path, say: Callable[[str], None], *, local: bool = False) -> None:
        self.load, self.folder, self.say = load, folder, say
        self.store = S3Server(folder / "s3")
        self.work_log = folder / "work.log"
        binaries = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            **self.store.environment,
            # A ray.init in this process may have set it to token; drivers must agree with their cluster.
            "RAY_AUTH_MODE": "disabled",
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            # This tree, wherever an editable install leads to.
            "PYTHONPATH": f"{WATCH}{os.pathsep}{ROOT}",
            "KILLS_WORK_LOG": str(self.work_log),
        }
        self.environment.pop("RAY_ADDRESS", None)
        self._local = local
        self.cluster: Cluster | None = None
        self.driver: subprocess.Popen[bytes] | None = None
        self._drivers: set[int] = set()
        self._driver_log = folder / "driver.log"
        self._idle_since: float | None = None
        self.reference: dict[str, bytes] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What can be killed here."""
        return tuple(kind for kind in KINDS if kind != NODE or not self._local)

    def start(self) -> None:
        """Start everything, upload the shards, and make the output to compare with."""
        with ThreadPoolExecutor(1) as pool:
            if not self._local:
                self.cluster = Cluster(self.environment, self.folder / "ray.log")
            started = None if self.cluster is None else pool.submit(self.cluster.start)
            self.store.start()
            shards = self.load.write(self.folder / "shards")
            self.store.filesystem().put(str(shards), f"{self.store.bucket}/in", recursive=True)
            shutil.rmtree(shards)
            if started is not None:
                started.result()
        run = self.run("undisturbed", [])
        if run.wrong or run.gave_up:
            raise RuntimeError(f"the undisturbed run failed: {run.wrong + run.gave_up}")
        if run.begun != {"decode": self.load.num_samples, "embed": self.load.num_samples}:
            raise RuntimeError(f"the undisturbed run counted {run.begun} for {self.load.num_samples} samples")
        self.reference = self.stored("undisturbed")
        self.say(f"undisturbed: {run.wall_s:.0f} s, {len(self.reference)} files")

    def stop(self) -> None:
        """Kill what is left."""
        if self.driver is not None and self.driver.poll() is None:
            kill_tree(self.driver.pid)
            self.driver.wait()
        if self.cluster is not None:
            self.cluster.stop()
        self.store.stop()

    # One run

    def run(self, name: str, plan: list[Plan], most: int = 1000) -> Run:
        """Run the job to its end, and kill as `plan` says; what was done of the plan is taken off it."""
        run = Run()
        begin = time.monotonic()
        self.work_log.write_bytes(b"")
        self._start_driver(name)
        while (code := self._driver_exit(run)) != 0:
            if code is not None:
                run.attempts += 1
                if run.attempts > _MAX_ATTEMPTS:
                    raise RuntimeError(f"{name}: {run.attempts} attempts were not enough")
                self._start_driver(name)
                continue
            if self.cluster is not None:
                self.cluster.keep_node()
            if plan and len(run.kills) < most:
                self._strike_next(plan, run)
            else:
                time.sleep(0.1)
        run.wall_s = time.monotonic() - begin
        self._settle(name, run)
        return run

    def _start_driver(self, name: str) -> None:
        command = [
            sys.executable, str(ROOT / "jobs" / "embed.py"), "--input", f"s3://{self.store.bucket}/in",
            "--output", f"s3://{self.store.bucket}/{name}", *self.load.options,
        ]  # fmt: skip
        environment = dict(self.environment)
        if self.cluster is not None:
            environment["RAY_ADDRESS"] = self.cluster.address
        with self._driver_log.open("wb") as log:
            self.driver = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        self._drivers.add(self.driver.pid)
        self._moved, self._size = time.monotonic(), -1

    def _driver_exit(self, run: Run) -> int | None:
        """The driver's exit code, None while it lives; what it says is noted."""
        assert self.driver is not None
        code = self.driver.poll()
        if code is None:
            size = self.work_log.stat().st_size
            if size != self._size:
                self._moved, self._size = time.monotonic(), size
            if time.monotonic() - self._moved < STUCK_S:
                return None
            self.say(self._processes())
            kill_tree(self.driver.pid)
            self.driver.wait()
            code = -1
            self._gave_up(run, f"stuck for {STUCK_S:.0f} s")
        elif code != 0 and not (run.kills and DRIVER in run.kills[-1].kinds and code == -signal.SIGKILL):
            self._gave_up(run, f"ended with {code}")
        text = self._driver_log.read_text(errors="replace")
        run.more_passes += len(re.findall(r"^pass \d+: \d+ shards", text, re.MULTILINE))
        run.problems += re.findall(r"^PROBLEM +(.*)", text, re.MULTILINE)
        return code

    def _gave_up(self, run: Run, how: str) -> None:
        tail = " | ".join(self._driver_log.read_text(errors="replace").strip().splitlines()[-6:])
        last = f"after {run.kills[-1].label}" if run.kills else "without a kill"
        run.gave_up.append(f"{how} {last}: {tail}")
        self.say(f"  the job {run.gave_up[-1]}")
        if run.kills:
            run.kills[-1].survived = False

    def _settle(self, name: str, run: Run) -> None:
        """Compare the output, and divide the work done twice among the kills before it."""
        run.wrong = self._compare(name)
        begun: Counter[str] = Counter()
        first: dict[tuple[str, str], float] = {}
        for line in self.work_log.read_text().splitlines():
            when, pid, stage, part, count = line.split()
            if int(pid) in self._drivers:
                # It looks at some samples to choose how to embed them all.
                continue
            begun[stage] += int(count)
            before = first.get((stage, part))
            first[stage, part] = float(when)
            if before is not None:
                between = [kill for kill in run.kills if before < kill.at <= float(when)]
                for kill in between:
                    kill.again[stage] += int(count) / len(between)
        run.begun = dict(begun)

    # The output

    def stored(self, name: str) -> dict[str, bytes]:
        """Every stored Parquet file by its path below the output."""
        fs = self.store.filesystem()
        base = f"{self.store.bucket}/{name}/"
        found = [path for folder in ("embeddings", "errors") for path in fs.find(base + folder)]
        return {path.removeprefix(base): data for path, data in fs.cat(found).items()}

    def _compare(self, name: str) -> list[str]:
        """Everything that is wrong with an output."""
        files = self.stored(name)
        wrong = []
        if self.reference:
            wrong += [f"missing: {path}" for path in sorted(self.reference.keys() - files.keys())]
            wrong += [f"too many: {path}" for path in sorted(files.keys() - self.reference.keys())]
            both = self.reference.keys() & files.keys()
            wrong += [f"other bytes: {path}" for path in sorted(both) if files[path] != self.reference[path]]
        rows: Counter[tuple[str, int, str]] = Counter()
        for data in files.values():
            table = pq.read_table(_file(data), columns=["shard", "sample_index", "image_id"])
            rows.update(tuple(row.values()) for row in table.to_pylist())
        wrong += [f"twice: {row}" for row, count in rows.items() if count > 1]
        wrong += [f"lost: {row}" for row in sorted(self.load.rows() - rows.keys())]
        wrong += [f"unknown: {row}" for row in sorted(rows.keys() - self.load.rows())]
        fs = self.store.filesystem()
        wrong += [f"left over: {path}" for path in fs.find(f"{self.store.bucket}/{name}") if "tmp" in path]
        uploads = fs.call_s3("list_multipart_uploads", Bucket=self.store.bucket).get("Uploads", [])
        wrong += [f"left over upload: {upload['Key']}" for upload in uploads]
        return wrong

    # The kills

    def _at_work(self, kind: str, look: Look) -> list[int]:
        """Pids that a kill of `kind` may hit."""
        assert self.driver is not None
        if kind == DRIVER:
            return [self.driver.pid] if self.driver.poll() is None else []
        if kind == STORE:
            return [self.store.process.pid] if self.store.process and self.store.process.poll() is None else []
        if kind == NODE:
            node = self.cluster.node if self.cluster else None
            if node is None or node.poll() is not None:
                return []
            titles = map(look.title, look.descendants(node.pid))
            return [node.pid] if any(pattern.match(one) for one in titles for pattern in _TITLES.values()) else []
        if self.cluster is None:
            roots = [self.driver]
        else:
            roots = [node for node in (self.cluster.head, self.cluster.node) if node is not None]
        pids = look.descendants(*(root.pid for root in roots if root.poll() is None))
        return [pid for pid in pids if _TITLES[kind].match(look.title(pid))]

    def _are_there(self, plan: Plan, look: Look) -> bool:
        return all(self._at_work(kind, look) for kind in plan.kinds)

    def _await(self, plan: Plan, deadline: float) -> bool:
        """Wait until there is something to kill of each kind, while the job lives."""
        assert self.driver is not None
        while self.driver.poll() is None and time.monotonic() < deadline:
            if self._are_there(plan, Look()):
                return True
            time.sleep(0.005)
        return False

    def _strike_next(self, plans: list[Plan], run: Run) -> None:
        """Take the first planned kill whose victims are at work, wait for its moment, and kill.

        It is taken off the plan when all its victims were hit; where the job or the work ends before,
        it stays for later.
        """
        assert self.driver is not None
        look = Look()
        under_way = bool(self._at_work(EMBED, look))
        if not under_way or self._idle_since is None:
            self._idle_since = time.monotonic()
        # In the order of the plan, or nearly: what is always there shall not be killed first.
        patient = time.monotonic() - self._idle_since < _PATIENCE_S
        # A node that never comes back is killed last.
        coming_back = [plan for plan in plans if math.isfinite(plan.away_s)] or plans
        near = coming_back[:_NEAR] if patient else coming_back
        plan = next((plan for plan in near if (under_way or plan.starting) and self._are_there(plan, look)), None)
        if plan is None:
            time.sleep(0.05)
            return
        self._idle_since = None
        with suppress(subprocess.TimeoutExpired):
            self.driver.wait(plan.pause_s)
        linger_s = plan.linger_s
        deadline = time.monotonic() + _PATIENCE_S
        while self._await(plan, deadline):
            # Not always at the first moment of a task; sooner in those that are short.
            time.sleep(linger_s)
            linger_s /= 2
            at = time.time()
            hit = [kind for kind in plan.kinds if self._strike(kind)]
            if not hit:
                continue
            whole = len(hit) == len(plan.kinds)
            run.kills.append(Kill(plan.label if whole else hit[0], tuple(hit), at))
            self.say(f"  {time.strftime('%H:%M:%S')} killed {' and '.join(hit)}")
            if whole:
                plans.remove(plan)
            self._recover(hit, plan.away_s)
            return

    def _strike(self, kind: str) -> bool:
        victims = self._at_work(kind, Look())
        if not victims:
            return False
        if kind == DRIVER:
            assert self.driver is not None
            self.driver.kill()
        elif kind == STORE:
            self.store.stop()
        elif kind == NODE:
            assert self.cluster is not None
            self.cluster.kill_node()
        else:
            return kill_worker(random.choice(victims), _TITLES[kind])
        return True

    def _recover(self, kinds: list[str], away_s: float) -> None:
        if DRIVER in kinds:
            assert self.driver is not None
            self.driver.wait()
        if STORE in kinds or NODE in kinds:
            time.sleep(away_s if math.isfinite(away_s) else 0.0)
        if STORE in kinds:
            start_store(self.store)
        if NODE in kinds:
            assert self.cluster is not None
            if math.isfinite(away_s):
                self.cluster.start_node()
            else:
                self.cluster.node = None

    def _processes(self) -> str:
        """For the log of a job that hangs."""
        assert self.driver is not None
        roots = [self.driver, *((self.cluster.head, self.cluster.node) if self.cluster else ())]
        look = Look()
        titles = {pid: look.title(pid) for pid in look.descendants(*(root.pid for root in roots if root is not None))}
        return "\n".join(f"  {pid} {title[:100]}" for pid, title in titles.items() if "ray::" in title)


def _file(data: bytes) -> Any:
    import pyarrow as pa

    return pa.BufferReader(data)


@contextmanager
def harness(load: Load, folder: Path, say: Callable[[str], None], *, local: bool = False) -> Iterator[Harness]:
    """A harness that is up, with its undisturbed output made."""
    made = Harness(load, folder, say, local=local)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def summary(runs: list[Run], load: Load) -> str:
    """The figures beside the table."""
    wrong = sum(bool(run.wrong) for run in runs)
    begun = {stage: sum(run.begun.get(stage, 0) for run in runs) for stage in ("decode", "embed")}
    total = load.num_samples * len(runs)
    return (
        f"{len(runs)} outputs of {load.num_samples} samples, {len(runs) - wrong} equal to the undisturbed one, "
        f"{wrong} not; {sum(run.attempts for run in runs)} starts of the command; the job gave up by itself "
        f"{sum(len(run.gave_up) for run in runs)} times; {sum(run.more_passes for run in runs)} more passes; "
        f"decoded {begun['decode'] / total:.2f} and embedded {begun['embed'] / total:.2f} times the samples."
    )


def main(arguments: list[str] | None = None) -> int:
    """Make the table, and return 1 where an output was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how many in all (default: 100)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--spread", type=float, default=4.0, help="most seconds between seeing a victim and killing")
    parser.add_argument("--most", type=int, default=20, help="most kills a run (default: 20)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="only these (default: all)")
    parser.add_argument("--local", action="store_true", help="on the Ray that the job starts; without node kills")
    parser.add_argument("--folder", type=Path, help="for the S3 server's data and logs (default: a temporary one)")
    options = parser.parse_args(arguments)
    load = Load()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    with harness(load, folder, say, local=options.local) as job:
        kinds = tuple(kind for kind in options.kinds or KINDS if kind in job.kinds)
        plan = make_plan(options.kills, options.seed, options.spread, kinds)
        while plan:
            name = f"run-{len(runs):03d}"
            say(f"{name}: {len(plan)} kills to go")
            try:
                runs.append(job.run(name, plan, options.most))
            except (RuntimeError, KeyboardInterrupt):
                # What was done before is shown all the same.
                traceback.print_exc()
                break
            run = runs[-1]
            say(
                f"{name}: {len(run.kills)} kills, {run.attempts} attempts, {run.wall_s:.0f} s, {run.more_passes} "
                f"more passes, begun {json.dumps(run.begun)}, {'WRONG ' + str(run.wrong) if run.wrong else 'equal'}"
            )
            for problem in run.problems:
                say(f"  problem: {problem}")
    say(f"\n{table(runs)}\n\n{summary(runs, load)}")
    say(f"seed {options.seed}, spread {options.spread} s, {load}, {'local Ray' if options.local else 'two nodes'}")
    return int(any(run.wrong for run in runs) or bool(plan))


if __name__ == "__main__":
    sys.exit(main())
