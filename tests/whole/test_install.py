"""What is installed, in the image and by `make`, and a deployment of the alternative schedule."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

INFRA = ROOT / "infra"


def test_the_image_decodes_phones_photos() -> None:
    (command,) = re.findall(r"^ +&& (uv pip install --constraints .+)$", (INFRA / "Dockerfile").read_text(), re.M)
    assert set(re.findall(r"--extra (\S+)", command)) == {"gpu", "heif"}


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
