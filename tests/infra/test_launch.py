"""What the CronJob's pod runs, against an API server that keeps to the Role."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.infra.files import (
    KUBERAY,
    documents,
)


class Kubernetes:
    """The RayJobs of one namespace, and what KubeRay makes of them, over HTTP."""

    def __init__(self, verbs: list[str], states: list[dict[str, str]]) -> None:
        self.verbs, self.states = verbs, states
        self.jobs: dict[str, dict[str, Any]] = {}
        self.created: list[dict[str, Any]] = []
        self.faults: list[int] = []
        kubernetes = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("/rayjobs")[2].partition("?")[0].strip("/")
                if kubernetes.refuses(self, "get" if name else "list"):
                    return
                if not name:
                    assert self.path.endswith("?labelSelector=app.kubernetes.io/name%3Dshard-embedder")
                    self.answer(200, {"items": list(kubernetes.jobs.values())})
                elif name not in kubernetes.jobs:
                    self.answer(404, {"reason": "NotFound"})
                else:
                    if kubernetes.states:
                        kubernetes.jobs[name]["status"] = kubernetes.states.pop(0)
                    self.answer(200, kubernetes.jobs[name])

            def do_POST(self) -> None:
                if kubernetes.refuses(self, "create"):
                    return
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                kubernetes.created.append(body)
                kubernetes.jobs[body["metadata"]["name"]] = body
                self.answer(201, body)

            def answer(self, status: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def refuses(self, request: Any, verb: str) -> bool:
        if self.faults:
            request.answer(self.faults.pop(0), {"reason": "fault"})
        elif request.headers["Authorization"] != "Bearer sesame":
            request.answer(401, {"reason": "Unauthorized"})
        elif not request.path.startswith("/apis/ray.io/v1/namespaces/embed/rayjobs"):
            request.answer(404, {"reason": "NotFound"})
        elif verb not in self.verbs:
            request.answer(403, {"reason": "Forbidden"})
        else:
            return False
        return True


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "reason": "AppFailed",
    "message": "Job entrypoint command failed with exit code 3, last available logs (truncated to 20,000 chars):\n",
}


# What Kubernetes can tell a pod of a Job about itself, by field path.
POD_FIELDS = {
    "metadata.name": "embed-29000000-x7k2p",
    "metadata.namespace": "embed",
    "metadata.uid": "4-5-6",
    "metadata.labels['batch.kubernetes.io/job-name']": "embed-29000000",
    "metadata.labels['batch.kubernetes.io/controller-uid']": "1-2-3",
}


@pytest.fixture
def launch(tmp_path: Path, cronjob: dict[str, Any]) -> Iterator[Callable[..., tuple[int, str, Kubernetes]]]:
    """Run launch.py as the CronJob's pod does, with what the Role allows."""
    (role,) = [one for one in documents(KUBERAY / "access.yaml") if one["kind"] == "Role"]
    (rule,) = role["rules"]
    assert (rule["apiGroups"], rule["resources"]) == (["ray.io"], ["rayjobs"])
    (tmp_path / "token").write_text("sesame\n")
    (container,) = cronjob["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    environment = {
        one["name"]: one["value"] if "value" in one else POD_FIELDS[one["valueFrom"]["fieldRef"]["fieldPath"]]
        for one in container["env"]
    }
    servers = []

    def run(
        states: list[dict[str, str]],
        jobs: dict[str, Any] | None = None,
        faults: tuple[int, ...] = (),
        **variables: str,
    ) -> tuple[int, str, Kubernetes]:
        kubernetes = Kubernetes(rule["verbs"], list(states))
        kubernetes.jobs.update(jobs or {})
        kubernetes.faults.extend(faults)
        servers.append(kubernetes.server)
        arguments = [KUBERAY / "rayjob.yaml", "--api", kubernetes.url, "--credentials", tmp_path, "--every-s", "0.01"]
        done = subprocess.run(
            [sys.executable, KUBERAY / "launch.py", *arguments],
            env={**environment, **variables},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, kubernetes

    yield run
    for server in servers:
        server.shutdown()


def test_a_launched_run_is_waited_for_and_belongs_to_its_job(launch, rayjob):
    code, said, kubernetes = launch([{}, {"jobDeploymentStatus": "Initializing"}, RUNNING, RUNNING, SUCCEEDED])
    assert code == 0, said
    (made,) = kubernetes.created
    assert made["spec"] == rayjob
    # KubeRay gives its submitter Job the RayJob's name, which must not be that of the CronJob's Job.
    assert made["metadata"]["name"] == "embed-29000000-run"
    assert len(made["metadata"]["name"]) <= 47
    assert "generateName" not in made["metadata"]
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "embed-29000000", "uid": "1-2-3"}
    assert said.count("Running RUNNING") == 1


def test_a_launched_run_has_the_image_of_the_variable_in_all_its_pods(launch):
    _, _, kubernetes = launch([SUCCEEDED], IMAGE="mine:1")
    cluster = kubernetes.created[0]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert [group["template"]["spec"]["containers"][0]["image"] for group in groups] == ["mine:1"] * 3


@pytest.mark.slow
def test_a_launched_run_is_one_that_kuberay_takes(launch, check_ray_kind):
    _, _, kubernetes = launch([SUCCEEDED])
    document = kubernetes.created[0]
    document.pop("status", None)
    check_ray_kind(document)


def test_a_failed_runs_own_exit_code_and_reason_are_passed_on(launch):
    code, said, _ = launch([RUNNING, FAILED])
    assert code == 3
    assert "AppFailed: Job entrypoint command failed with exit code 3" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code"),
    [
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded", "message": "too long"}, 1),
        ({"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "no"}, 1),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1),
        ({**FAILED, "message": "Job entrypoint command failed with exit code -9, last"}, 137),
    ],
)
def test_every_end_that_is_no_success_fails(launch, status, code):
    assert launch([RUNNING, status])[0] == code


def test_a_launcher_started_again_waits_for_the_run_of_the_first(launch):
    code, said, kubernetes = launch([RUNNING, SUCCEEDED], jobs={"embed-29000000-run": {"metadata": {}}})
    assert code == 0, said
    assert kubernetes.created == []


def test_a_run_is_not_started_beside_another_and_is_after_one_that_ended(launch, cronjob):
    other = {"metadata": {"name": "embed-x7k2p"}, "status": RUNNING}
    code, said, kubernetes = launch([], jobs={"embed-x7k2p": other})
    assert code == 75
    assert "embed-x7k2p still runs" in said
    assert kubernetes.created == []
    ended = {"metadata": {"name": "embed-x7k2p"}, "status": FAILED}
    assert launch([SUCCEEDED], jobs={"embed-x7k2p": ended})[0] == 0
    (rule,) = [rule for rule in cronjob["jobTemplate"]["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {1, 2, 3, 4, 5, 75} == set(rule["onExitCodes"]["values"])


def test_an_api_server_that_is_away_for_a_moment_is_asked_again(launch):
    code, said, _ = launch([SUCCEEDED], faults=(503,))
    assert code == 0, said
    assert "trying again" in said


def test_a_run_that_is_refused_says_so(launch):
    code, said, _ = launch([], faults=(404, 403))
    assert code == 2
    assert "403" in said
