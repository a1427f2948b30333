"""How a run ended, in a line: the worst that its report tells, and what to do about it."""

from __future__ import annotations

from typing import Any

import pytest
import rich.console

from shard_embedder.jobs.support.console import Console
from shard_embedder.pipeline.run.verdict import Incomplete, judge, without_report

NOTHING = Incomplete()
CUT = Incomplete(damaged=["b/07", "b/06"])


def report(**changes: Any) -> dict[str, Any]:
    return {
        "balanced": True,
        "shards": {"missing": 0},
        "num_imbalances": 0,
        "samples": 10,
        "embedded": 10 - changes.get("errors", 0),
        "errors": 0,
        "device": "cpu",
        "problems": [],
        "warnings": [],
        "report_fault": None,
        "output": "out",
        **changes,
    }


def judged(
    incomplete: Incomplete = NOTHING,
    limit: float = 1.0,
    left: int = 0,
    worst: tuple[str, int, int] | None = None,
    shard_limit: float = 1.0,
    **changes: Any,
) -> dict[str, Any]:
    made = report(**changes)
    found = judge(
        made,
        incomplete,
        num_shards=9,
        num_left=left,
        worst_share=worst,
        max_error_fraction=limit,
        max_shard_error_fraction=shard_limit,
    )
    return {**made, **found}


def line(told: dict[str, Any]) -> tuple[int, str, str]:
    verdict = told["verdict"]
    return told["exit_code"], verdict["level"], " ".join(filter(None, [f"{verdict['happened']}.", verdict["next"]]))


def test_the_exit_code_is_the_worst_that_the_report_tells() -> None:
    broken = {"balanced": False, "num_imbalances": 1}
    assert judged()["exit_code"] == 0
    assert judged(errors=3, limit=0.3)["exit_code"] == 0
    assert judged(errors=3, limit=0.2)["exit_code"] == 5
    assert judged(errors=3, worst=("a", 1, 2), shard_limit=0.5)["exit_code"] == 0
    assert judged(errors=3, worst=("a", 2, 2), shard_limit=0.5)["exit_code"] == 5
    assert judged(CUT, errors=3, limit=0.2)["exit_code"] == 3
    assert judged(CUT, errors=3, limit=0.2, **broken)["exit_code"] == 4


def test_a_verdict_names_the_shards_and_what_to_do_about_each() -> None:
    again = "run the same command again."
    assert line(judged(CUT)) == (
        3, "warn", f"2 of 9 shards are incomplete. Replace b/06.tar, b/07.tar and {again}"
    )  # fmt: skip
    many = Incomplete(damaged=["a"], unreadable=[f"n{i}" for i in range(5)], vanished=["gone"], refused=["long"])
    assert line(judged(many))[2] == (
        "8 of 9 shards are incomplete. Replace a.tar; make n0.tar, n1.tar, n2.tar and 2 more readable; "
        f"restore gone.tar; solve what keeps long.tar from being embedded; then {again}"
    )


def test_a_verdict_names_the_limit_and_the_value() -> None:
    code, level, text = line(judged(errors=3, limit=0.25))
    assert (code, level) == (5, "warn")
    assert "3 of 10 samples are errors, a fraction of 0.3, which is more than --max-error-fraction 0.25." in text


@pytest.mark.parametrize("changes", [{"problems": ["x"]}, {"warnings": ["x"]}, {"errors": 10}])
def test_a_run_whose_result_may_not_be_meant_is_no_plain_success(changes: dict[str, Any]) -> None:
    assert line(judged())[1] == "good"
    assert line(judged(errors=9))[1] == "good"
    assert line(judged(**changes))[:2] == (0, "warn")


def test_shards_that_a_limit_left_are_told() -> None:
    assert line(judged(left=4))[2].endswith("--limit left 4 shards: run the same command again to go on.")


def test_a_report_that_cannot_be_stored_is_a_failure_and_hides_no_worse_one() -> None:
    lost = without_report(judged(), "no space")
    assert line(lost) == (
        4, "bad", "the rows are stored, and the report cannot be stored: no space. Run the same command again."
    )  # fmt: skip
    worse = without_report(judged(balanced=False, num_imbalances=2), "no space")
    assert "2 disagreements" in worse["verdict"]["happened"]


@pytest.mark.parametrize(
    ("told", "colour"), [(judged(), "32"), (judged(CUT), "33"), (judged(errors=1, limit=0.0), "33"),
                         (judged(balanced=False), "31")],
)  # fmt: skip
def test_the_line_has_the_colour_of_how_bad_it_is(
    told: dict[str, Any], colour: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Console()
    monkeypatch.setattr(
        shown, "_out", rich.console.Console(force_terminal=True, color_system="standard", highlight=False, width=500)
    )
    shown.verdict(told)
    said = capsys.readouterr().out
    assert said.startswith(f"\x1b[1;{colour}mexit {told['exit_code']}: ")
    assert said.rstrip().endswith("See out/report.html.\x1b[0m")
