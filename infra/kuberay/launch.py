#!/usr/bin/env python3
"""Create a RayJob, wait for its end, and exit as it did: what the CronJob's pod runs.

The RayJob is named after the Kubernetes Job that this runs in, so a launcher that is started again finds the
RayJob of the first and waits for that one; and it belongs to that Job, so it goes when the Job goes. Its pods run the
image that the variable IMAGE names.

exit codes:
  0   the RayJob succeeded
  1   it failed and no exit code of its command is known: deadline, no nodes, deleted
  N   the exit code of its command, as Ray tells it
  2   the RayJob was refused; nothing was started
  75  another RayJob of this label still runs; nothing was started
"""

# ruff: noqa: T201 - its output is the log of the pod
from __future__ import annotations

import argparse
import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_BUSY = 75
LABEL = "app.kubernetes.io/name"
ENDED = ("Complete", "Failed", "ValidationFailed")
# The API server may be away for so long, as when it is upgraded.
_PATIENCE_S = 900.0
_RETRY_S = 5.0
_COMMAND_FAILED = re.compile(r"failed with exit code (-?\d+)")


class Api:
    """The RayJobs of one namespace."""

    def __init__(self, url: str, credentials: Path, namespace: str, every_s: float) -> None:
        self._url = f"{url}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._token = credentials / "token"
        authority = credentials / "ca.crt"
        self._retry_s = min(_RETRY_S, every_s)
        self._tls = ssl.create_default_context(cafile=authority) if authority.exists() else None

    def call(self, method: str, path: str = "", body: Any = None) -> tuple[int, Any]:
        """The status and the answer. Faults that pass are tried again for `_PATIENCE_S`."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            request = urllib.request.Request(self._url + path, method=method)
            # Read each time: Kubernetes renews it.
            request.add_header("Authorization", f"Bearer {self._token.read_text().strip()}")
            if body is not None:
                request.data = json.dumps(body).encode()
                request.add_header("Content-Type", "application/json")
            try:
                with urllib.request.urlopen(request, timeout=30, context=self._tls) as response:
                    return response.status, json.load(response)
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code != 429:
                    return error.code, error.read().decode(errors="replace")
                fault: Exception = error
            except OSError as error:
                fault = error
            if time.monotonic() > deadline:
                raise fault
            print(f"the API server did not answer ({fault}); trying again", flush=True)
            time.sleep(self._retry_s)


def with_image(manifest: dict[str, Any], image: str) -> dict[str, Any]:
    """The RayJob with that image for Ray, which is the first container of each pod."""
    cluster = manifest["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        group["template"]["spec"]["containers"][0]["image"] = image
    return manifest


def start(api: Api, manifest: dict[str, Any], name: str, owner: dict[str, str]) -> int:
    """Create the RayJob, unless it is there or another one runs. 0, or an exit code."""
    status, answer = api.call("GET", f"/{name}")
    if status == 200:
        print(f"RayJob {name} is there already; waiting for it", flush=True)
        return 0
    label = manifest["metadata"]["labels"][LABEL]
    status, answer = api.call("GET", f"?labelSelector={LABEL}%3D{label}")
    if status != 200:
        print(f"RayJobs cannot be listed: {status} {answer}", flush=True)
        return EXIT_REFUSED
    others = [job["metadata"]["name"] for job in answer["items"] if state(job) not in ENDED]
    if others:
        print(f"RayJob {', '.join(others)} still runs; nothing was started", flush=True)
        return EXIT_BUSY
    metadata = {key: value for key, value in manifest["metadata"].items() if key != "generateName"}
    body = {**manifest, "metadata": {**metadata, "name": name, "ownerReferences": [owner]}}
    status, answer = api.call("POST", body=body)
    if status not in (201, 409):
        print(f"RayJob {name} was refused: {status} {answer}", flush=True)
        return EXIT_REFUSED
    print(f"RayJob {name} created", flush=True)
    return 0


def state(job: dict[str, Any]) -> str:
    """Where a RayJob is: KubeRay's word, or New before it has one."""
    return str(job.get("status", {}).get("jobDeploymentStatus") or "New")


def wait(api: Api, name: str, every_s: float) -> int:
    """Print each change of the RayJob until it has ended, and return its exit code."""
    before = ""
    while True:
        status, job = api.call("GET", f"/{name}")
        if status != 200:
            print(f"RayJob {name} cannot be read: {status} {job}", flush=True)
            return EXIT_FAILED
        now = f"{state(job)} {job.get('status', {}).get('jobStatus') or ''}".strip()
        if now != before:
            print(f"RayJob {name}: {now}", flush=True)
            before = now
        if state(job) in ENDED:
            return outcome(job)
        time.sleep(every_s)


def outcome(job: dict[str, Any]) -> int:
    """The exit code of a RayJob that has ended, with its reason printed where it failed."""
    status = job["status"]
    if status["jobDeploymentStatus"] == "Complete" and status.get("jobStatus") == "SUCCEEDED":
        return 0
    message = status.get("message", "")
    print(f"{status.get('reason') or 'failed'}: {message}", flush=True)
    found = _COMMAND_FAILED.search(message)
    code = int(found[1]) if found else EXIT_FAILED
    return code if code > 0 else 128 - code


def main() -> int:
    """Launch, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path, help="the RayJob as YAML")
    parser.add_argument(
        "--api", default="https://kubernetes.default.svc", help="of Kubernetes (default: %(default)s)"
    )
    parser.add_argument(
        "--credentials",
        type=Path,
        default=Path("/var/run/secrets/kubernetes.io/serviceaccount"),
        help="folder with token and ca.crt (default: %(default)s)",
    )
    parser.add_argument(
        "--every-s", type=float, default=15.0, help="seconds between two looks (default: %(default)s)"
    )
    options = parser.parse_args()
    job, uid, namespace = (os.environ[key] for key in ("JOB_NAME", "JOB_UID", "NAMESPACE"))
    # Not the Job's own name: KubeRay makes a Job of the RayJob's name, for submitting it.
    name = f"{job}-run"
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}
    api = Api(options.api, options.credentials, namespace, options.every_s)
    manifest = with_image(yaml.safe_load(options.manifest.read_text()), os.environ["IMAGE"])
    return start(api, manifest, name, owner) or wait(api, name, options.every_s)


if __name__ == "__main__":
    sys.exit(main())
