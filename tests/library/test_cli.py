"""The one command: it runs the others, names itself, and says when a folder hides it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.cli import hidden_by
from tests.conftest import ROOT

SCRIPT = Path(sys.executable).with_name("shard-embedder")


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


def test_a_folder_that_hides_a_package_is_named(tmp_path: Path) -> None:
    assert hidden_by(tmp_path, ROOT) is None
    assert hidden_by(ROOT, ROOT) is None
    (tmp_path / "jobs").mkdir()
    assert hidden_by(tmp_path, ROOT) == str(tmp_path / "jobs")
    done = (
        subprocess.run([str(SCRIPT), "verify", "x"], cwd=tmp_path, capture_output=True, text=True, check=False)
        if SCRIPT.exists()
        else run(tmp_path, "verify", "x")
    )
    assert done.returncode == 2
    assert f"the folder {tmp_path / 'jobs'} hides a package" in done.stderr
