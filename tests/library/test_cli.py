"""The one command: it runs the others, names itself, and works in any folder."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tests.conftest import ROOT, write_shards


def run(folder: Path, *arguments: str) -> Any:
    command = [sys.executable, "-c", "import sys; from shard_embedder.cli import main; sys.exit(main())", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_every_command_is_told_and_known(tmp_path: Path) -> None:
    told = run(tmp_path, "--help")
    assert told.returncode == 0
    for path in sorted((ROOT / "jobs").glob("*.py")):
        if path.stem != "__init__":
            assert f"\n  {path.stem} " in told.stdout, path.stem
    assert run(tmp_path, "--version").stdout.startswith("shard-embedder 0.")
    wrong = run(tmp_path, "embedd")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "the command must be one of embed, verify, " in wrong.stderr


@pytest.mark.parametrize("command", ["verify", "index", "pack"])
def test_usage_and_errors_name_what_was_typed(tmp_path: Path, command: str) -> None:
    assert run(tmp_path, command, "--help").stdout.startswith(f"usage: shard-embedder {command} ")
    wrong = run(tmp_path, command, "--no-such-option")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"shard-embedder {command}: error: ")


def test_one_package_is_installed_and_it_has_every_room() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
        "include"
    ]
    packages = set(setuptools.find_packages(ROOT, include=patterns))
    assert {name.partition(".")[0] for name in packages} == {"shard_embedder"}
    for folder in ("pipeline", "jobs"):
        rooms = {path.parent.relative_to(ROOT) for path in (ROOT / folder).rglob("__init__.py")}
        assert {f"shard_embedder.{'.'.join(room.parts)}" for room in rooms} <= packages


@pytest.mark.usefixtures("ray_session")
def test_a_project_with_folders_of_the_same_names_can_run_the_job(tmp_path: Path) -> None:
    for folder in ("jobs", "pipeline"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('this is the project, and no other')")
    write_shards(tmp_path / "in", 1, 4)
    small = ("--backbone", "squeezenet1_1", "--weights", "random:3", "--image-size", "64", "--device", "cpu")
    done = run(tmp_path, "embed", "--input", "in", "--output", "out", *small)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run(tmp_path, "verify", "out", "--input", "in").returncode == 0
