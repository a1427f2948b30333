"""What is installed, in the image and by `make`, and a deployment of the alternative schedule."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

INFRA = ROOT / "infra"


def test_the_image_decodes_phones_photos() -> None:
    (command,) = re.findall(r"^ +&& (uv pip install --constraints .+)$", (INFRA / "Dockerfile").read_text(), re.M)
    assert set(re.findall(r"--extra (\S+)", command)) == {"gpu", "heif"}


def make(folder: Path, *arguments: str) -> str:
    """What make would do in a copy of the project."""
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy2(ROOT / name, folder)
    command = ["make", "--dry-run", "--directory", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_the_demo_installs_what_it_needs_at_the_versions_of_the_lock_and_no_tools(tmp_path: Path) -> None:
    said = make(tmp_path, "demo")
    assert "--constraints requirements.lock" in said
    assert set(re.findall(r"--extra (\S+)", said)) == {"demo", "index"}
    assert "pip sync" not in said
    assert said.index("GB") < said.index("pip install"), "the size is told first"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {re.split(r"[>=\[]", one)[0] for extra in ("demo", "heif", "index") for one in extras[extra]}
    assert names == {"scikit-image", "shard-embedder", "pillow-heif", "faiss-cpu"}


def test_where_all_of_the_lock_is_installed_the_demo_takes_that(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".installed").touch()
    said = make(tmp_path, "demo")
    assert "install" not in said
    assert "jobs/demo.py" in said


def test_a_machine_without_a_driver_is_told_of_the_way_without_cudas_libraries(tmp_path: Path) -> None:
    said = make(tmp_path, "setup")
    assert re.search(r"test -e /proc/driver/nvidia/version \|\| echo .*docs/install\.md", said)
    page = (ROOT / "docs" / "install.md").read_text()
    assert "UV_TORCH_BACKEND=cpu" in page
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == extras.keys() - {"dev", "docs"}


def test_a_schedule_by_kuberay_alone_is_deployed_by_an_overlay_as_the_rest(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    shutil.copytree(INFRA / "kuberay", tmp_path / "kuberay")
    shutil.copytree(INFRA / "overlay", tmp_path / "mine")
    text = (tmp_path / "mine" / "kustomization.yaml").read_text()
    taken = re.sub(r"^(  )# (- raycronjob\.yaml|- patch: \|-|    .+)$", r"\1\2", text, flags=re.MULTILINE)
    assert taken.count("\n  - raycronjob.yaml\n") == 1
    (tmp_path / "mine" / "kustomization.yaml").write_text(taken)
    shutil.copy(INFRA / "kuberay" / "raycronjob.yaml", tmp_path / "mine")
    command = ["kubectl", "kustomize", str(tmp_path / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    made = {one["kind"]: one for one in yaml.safe_load_all(done.stdout)}
    assert "CronJob" not in made
    assert made["RayCronJob"]["metadata"]["namespace"] == "embed"
    images = re.findall(r"image: (\S+)", yaml.safe_dump(made["RayCronJob"]))
    assert set(images) == {"registry.example.com/your-team/shard-embedder:0.1.0"}
