"""The `shard-embedder` command: the commands of `jobs/` under one name."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

from shard_embedder.jobs.support.command import COMMANDS
from shard_embedder.jobs.support.exit_codes import EXIT_USAGE

_COMMANDS = {**COMMANDS, "version": "print the version"}


def _usage() -> str:
    lines = "\n".join(f"  {name:<12}{text}" for name, text in _COMMANDS.items())
    return f"usage: shard-embedder COMMAND ...\n\n{lines}\n\nThe options of one: shard-embedder COMMAND --help"


def main() -> int:
    """Run the command that the first argument names, and return its exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if arguments[0] in ("version", "--version"):
        print(f"shard-embedder {version('shard-embedder')}")
        return 0
    name = arguments[0]
    if name not in _COMMANDS:
        known = ", ".join(_COMMANDS)
        print(f"shard-embedder: error: the command must be one of {known}, got {name!r}", file=sys.stderr)
        return EXIT_USAGE
    # Usage and errors name what was typed.
    sys.argv[0] = f"shard-embedder {name}"
    code: int = import_module(f"shard_embedder.jobs.{name}").main(arguments[1:])
    return code
