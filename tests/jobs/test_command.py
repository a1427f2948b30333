"""What the command lines share: no secret is shown, and a mistake is told in one line with its rule."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SECRET = "https://127.0.0.1:9/b/a.tar?X-Amz-Signature=hunter2"
COMMANDS = ["bench", "demo", "duplicates", "embed", "index", "pack", "search", "verify"]


def ended(command: str, arguments: list[str]) -> object:
    """The exit code of one of `jobs/`, however it ends."""
    try:
        return importlib.import_module(f"jobs.{command}").main(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_shows_a_secret_in_what_it_does_not_understand(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(command, ["--no-such-option", SECRET, "x", "y"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"{command}.py: error: ")
    assert said.err.count("\n") == 1
    assert "hunter2" not in said.out + said.err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("index", [SECRET, "index"]),
        ("search", [SECRET, "a.jpg"]),
        ("search", ["i", SECRET]),
        ("duplicates", [SECRET]),
    ],
)
def test_no_command_shows_a_secret_in_what_it_does_not_find(
    command: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert ended(command, arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"{command}.py: ")
    assert "hunter2" not in said.out + said.err


@pytest.mark.parametrize(
    ("command", "arguments", "name"),
    [
        ("search", ["i", "a.jpg", "--top", "{}"], "--top"),
        ("verify", ["out", "--threads", "{}"], "--threads"),
        ("pack", ["in", "out", "--max-samples", "{}"], "--max-samples"),
        ("bench", ["plan", "--repeats", "{}"], "--repeats"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_a_number_that_breaks_its_rule_is_named_with_the_rule(
    command: str, arguments: list[str], name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(command, [argument.format(value) for argument in arguments]) == 2
    expected = f"{command}.py: error: argument {name}: must be a whole number of at least 1, got {value!r}; "
    assert capsys.readouterr().err.startswith(expected)


def test_the_demo_takes_no_empty_path_for_the_current_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended("demo", ["--images", ""]) == 2
    assert "argument --images: must not be empty, got ''" in capsys.readouterr().err
