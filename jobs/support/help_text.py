"""Texts of --help, as wide as the terminal."""

from __future__ import annotations

import re
import textwrap

# What stands before the second of two columns: a name, and two spaces or more.
_COLUMN = re.compile(r"\s*\S+\s{2,}(?=\S)")


def wrap(text: str, width: int) -> str:
    """Paragraphs and second columns in lines of at most `width`, where no word is longer.

    Indented lines without a second column are commands to copy, and stay as they are.
    """
    done: list[str] = []
    # The lines that are one paragraph or one entry, and how far its further lines are indented.
    taken: list[str] = []
    indent = ""

    def end() -> None:
        if taken:
            first, *rest = taken
            whole = " ".join([first, *map(str.strip, rest)])
            done.append(
                textwrap.fill(whole, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            )
            taken.clear()

    for line in text.splitlines():
        column = _COLUMN.match(line)
        goes_on = bool(taken) and bool(line.strip()) and len(line) - len(line.lstrip()) == len(indent)
        if goes_on and (column is None or indent):
            taken.append(line)
            continue
        end()
        if column is not None and column[0].strip():
            indent = " " * len(column[0])
            taken.append(line)
        elif line.strip() and not line.startswith(" "):
            indent = ""
            taken.append(line)
        else:
            done.append(line)
    end()
    return "\n".join(done)
