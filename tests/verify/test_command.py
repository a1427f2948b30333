"""The command: what it prints, writes and advises, and how it exits."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.jobs.verify import main
from shard_embedder.pipeline.core.schema import IMAGE_ID
from shard_embedder.pipeline.verify.findings import RULES
from tests.conftest import write_tar
from tests.outputs import embed
from tests.verify.planting import part_path, rewrite, set_column, shard_members

# The command.


def test_the_command_proves_a_good_output_and_writes_json(
    good: Path, shards: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    done = run_job("verify.py", good, "--input", shards, "--recompute", "all", "--json", tmp_path / "verdict.json")
    assert done.returncode == 0, done.stderr
    assert "14: 10 embedded, 4 errors" in done.stdout
    assert f"proven: {good}" in done.stdout
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["proven"] is True
    assert verdict["findings"] == []
    assert (verdict["samples"], verdict["recomputed"]) == (14, 10)


def test_the_command_names_each_fault_on_a_line_and_exits_with_1(
    planted: Path, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    path = part_path(planted, 0)
    rewrite(path, lambda table: set_column(table, IMAGE_ID, ["a\nb\x1b[31m", "c", "c"]), honest=False)
    done = run_job("verify.py", planted, "--json", tmp_path / "verdict.json")
    assert done.returncode == 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("WRONG")]
    assert len(lines) == 2
    assert any(f"embeddings/{path.name}: checksum: " in line for line in lines)
    assert "\x1b" not in done.stdout
    assert "NOT PROVEN: 2 findings" in done.stdout
    findings = json.loads((tmp_path / "verdict.json").read_text())["findings"]
    assert {finding["rule"] for finding in findings} == {"checksum", "id-repeated"}
    assert all(finding["means"] == RULES[finding["rule"]] for finding in findings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not an output: it has no run.json"),
        (["nowhere", "--recompute", "3"], "--recompute and --weights need --input"),
        (["nowhere", "--input", "x", "--recompute", "-1"], "must be `all` or a whole number of at least 0, got '-1'"),
        (["nowhere", "--threads", "0"], "must be a whole number of at least 1, got '0'"),
        (["nowhere", "--threads", "x"], "argument --threads: must be a whole number of at least 1, got 'x'"),
        ([""], "argument OUTPUT: must not be empty, got ''"),
        (["nowhere", "--json", "no/such/x.json"], "--json must be in a folder that is there, got 'no/such/x.json'"),
        ([], "the following arguments are required: OUTPUT"),
    ],
)
def test_the_command_refuses_wrong_usage_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command_says_why_no_tar_was_compared(
    good: Path, own_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in own_shards.iterdir():
        os.utime(path, (1, 1))
    assert main([str(good)]) == 0
    assert "tars        not compared: no --input\n" in capsys.readouterr().out
    assert main([str(good), "--input", str(own_shards), "--recompute", "0"]) == 1
    said = capsys.readouterr().out
    assert "tars        0 compared: no stored shard is in the input, unchanged and readable\n" in said


def test_the_command_says_to_delete_files_that_are_there_and_shows_no_name_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "esc\x1b[31m"):
        write_tar(tmp_path / "in" / f"{name}.tar", shard_members(0))
    embed(tmp_path / "in", tmp_path / "out")
    (alone,) = (tmp_path / "out" / "embeddings").glob("plain.*-00001.parquet")
    alone.unlink()
    (cut_off,) = (tmp_path / "out" / "embeddings").glob("esc*-00000.parquet")
    cut_off.write_bytes(b"")
    assert main([str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    advice = re.findall(r"^MEND  delete (.+)$", said, re.MULTILINE)
    assert advice == [str(cut_off).replace("\x1b", "\\x1b"), f"{tmp_path}/out/errors/{alone.name}"]


@pytest.mark.parametrize("mistake", [["--input"], [], ["--threads"]])
def test_the_command_shows_no_secret_of_what_it_refuses(
    mistake: list[str], good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code([str(good), *mistake, "https://127.0.0.1:9/b/a.tar?X-Amz-Signature=hunter2"]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("verify.py: ")
    assert "hunter2" not in said.out + said.err


def exit_code(arguments: list[str]) -> object:
    try:
        return main(arguments)
    except SystemExit as stop:
        return stop.code


def test_help_tells_every_rule(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["--help"]) == 0
    # Wrapped to the terminal's width.
    text = " ".join(capsys.readouterr().out.split())
    for rule, meaning in RULES.items():
        assert rule in text
        assert meaning in text
