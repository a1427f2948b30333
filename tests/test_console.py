"""What a person sees of a run."""

from __future__ import annotations

import time

import pytest

from jobs import console
from jobs.console import Console, human_bytes, human_s


def test_sizes_and_times_are_shown_as_people_say_them() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1024, 5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]
    assert [human_s(n) for n in (0, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]


def test_without_a_terminal_a_line_comes_even_when_nothing_moves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.05)
    shown = Console()
    with shown.progress():
        time.sleep(0.5)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("0:00:0") and line.endswith("starting") for line in lines)


def test_a_run_with_nothing_to_do_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Console().nothing_to_do(4)
    assert capsys.readouterr().out == "nothing to do: all 4 shards are done\n"
