"""A node whose Pillow has known faults decodes nothing, and one that lacks the job's pillow-heif neither."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from shard_embedder.pipeline.core.errors import ClusterError, SettingsError
from shard_embedder.pipeline.decoding.versions import (
    INSTALL_HEIF,
    LEAST_PILLOW,
    LEAST_TORCHCODEC,
    require_heif,
    require_pillow,
    require_torchcodec,
)
from tests.conftest import ROOT

# Of a Pillow that is loaded: one that is not would refuse to be.
_DECODE = """
import PIL.Image
PIL.__version__ = "12.3.0"
from shard_embedder.pipeline.core.errors import ClusterError
from shard_embedder.pipeline.decoding.decoder import Decoder
from tests.decoding.images import FILES, make_decoder, part
for decode in (lambda: next(make_decoder()(part([FILES["jpeg"]]))), lambda: make_decoder().decode(FILES["png"])):
    try:
        decode()
    except ClusterError as error:
        print(error)
"""


def test_the_version_that_is_checked_is_the_one_that_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"pillow>={'.'.join(map(str, LEAST_PILLOW))}" in project["dependencies"]


@pytest.mark.parametrize("version", ["12.3.0", "9.5.0", "12.99.1.dev0"])
def test_an_older_one_is_refused(version: str) -> None:
    with pytest.raises(ClusterError, match=rf"^Pillow must be at least 13\.0 on every node, got {version} on "):
        require_pillow(version)


@pytest.mark.parametrize("version", ["13.0.0", "13.0.0.dev0", "14.1", "100.0"])
def test_this_one_and_newer_ones_are_taken(version: str) -> None:
    require_pillow(version)


def test_neither_a_worker_nor_a_child_decodes_with_an_older_one() -> None:
    done = subprocess.run([sys.executable, "-c", _DECODE], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("Pillow must be at least 13.0 on every node, got 12.3.0 on " in line for line in lines)


def test_the_pillow_heif_that_is_asked_for_is_the_one_that_is_required() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"pip install '{extras['heif'][0]}'" == INSTALL_HEIF


def test_decoding_on_devices_is_refused_without_the_torchcodec_that_is_required() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"] == [f"torchcodec>={'.'.join(map(str, LEAST_TORCHCODEC))}"]
    for version, got in ((None, "none"), ("0.15.2", "0.15.2")):
        with pytest.raises(
            SettingsError, match=rf"^decode gpu needs torchcodec 0\.16 or newer, got {got}: pip install"
        ):
            require_torchcodec(version)
    require_torchcodec("0.16.0")
    require_torchcodec("1.0")


@pytest.mark.parametrize(("version", "got"), [(None, "none"), ("1.8.0", "1.8.0"), ("0.22.1", "0.22.1")])
def test_a_node_without_the_jobs_pillow_heif_is_refused(version: str | None, got: str) -> None:
    with pytest.raises(
        ClusterError, match=rf"^pillow-heif must be at least 1\.8\.1 on every node, .* got {got} on .*: pip install "
    ):
        require_heif(version)
    require_heif("1.8.1")
    require_heif("2.0")
