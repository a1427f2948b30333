"""--help fits the terminal, has an example that works, and tells defaults by one word."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from importlib import import_module

import pytest

from shard_embedder.jobs.support.command import Parser
from shard_embedder.jobs.support.help_text import wrap
from tests.conftest import ROOT

COMMANDS = ("embed", "verify", "pack", "index", "search", "serve", "duplicates", "submit", "demo")
of_each_command = pytest.mark.parametrize("name", COMMANDS)


def parser_of(name: str) -> Parser:
    return import_module(f"shard_embedder.jobs.{name}").parser()


@of_each_command
@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_line_is_wider_than_the_terminal(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    # The longer of the two names that a command has.
    monkeypatch.setattr(sys, "argv", [f"shard-embedder {name}"])
    lines = parser_of(name).format_help().splitlines()
    assert [line for line in lines if len(line) > width] == []
    if width == 200:
        assert max(map(len, lines)) > 100, "a wide terminal is used"


@of_each_command
def test_an_example_is_there_under_the_name_that_was_typed_and_parses(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [f"shard-embedder {name}"])
    found = re.findall(rf"^  shard-embedder {name} (.+)$", parser_of(name).format_help(), re.MULTILINE)
    assert found
    for example in found:
        options = shlex.split(example.partition("-- ")[0] if name == "submit" else example)
        parser_of(name).parse_args(options)


@of_each_command
def test_a_default_is_told_by_one_word(name: str) -> None:
    top = parser_of(name)
    for action in top._actions:
        default = action.default
        # Numbers, and names; a folder of the system, or a list, is told in words.
        if action.help in (None, argparse.SUPPRESS) or default in (None, "==SUPPRESS==", False, [], ()):
            continue
        if isinstance(default, str | int | float) and action.option_strings:
            assert "(default: " in str(action.help), action.option_strings


@pytest.mark.slow
def test_no_command_loads_torch_before_it_needs_it() -> None:
    script = (
        "import sys; from importlib import import_module\n"
        f"for name in {COMMANDS}: import_module(f'shard_embedder.jobs.{{name}}').parser()\n"
        "print(sorted({'torch', 'webdataset', 'ray.data'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_columns_keep_their_indent_and_what_is_to_be_copied_stays() -> None:
    text = (
        "One two three\nfour five.\n\n  ab    some words that\n        go on\n  c     other\n"
        "key   first\n      second third fourth\n\n  command --with many words and no second column"
    )
    assert wrap(text, 20).splitlines() == [
        "One two three four",
        "five.",
        "",
        "  ab    some words",
        "        that go on",
        "  c     other",
        "key   first second",
        "      third fourth",
        "",
        "  command --with many words and no second column",
    ]
