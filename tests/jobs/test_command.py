"""What the command lines share: no secret is shown, and a mistake is told in one line with its rule."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shard_embedder.jobs.support.command import CommandError, Parser, run_command
from shard_embedder.jobs.support.progress import plain_console, show_progress
from shard_embedder.pipeline.core.errors import (
    ClusterError,
    InputError,
    OutputBusyError,
    PipelineError,
    ShardError,
    StoreError,
)
from tests.conftest import ROOT

SECRET = "https://127.0.0.1:9/b/a.tar?X-Amz-Signature=hunter2"
COMMANDS = ["bench", "demo", "duplicates", "embed", "index", "pack", "search", "serve", "submit", "verify"]


def ended(command: str, arguments: list[str]) -> object:
    """The exit code of one of `jobs/`, or of the benchmark, however it ends."""
    module = "benchmarks.bench" if command == "bench" else f"jobs.{command}"
    try:
        return importlib.import_module(module).main(arguments)
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
        ("serve", [SECRET]),
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


# The frame.


def run_raising(error: BaseException) -> int:
    def run(flags: object) -> int:
        raise error

    return run_command(Parser("x.py", interrupted="nothing is written"), [], run)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no shard"), 2),
        (ClusterError("no shard"), 2),
        (OutputBusyError("no shard"), 75),
        (PipelineError("no shard"), 4),
        (ShardError("no shard"), 4),
        (StoreError("no shard"), 4),
        (OSError("no shard"), 4),
        (CommandError("no shard", 69), 69),
    ],
)
def test_an_error_ends_a_command_with_one_line_and_the_exit_code_of_its_class(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_raising(error) == code
    assert capsys.readouterr().err == "x.py: no shard\n"


def test_a_command_may_run_in_any_thread() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_raising, InputError("no shard")).result() == 2


def test_an_error_that_nobody_foresaw_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_raising(ZeroDivisionError())


def test_a_commands_last_word_shows_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_raising(OSError(f"{SECRET} not found")) == 4
    assert capsys.readouterr().err == "x.py: https://127.0.0.1:9/b/a.tar?X-Amz-Signature=*** not found\n"


_INTERRUPTED = """
import os, signal, sys, time
from shard_embedder.jobs.support.command import Parser, run_command
number = int(sys.argv[1])
# What a shell without job control runs in the background ignores it, as does all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
before = signal.getsignal(signal.SIGTERM)
def run(flags):
    try:
        os.kill(os.getpid(), number)
        time.sleep(60)
    finally:
        print("cleaned")
code = run_command(Parser("x.py", interrupted="nothing is written"), [], run)
print(signal.getsignal(signal.SIGTERM) == before)
sys.exit(code)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_command_cleans_up_and_says_what_it_left(number: signal.Signals, code: int) -> None:
    # In a process of its own: signals are heard in a main thread, and these would end the tests.
    command = [sys.executable, "-c", _INTERRUPTED, str(int(number))]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stderr == "x.py: interrupted: nothing is written\n"
    assert done.stdout == "cleaned\nTrue\n"


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_help_says_what_each_exit_code_means(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(command, ["--help"]) == 0
    said = capsys.readouterr().out
    assert "\nexit codes:\n  " in said
    assert "\n  130  interrupted (143 by SIGTERM)" in said
    assert command != "submit" or "--stop-on-interrupt" in said


def test_without_a_terminal_progress_is_a_line_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(plain_console(), line_every_s=0.0) as on_progress:
        on_progress("parts", 1, 2000)
        on_progress("parts", 2, 2000)
    with show_progress(plain_console(), line_every_s=60.0) as on_progress:
        on_progress("parts", 3, 2000)
    assert capsys.readouterr().out == "1 of 2,000 parts\n2 of 2,000 parts\n"
