"""What a person sees of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.jobs import embed
from shard_embedder.jobs.support import console
from shard_embedder.jobs.support.console import Console, format_clock, has_unused_gpu
from shard_embedder.jobs.support.console_json import JsonConsole
from shard_embedder.pipeline.core.formatting import format_size
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.find import Pending
from tests.conftest import encode, photo, write_shards


def test_sizes_and_times_are_shown_as_people_say_them() -> None:
    assert [format_size(n) for n in (0, 1023, 1024, 5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB"]
    assert [format_clock(n) for n in (0, 59.6, 3725, 90000)] == [
        "0:00:00", "0:01:00", "1:02:05", "1 day, 1:00:00",
    ]  # fmt: skip


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


def test_until_there_is_a_part_the_progress_says_what_happens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.02)
    for shown in (Console(), JsonConsole()):
        with shown.progress():
            for begin in (lambda: shown.phase("starting Ray"), lambda: shown.begin_pass(1, [], [])):  # noqa: B023
                begin()
                time.sleep(0.3)
        said = capsys.readouterr().out
        assert said.index("starting Ray") < said.index("waiting for the first part")


def test_cpus_are_a_problem_only_where_a_driver_shows_that_a_gpu_was_meant(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    assert not has_unused_gpu("auto", "cpu", driver)
    driver.write_text("NVRM version")
    assert has_unused_gpu("auto", "cpu", driver)
    assert not has_unused_gpu("cpu", "cpu", driver)
    assert not has_unused_gpu("auto", "cuda", driver)


def lines_of(text: str) -> list[dict[str, Any]]:
    """Every line of a log as an object; one that is none raises."""
    return [json.loads(line) for line in text.splitlines()]


def test_brackets_and_colons_of_a_name_are_shown_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=1)
    monkeypatch.chdir(tmp_path)
    asked = ["--input", "in/[o-q]*.tar", "--output", "g[/x]/:key:/out", "--weights", "random:0"]
    assert embed.main([*asked, "--backbone", "squeezenet1_1", "--image-size", "64", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "input     in/[o-q]*.tar: 1 shard\n" in said
    assert f"output    {tmp_path}/g[/x]/:key:/out (new)\n" in said


def test_a_log_for_machines_tells_what_of_a_folder_of_images_is_packed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes(str(tmp_path), "photos/a.jpg", encode(photo(1)))
    asked = ["--log-format", "json", "--input", str(tmp_path / "photos"), "--output", str(tmp_path / "out")]
    small = ["--backbone", "squeezenet1_1", "--weights", "random:0", "--image-size", "64", "--dry-run"]
    assert embed.main([*asked, *small]) == 0
    packing, plan, _ = lines_of(capsys.readouterr().out)
    assert (packing["event"], packing["num_to_pack"], packing["num_new"], packing["dry_run"]) == (
        "packing",
        1,
        1,
        True,
    )
    assert (plan["event"], plan["num_shards"]) == ("plan", 0)


def test_a_log_for_machines_tells_what_was_wrong_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert embed.main(["--log-format", "json", "--output", "s3://key:hunter2@bkt/out", "--input", "in"]) == 2
    assert embed.main(["--log-format", "json", "--dry-run", "--output", "out", "--input", "/no/such/*.tar"]) == 2
    said = capsys.readouterr()
    assert said.err == ""
    lines = lines_of(said.out)
    assert [(line["event"], line["level"]) for line in lines] == [("error", "error"), ("end", "error")] * 2
    assert "output must not carry credentials" in lines[0]["message"]
    assert "/no/such/*.tar" in lines[2]["message"]
    assert all(line["run"] for line in lines)
    assert lines[3]["exit_code"] == 2
    shown = JsonConsole()
    shown.waiting("for s3://key:hunter2@bkt/out?X-Amz-Signature=hunter3")
    shown.error("s3://key:hunter2@bkt/in")
    said = capsys.readouterr()
    assert "hunter" not in said.out + said.err
    assert [line["event"] for line in lines_of(said.out)] == ["waiting", "error"]


def test_a_shard_s_name_forges_no_line_and_commands_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a\x1b[2J\x1b]0;owned\x07\nbalanced: every sample is one stored row\udcff"
    for shown in (Console(), JsonConsole()):
        shown.waiting(f"for {name}")
        shown.warning(name)
        shown.error(name)
    for said in capsys.readouterr():
        assert "\x1b" not in said
        assert "\x07" not in said
        assert not [line for line in said.splitlines() if line.startswith("balanced")]


def pending(count: int) -> list[Pending]:
    return [Pending(f"s{number}", "", 1000, "") for number in range(count)]


def test_progress_and_the_time_left_are_of_the_pass_and_images_of_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The start took 90 s, which do not come again.
    tally = Tally(started=time.monotonic() - 990, began_s=90.0, last_part_s=990.0, num_parts=1)
    for shown in (Console(), JsonConsole()):
        shown.begin_pass(1, pending(100), [])
        tally.num_shards, tally.num_embedded, tally.read_bytes = 90, 900, 90_000
        shown.part(tally)
        shown._progress_line(900.0, 0.0)
        shown.begin_pass(2, pending(10), [])
        shown._progress_line(900.0, 0.0)
        tally.num_shards, tally.num_embedded, tally.read_bytes = 91, 910, 91_000
        tally.started -= 1000
        shown.part(tally)
        shown._progress_line(1900.0, 0.0)
    said = capsys.readouterr().out.splitlines()
    text = [line.partition("/s  ")[2][:-1] for line in said[:4] if "ETA" in line]
    # Without their last digit: the clock goes on.
    assert text == [
        "90/100 shards  0 errors  ETA 0:01:4",
        "0/10 shards  0 errors  ETA ",
        "1/10 shards  0 errors  ETA 2:30:0",
    ]
    told = [line for line in lines_of("\n".join(said[4:])) if line["event"] == "progress"]
    assert [(line["num_shards_done"], line["num_shards"]) for line in told] == [(90, 100), (0, 10), (1, 10)]
    assert [line["embedded"] for line in told] == [900, 900, 910]
    assert told[1]["left_s"] is None
    assert told[2]["left_s"] == pytest.approx(9000, rel=0.01)


def test_another_pass_says_on_one_line_why_the_one_before_did_not_complete(
    capsys: pytest.CaptureFixture[str],
) -> None:
    problems = ["pass 1: RayTaskError(ClusterError): Pillow must be\n  at least 13.0", "s3://key:hunter2@bkt gone"]
    for shown in (Console(), JsonConsole()):
        shown.begin_pass(1, pending(3), [])
        shown.begin_pass(2, pending(2), problems)
        shown.begin_pass(3, pending(1), [])
    *text, _, machine, _ = capsys.readouterr().out.splitlines()
    assert text == [
        "pass 2: 2 shards not complete, which run again; pass 1: RayTaskError(ClusterError): Pillow must be at least "
        "13.0; s3://***@bkt gone",
        "pass 3: 1 shard not complete, which run again",
    ]
    assert json.loads(machine)["problems"] == [problems[0], "s3://***@bkt gone"]


def test_of_long_problems_another_pass_shows_the_begin_and_no_half_of_a_secret(
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = f"pass 1: {' '.join(['why'] * 65)}"
    Console().begin_pass(2, pending(2), [first, f"s3://key:hunter{'-hunter' * 9}@bkt gone"])
    assert capsys.readouterr().out == f"pass 2: 2 shards not complete, which run again; {first}; ...\n"


def test_progress_for_machines_comes_even_when_nothing_moves_and_has_its_numbers_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_S", 0.05)
    shown = JsonConsole()
    with shown.progress():
        time.sleep(0.2)
        shown.begin_pass(1, [], [])
        shown.part(Tally(num_embedded=30, num_errors=2, num_shards=1, num_parts=1, began_s=0.5, last_part_s=2.5))
        time.sleep(0.3)
    lines = [line for line in lines_of(capsys.readouterr().out) if line["event"] == "progress"]
    assert (lines[0]["embedded"], lines[0]["images_per_s"]) == (0, 0.0)
    assert (lines[-1]["embedded"], lines[-1]["errors"], lines[-1]["num_shards_done"]) == (30, 2, 1)
    assert lines[-1]["images_per_s"] == 15.0
