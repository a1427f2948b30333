"""The files of `infra/`, and how a misspelt word in one is found."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import ray
import yaml

from tests.conftest import ROOT

INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
RAY = Path(ray.__file__).parent
UV = Path(sys.executable).with_name("uv")
RAY_KINDS = ("rayjob.yaml", "raycronjob.yaml")
CORE_KINDS = ("access.yaml", "settings.yaml", "cronjob.yaml")
# Maps whose keys are the user's, so no schema knows them.
FREE = ("labels", "annotations", "data", "rayStartParams", "requests", "limits")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def locked(name: str) -> str:
    """The version of a package in requirements.lock."""
    found = re.search(rf"^{re.escape(name)}==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert found, f"{name} is not in requirements.lock"
    return found[1]


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value below `value` with its path, itself first."""
    yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from walk(below, (*path, key))


def misspelt(document: Any, free: tuple[str, ...] = FREE) -> Iterator[tuple[str, Any]]:
    """Copies of `document`, each with another field misspelt, and that field's path."""
    for path, _ in walk(document):
        if not path or not isinstance(path[-1], str) or set(path[:-1]) & set(free):
            continue
        wrong = copy.deepcopy(document)
        parent = wrong
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1] + "z"] = parent.pop(path[-1])
        yield ".".join(map(str, path)), wrong


def passes(check: Callable[[Any], object], document: Any) -> bool:
    """Whether a check finds nothing wrong."""
    try:
        check(document)
    except Exception:
        return False
    return True


def check_texts(document: Any, allowed: dict[str, str], others: set[str]) -> None:
    """Raise where a text is none that its field may have, of a field that is not one of `others`."""
    for path, value in walk(document):
        field = ".".join([name for name in path if isinstance(name, str)][-2:])
        if isinstance(value, str) and field not in others:
            assert re.fullmatch(allowed[field], value), (path, value)
            assert not re.fullmatch(allowed[field], f"{value}z"), (path, value)


@functools.cache
def options_of(*command: str | Path) -> set[str]:
    """The options that the help of a program names."""
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=120, check=True)
    return _options_in(shown.stdout)


@functools.cache
def options_of_main(main: Callable[[list[str]], object], *arguments: str) -> set[str]:
    """The same of a program that runs in this process, which has imported what it needs."""
    with redirect_stdout(io.StringIO()) as shown, suppress(SystemExit):
        main([*arguments, "--help"])
    return _options_in(shown.getvalue())


def options_of_ray(*command: str) -> set[str]:
    """The options of one of Ray's own commands."""
    (entry,) = entry_points(group="console_scripts", name="ray")
    return options_of_main(importlib.import_module(entry.module).cli, *command)


def _options_in(text: str) -> set[str]:
    found = set(re.findall(r"--[a-z][a-z-]+", text))
    assert found
    return found


def copied(dockerfile: str) -> set[str]:
    lines = re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def groups(rayjob: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in rayjob["rayClusterSpec"]["workerGroupSpecs"]}


def pods(rayjob: dict[str, Any], cronjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["rayClusterSpec"]
    templates = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"], cronjob["jobTemplate"]["spec"]]
    return [template["template"]["spec"] for template in templates]


# What clouds and Karpenter call a spot node.
SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def on_demand(text: str, num_changes: int) -> dict[str, Any]:
    """What is left of a file where one does what its comments say for on demand, which is in so many places."""
    left, num_blocks = re.subn(
        r"^ *# .*remove all down to \"end of spot\"\.\n(.*\n)*? *# end of spot\n", "", text, flags=re.M
    )
    left, num_lines = re.subn(r"^.*# for on demand, remove this line\n", "", left, flags=re.M)
    assert num_blocks + num_lines == num_changes
    (document,) = yaml.safe_load_all(left)
    return document
