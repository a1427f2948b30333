"""The overlay deploys another image, settings and role, without an edit of the files that it stands on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from shard_embedder.pipeline.core.config import parse
from tests.infra.files import INFRA, KUBERAY, documents, misspelt, walk

OVERLAY = INFRA / "overlay"


@pytest.fixture(scope="module")
def overlay() -> dict[str, Any]:
    (document,) = documents(OVERLAY / "kustomization.yaml")
    return document


def build(folder: Path) -> list[dict[str, Any]]:
    """What kubectl makes of a kustomization. Raises where it takes a field for none."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60, check=True)
    return list(yaml.safe_load_all(done.stdout))


def images(made: list[dict[str, Any]]) -> set[str]:
    """The image of every container, and what the launcher gives to the pods of the run."""
    found = {value for path, value in walk(made) if path and path[-1] == "image"}
    return found | {
        value["value"] for _, value in walk(made) if isinstance(value, dict) and value.get("name") == "IMAGE"
    }


def test_the_overlay_stands_on_files_and_names_that_exist(overlay):
    (base,) = documents(KUBERAY / "kustomization.yaml")
    assert [(OVERLAY / name).resolve() for name in overlay["resources"]] == [KUBERAY]
    assert overlay["namespace"] == base["namespace"]
    (image,) = overlay["images"]
    assert f"image: {image['name']}:" in (KUBERAY / "cronjob.yaml").read_text()
    (generator,) = overlay["configMapGenerator"]
    (settings,) = documents(KUBERAY / "settings.yaml")
    assert generator["name"] == settings["metadata"]["name"]
    literals = dict(one.split("=", 1) for one in generator["literals"])
    parse({name.removeprefix("EMBED_").lower(): value for name, value in literals.items()})


def test_what_is_deployed_has_the_overlays_image_settings_and_role_and_no_other(overlay):
    made = build(OVERLAY)
    (image,) = overlay["images"]
    assert images(made) == {f"{image['newName']}:{image['newTag']}"}
    (generator,) = overlay["configMapGenerator"]
    (settings,) = [one["data"] for one in made if one["metadata"]["name"] == generator["name"]]
    literals = dict(one.split("=", 1) for one in generator["literals"])
    assert literals.items() <= settings.items()
    assert settings["EMBED_DEVICE"] == "cuda"
    (account,) = [one for one in made if one["kind"] == "ServiceAccount" and one["metadata"]["name"] == "embed"]
    assert set(account["metadata"]["annotations"].values()) == {"arn:aws:iam::123456789012:role/your-role"}


def test_a_copy_beside_the_overlay_is_as_good_and_git_does_not_see_it(tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    shutil.copytree(OVERLAY, tmp_path / "mine")
    assert build(tmp_path / "mine") == build(OVERLAY)
    assert "/infra/mine/" in (INFRA.parent / ".gitignore").read_text().splitlines()


@pytest.mark.slow
def test_kubectl_knows_every_field_of_the_overlay_and_a_misspelt_one_is_seen(overlay, tmp_path):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    (tmp_path / "overlay").mkdir()
    whole, unseen = build(OVERLAY), []
    for path, wrong in misspelt(overlay, free=()):
        (tmp_path / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(wrong))
        try:
            seen = build(tmp_path / "overlay") != whole
        except subprocess.CalledProcessError:
            continue
        if not seen:
            unseen.append(path)
    # Which kinds of files these are: they may be left out.
    assert set(unseen) <= {"apiVersion", "kind"}
