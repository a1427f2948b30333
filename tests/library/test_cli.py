"""The one command: it runs the others, and names itself. test_process.py runs a job by it."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable

import pytest
import setuptools

from shard_embedder.cli import main
from tests.conftest import ROOT, Done

Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def typed(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["shard-embedder", *arguments])
        try:
            code: object = main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        assert isinstance(code, int)
        return Done(code, said.out, said.err)

    return typed


def test_every_command_is_told_and_known(run: Run) -> None:
    told = run("--help")
    assert told.returncode == 0
    for path in sorted((ROOT / "jobs").glob("*.py")):
        if path.stem != "__init__":
            assert f"\n  {path.stem} " in told.stdout, path.stem
    assert run("--version").stdout.startswith("shard-embedder 0.")
    wrong = run("embedd")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "the command must be one of embed, verify, " in wrong.stderr


@pytest.mark.parametrize("command", ["verify", "index", "pack"])
def test_usage_and_errors_name_what_was_typed(run: Run, command: str) -> None:
    assert run(command, "--help").stdout.startswith(f"usage: shard-embedder {command} ")
    wrong = run(command, "--no-such-option")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"shard-embedder {command}: error: ")


@pytest.mark.parametrize("command", sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")))
def test_help_names_the_other_commands_as_they_are_typed(run: Run, command: str) -> None:
    said = run(command, "--help").stdout
    assert not re.findall(r"(?<![\w/])\w+\.py\b", said)


def test_the_job_names_itself_as_it_was_typed(run: Run) -> None:
    wrong = run("embed", "--input", "nowhere", "--output", "s3://user:word@bucket")
    assert (wrong.returncode, wrong.stderr.startswith("shard-embedder embed: exit 2: output must")) == (2, True)


def test_one_package_is_installed_and_it_has_every_room() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"][
        "include"
    ]
    packages = set(setuptools.find_packages(ROOT, include=patterns))
    assert {name.partition(".")[0] for name in packages} == {"shard_embedder"}
    for folder in ("pipeline", "jobs"):
        rooms = {path.parent.relative_to(ROOT) for path in (ROOT / folder).rglob("__init__.py")}
        assert {f"shard_embedder.{'.'.join(room.parts)}" for room in rooms} <= packages
