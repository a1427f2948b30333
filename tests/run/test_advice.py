"""What a run warns of: in its report, on its page and on the console."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shard_embedder.jobs.support.console import Console
from shard_embedder.jobs.support.console_json import JsonConsole
from shard_embedder.pipeline.output.ledger import Counts
from shard_embedder.pipeline.pages.run_page import draw_page
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.advice import make_warnings
from shard_embedder.pipeline.run.passes import run
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.keys import Naming
from tests.conftest import encode, photo, sample_members, write_tar
from tests.outputs import IN_PROCESS, UNHEARD, embed, job_for, rows


def report_of(folder: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """The report of a run after one that stored all: it takes no Ray."""
    config = embed(folder, output, **settings)
    job = prepare_job(config)
    return run(job, make_plan(job.shards, config.output), UNHEARD, IN_PROCESS)


def said(report: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[str, list[dict[str, Any]], str]:
    """What the console says, the lines of the one for machines, and the page."""
    Console().summary(report)
    text = capsys.readouterr().out
    JsonConsole().summary(report)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return text, lines, draw_page(report, {}, set(), Naming())


def write_images(path: Path, *names: str) -> None:
    write_tar(path, [(name, encode(photo(seed))) for seed, name in enumerate(names)])


def test_image_members_without_a_row_are_reported_and_warned_of_with_the_rule_that_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "in" / "a.tar", *(f"1.2.840.{i}.jpg" for i in range(5)))
    write_images(tmp_path / "in" / "b.tar", "x.jpg", "y.jpg", "y.png")
    report = report_of(tmp_path / "in", tmp_path / "out")
    assert (report["samples"], report["embedded"], report["unused_images"]) == (3, 3, 5)
    (warning,) = report["warnings"]
    assert warning.startswith(
        "5 image members got no row, since a sample gives one embedding; for example a: 1.2.840.4.jpg, beside"
    )
    assert "--key last-dot, with a new --output, " in warning
    text, lines, page = said(report, capsys)
    assert "\nimages without a row" in text
    assert f"WARNING   {warning}" in text
    assert {"level": "warning", "event": "problem", "message": warning}.items() <= lines[-2].items()
    assert lines[-1]["unused_images"] == 5
    assert "image members without a row</dt><dd>5</dd>" in page
    assert "5 image members got no row" in page
    kept = report_of(tmp_path / "in", tmp_path / "kept", key="last-dot")
    assert (kept["embedded"], kept["unused_images"]) == (7, 1)
    (warning,) = kept["warnings"]
    assert "b: y.png, beside y.jpg" in warning
    assert "--key" not in warning


def test_a_run_without_anything_to_warn_of_warns_of_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "in" / "a.tar", "x.jpg", "y.jpg", "y.mask.png")
    report = report_of(tmp_path / "in", tmp_path / "out", image_member="jpg")
    assert (report["unused_images"], report["warnings"]) == (0, [])
    text, lines, page = said(report, capsys)
    assert "WARNING" not in text
    assert "without a row" not in text
    assert [line["level"] for line in lines] == ["info"]
    assert "Warnings" not in page


def test_the_report_of_a_run_that_found_all_done_tells_what_the_last_one_counted(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a.tar", "x.jpg", "x.png")
    first = report_of(tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["unused_images"] == 1
    again = report_of(tmp_path / "in", tmp_path / "out")
    assert (again["unused_images"], again["unused_example"]) == (1, first["unused_example"])


def test_files_that_may_be_shards_and_are_not_read_are_told_in_the_plan_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path / "in" / "a.tar", "x.jpg")
    write_images(tmp_path / "in" / "b.TAR", "y.jpg")
    for name in ("c.tar.gz", "d.tar.gz", "e.tgz", "a.json"):
        (tmp_path / "in" / name).write_bytes(b"x")
    report = report_of(tmp_path / "in", tmp_path / "out")
    assert report["samples"] == 2
    assert report["left_out_files"] == {".tar.gz": 2, ".tgz": 1, ".json": 1}
    (warning,) = report["warnings"]
    assert warning == (
        "3 files of the input may be shards and were not read: 2 .tar.gz, 1 .tgz. Only plain .tar is read: "
        "decompress them with `gunzip`; then run the same command again."
    )
    job = prepare_job(embed(tmp_path / "in", tmp_path / "out"))
    plan = make_plan(job.shards, job.config.output)
    Console().plan(job, plan, None)
    assert "\nleft out  4 files of the input, as no .tar: 2 .tar.gz, 1 .tgz, 1 .json\n" in capsys.readouterr().out
    JsonConsole().plan(job, plan, None)
    assert json.loads(capsys.readouterr().out)["left_out_files"] == report["left_out_files"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "in" / "a.tar").rename(tmp_path / "plain" / "a.tar")
    (tmp_path / "in" / "a.json").rename(tmp_path / "plain" / "a.json")
    # What is no archive is told, and not warned of.
    report = report_of(tmp_path / "plain", tmp_path / "other")
    assert (report["left_out_files"], report["warnings"]) == ({".json": 1}, [])


def parts_run(folder: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """The report of a run that stores its parts itself."""
    job = job_for(folder, output, **settings)
    return run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)


def test_images_that_the_device_refused_are_warned_of_with_what_it_said(tmp_path: Path) -> None:
    write_images(tmp_path / "in" / "a.tar", "x.jpg")
    job = job_for(tmp_path / "in", tmp_path / "out")
    assert make_warnings(job, Counts(), Tally()) == []
    tally = Tally(device_refused=1200, device_refusal="a: RuntimeError: nvjpegDecode failed: 6")
    assert make_warnings(job, Counts(), tally) == [
        "1,200 images of this run were decoded on the CPU, because the device's decoder refused them; "
        "for example a: RuntimeError: nvjpegDecode failed: 6."
    ]


def write_apart(path: Path, num_apart: int, num_beside: int) -> None:
    """Photos whose JSON stands after all of them, then photos with it beside them."""
    photo_and_text = [sample_members(f"{i:03d}", i)[::2] for i in range(num_apart + num_beside)]
    apart, beside = photo_and_text[:num_apart], photo_and_text[num_apart:]
    write_tar(path, [*(one[0] for one in apart), *(one[1] for one in apart), *(m for one in beside for m in one)])


@pytest.mark.parametrize(("num_apart", "num_beside", "is_told"), [(4, 0, True), (2, 2, True), (2, 3, False)])
def test_a_shard_whose_members_mostly_stand_apart_is_embedded_and_told_how_to_be_made(
    num_apart: int, num_beside: int, is_told: bool, tmp_path: Path
) -> None:
    write_apart(tmp_path / "in" / "s.tar", num_apart, num_beside)
    report = parts_run(tmp_path / "in", tmp_path / "out")
    assert (report["embedded"], report["errors_by_reason"]) == (num_apart + num_beside, {"members apart": num_apart})
    assert report["apart_samples"] == num_apart
    told = (
        f"{num_apart} of {num_apart + num_beside} images stand apart from the other members of their key, "
        "whose fields are lost. Make the shards with `tar --sort=name`, which puts them side by side."
    )
    assert report["warnings"] == [told] * is_told


def test_fields_that_keep_nothing_or_lose_values_are_told_with_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = b'{"caption": "c", "width": 256, "original_width": 512.0, "nothing": null, "similarity": NaN}'
    members = [
        (f"{i}.{extension}", data)
        for i in range(4)
        for extension, data in (
            ("jpg", encode(photo(i))),
            ("json", document if i else b'{"caption": "c", "width": 1, "original_width": 2, "similarity": 1}'),
            ("txt", b"\xef\xbb\xbfcap"),
        )
    ]
    write_tar(tmp_path / "in" / "s.tar", members)
    keep = [
        "json:caption",
        "txt",
        "json:captoin",
        "json:nothing",
        "json:width",
        "json:original_width=int64",
        "json",
        "cls",
    ]
    report = parts_run(tmp_path / "in", tmp_path / "out", keep=keep, part_rows=3)
    assert [(row["caption"], row["txt"]) for row in rows(tmp_path / "out")] == [("c", "cap")] * 4
    assert {name: (kept["values"], kept["lost"]) for name, kept in report["kept_fields"].items()} == {
        "caption": (4, 0), "txt": (4, 0), "captoin": (0, 0), "nothing": (0, 0), "width": (0, 4),
        "original_width": (1, 3), "json": (1, 3), "cls": (0, 0),
    }  # fmt: skip
    assert report["kept_nulls"] == 10
    nothing = "kept nothing: it is missing or null in all samples that this run stored."
    assert report["warnings"] == [
        f"--keep json:captoin=string {nothing}",
        f"--keep json:nothing=string {nothing}",
        "--keep json:width=string lost 4 of 4 values, which are null; for example s, 0: int 1 is no string.",
        "--keep json:original_width=int64 lost 3 of 4 values, which are null; for example s, 1: float 512.0 is no "
        "int64.",
        "--keep json=json lost 3 of 4 values, which are null; for example s, 1: it holds what JSON text cannot: NaN, "
        "infinity, or invalid Unicode.",
        f"--keep cls=int64 {nothing}",
    ]
    text, lines, page = said(report, capsys)
    assert text.count("WARNING   --keep ") == 6
    assert sum(line["event"] == "problem" for line in lines) == 6
    assert "Warnings (6)" in page


def test_what_a_field_lost_is_short_and_printable_whatever_it_holds(tmp_path: Path) -> None:
    values = ['"\\ud800"', '"' + "x" * 10_000 + '"', "[" * 500 + "]" * 500, "9" * 4000, '"\\u001b[31m"']
    members = [
        member
        for i, value in enumerate(values)
        for member in ((f"\x1b{i}.jpg", encode(photo(i))), (f"\x1b{i}.json", f'{{"x": {value}}}'.encode()))
    ]
    write_tar(tmp_path / "in" / "s.tar", [*members, ("z.jpg", encode(photo(9))), ("z.json", b"broken")])
    for kind in ("int64", "string", "bool"):
        report = parts_run(tmp_path / "in", tmp_path / kind, keep=[f"json:x={kind}"], part_rows=1)
        assert report["kept_fields"]["x"]["lost"] >= 4 - (kind == "string")
        (warning,) = report["warnings"]
        assert warning.isprintable()
        assert len(warning) < 400
