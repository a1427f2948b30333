"""Passes: what is done, done again, counted and told. The stages run in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core.errors import InputError, OutputError
from shard_embedder.pipeline.output.names import UNCOUNTED_FILE
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.planning.plan import check_names, make_plan
from shard_embedder.pipeline.run.executor import PassError
from shard_embedder.pipeline.run.passes import Watcher, run
from shard_embedder.pipeline.run.report import Estimate, estimate, mark_uncounted
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.keys import Naming
from tests.conftest import encode, photo, sample_members, write_shards, write_tar
from tests.outputs import IN_PROCESS, UNHEARD, job_for, rows, stored


def embed(input: Path | str, output: Path | str, **settings: Any) -> dict[str, Any]:
    """One run, with its report."""
    job = job_for(input, output, **settings)
    return run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)


def test_a_run_ends_where_what_it_stores_does_not_stay(tmp_path: Path) -> None:
    """Receipts alone are no progress: what the store does not show would be embedded for ever."""
    job = job_for(write_shards(tmp_path / "in", num_shards=1, samples_each=2), tmp_path / "out", max_passes=2)
    passes: list[int] = []

    def lose(tally: Tally) -> None:
        for path in (tmp_path / "out" / "embeddings").glob("*.parquet"):
            path.unlink()

    watcher = Watcher(lambda job, resources: None, lambda number, *_: passes.append(number), lose)
    report = run(job, make_plan(job.shards, job.config.output), watcher, IN_PROCESS)
    assert not report["balanced"]
    assert passes == [1, 2]


class FailingPasses:
    """An executor whose passes fail before they store anything."""

    prepare = staticmethod(IN_PROCESS.prepare)

    def receipts(self, *_: object) -> Iterator[Any]:
        raise PassError("no worker has a decoder")


def test_a_pass_is_told_the_problems_of_the_one_before_and_no_older_ones(tmp_path: Path) -> None:
    job = job_for(write_shards(tmp_path / "in", num_shards=1, samples_each=2), tmp_path / "out", max_passes=3)
    told: list[list[str]] = []
    watcher = replace(UNHEARD, on_pass=lambda number, pending, problems: told.append(problems))
    report = run(job, make_plan(job.shards, job.config.output), watcher, FailingPasses())
    assert told == [[], ["pass 1: no worker has a decoder"], ["pass 2: no worker has a decoder"]]
    assert report["problems"] == [f"pass {number}: no worker has a decoder" for number in (1, 2, 3)]


def test_a_second_run_reads_no_finished_shard_and_changes_nothing(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in")
    embed(shards, tmp_path / "out")
    before = stored(tmp_path / "out" / "embeddings")
    write_shards(tmp_path / "new", num_shards=4)
    (tmp_path / "new" / "photos-00003.tar").rename(shards / "photos-00003.tar")
    report = embed(shards, tmp_path / "out")
    assert (report["shards"]["done_before"], report["shards"]["done_now"]) == (3, 1)
    assert report["samples"] == 7
    after = stored(tmp_path / "out" / "embeddings")
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1


def test_a_changed_shard_is_embedded_anew_and_its_old_parts_go(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=9)
    embed(shards, tmp_path / "out", part_rows=4)
    write_tar(shards / "photos-00001.tar", sample_members("fresh", 99))
    report = embed(shards, tmp_path / "out", part_rows=4)
    assert report["shards"]["changed"] == 1
    assert report["balanced"]
    assert [row["image_id"] for row in rows(tmp_path / "out") if row["shard"] == "photos-00001"] == ["fresh"]
    assert len([row for row in rows(tmp_path / "out") if row["shard"] == "photos-00000"]) == 9


def test_what_a_late_writer_left_of_an_older_version_goes_even_when_nothing_is_pending(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1)
    embed(shards, tmp_path / "out")
    (name, data), *_ = stored(tmp_path / "out" / "embeddings").items()
    old = name.replace(name.split(".")[1][:12], "0" * 12)
    (tmp_path / "out" / "embeddings" / old).write_bytes(data)
    embed(shards, tmp_path / "out")
    assert list(stored(tmp_path / "out" / "embeddings")) == [name]


def test_three_weeks_each_do_what_is_needed_and_say_so(tmp_path: Path) -> None:
    shards, out = tmp_path / "in", tmp_path / "out"
    every = write_shards(tmp_path / "all", num_shards=8, samples_each=4)

    def arrive(*numbers: int) -> None:
        for number in numbers:
            name = f"photos-{number:05d}.tar"
            shards.mkdir(exist_ok=True)
            (every / name).rename(shards / name)

    def week(**settings: Any) -> dict[str, int]:
        found: dict[str, int] = embed(shards, out, price_per_hour=2.0, **settings)["shards"]
        return found

    def expected(num_bytes: int) -> Estimate | None:
        return estimate(str(out), [Pending("photos-00007", str(every / "photos-00007.tar"), num_bytes, "")], Naming())

    # Before the first run the front of a shard tells how many there are, and nothing how fast they go.
    assert expected(100 * (every / "photos-00007.tar").stat().st_size) == (pytest.approx(400, rel=0.2), None)
    assert estimate(str(out), [Pending("gone", str(every / "gone.tar"), 9, "")], Naming()) is None
    arrive(0, 1, 2, 3)
    first = week()
    assert (first["found"], first["done_now"], first["done_before"], first["changed"]) == (4, 4, 0, 0)
    report = json.loads((out / "report.json").read_text())
    hours = report["num_devices"] * report["wall_s"] / 3600
    assert report["price"] == pytest.approx(2.0 * hours, rel=1e-2)
    assert report["price_per_million_images"] is None, "it did not work for a minute"
    read, wall_s = report["read_bytes"], report["wall_s"]
    same, twice, none = map(expected, (read, 2 * read, 0))
    assert (same.num_samples, same.seconds) == (16, pytest.approx(wall_s))
    assert twice.num_samples == 32
    # Starting up takes as long as before, whatever there is to do.
    assert none.seconds > report["first_part_s"] / 2
    assert wall_s < twice.seconds == pytest.approx(2 * wall_s - none.seconds)

    # The second week one shard changes, two are new, and the run dies after its first part.
    write_tar(shards / "photos-00001.tar", [m for i in range(5) for m in sample_members(f"new-{i}", 50 + i)])
    arrive(4, 5)
    job = job_for(shards, out)
    plan = make_plan(job.shards, job.config.output)
    assert (plan.num_done, len(plan.changed), len(plan.pending)) == (3, 1, 3)

    def die(tally: Tally) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, plan, Watcher(lambda *_: None, lambda *_: None, die), IN_PROCESS)
    again = week()
    assert again["done_before"] + again["done_now"] == again["found"] == 6
    assert again["missing"] == 0
    assert len(rows(out)) == 4 * 5 + 5

    # The third week one shard is gone and one is new; what is stored of the old one stays.
    (shards / "photos-00000.tar").unlink()
    arrive(6)
    third = week()
    assert (third["found"], third["done_before"], third["done_now"], third["changed"]) == (6, 5, 1, 0)
    assert third["stored_but_not_in_input"] == 1
    assert len(rows(out)) == 4 * 6 + 5
    kept = (out / "report.json").read_bytes()
    assert week()["done_now"] == 0
    # A week without work keeps the report of the last that had some, by which the next is estimated.
    assert (out / "report.json").read_bytes() == kept
    assert expected(1000) is not None
    # But not one that says that something is missing.
    (out / "report.json").write_text(json.dumps({**json.loads(kept), "balanced": False}))
    week()
    assert json.loads((out / "report.json").read_text())["balanced"]


def test_parts_lost_from_the_output_are_made_again_bit_for_bit(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=9)
    embed(shards, tmp_path / "out", part_rows=4)
    whole = stored(tmp_path / "out" / "embeddings")
    for name in [next(iter(whole)), list(whole)[-1]]:
        (tmp_path / "out" / "embeddings" / name).unlink()
    embed(shards, tmp_path / "out", part_rows=4)
    assert stored(tmp_path / "out" / "embeddings") == whole


def test_an_output_that_lost_its_run_file_is_known_by_its_parts(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2)
    embed(shards, tmp_path / "out")
    run_file = tmp_path / "out" / "run.json"
    made = json.loads(run_file.read_text())["settings"]
    run_file.unlink()
    with pytest.raises(OutputError, match="weights_sha256: output"):
        job_for(shards, tmp_path / "out", weights="random:4")
    report = embed(shards, tmp_path / "out")
    assert report["shards"]["done_before"] == 2
    assert json.loads(run_file.read_text())["settings"] == made
    run_file.unlink()
    for path in (tmp_path / "out" / "embeddings").iterdir():
        path.write_bytes(b"cut")
    with pytest.raises(OutputError, match=r"has parts and no run\.json, and they do not tell what made them"):
        job_for(shards, tmp_path / "out")


def test_bad_samples_cost_one_row_each_and_their_neighbours_nothing(tmp_path: Path) -> None:
    good = write_tar(tmp_path / "a" / "s.tar", [m for i in range(4) for m in sample_members(f"k{i}", i)])
    members = [m for i in range(4) for m in sample_members(f"k{i}", i)]
    members[3] = ("k1.jpg", b"no image at all")
    members += [("lonely.txt", b"text"), ("short.jpg", encode(photo(9))[:200])]
    write_tar(tmp_path / "b" / "s.tar", members)
    embed(good, tmp_path / "out-good")
    report = embed(tmp_path / "b" / "s.tar", tmp_path / "out")
    assert report["balanced"]
    assert (report["samples"], report["embedded"], report["errors"]) == (6, 3, 3)
    errors = {
        row["image_id"]: (row["stage"], row["reason"].partition(":")[0]) for row in rows(tmp_path / "out", "errors")
    }
    assert errors["lonely"] == ("read", "no image")
    assert errors["k1"][0] == errors["short"][0] == "decode"
    expected = {row["image_id"]: row["embedding"] for row in rows(tmp_path / "out-good")}
    for row in rows(tmp_path / "out"):
        assert row["embedding"] == expected[row["image_id"]]


def test_a_cut_shard_keeps_its_samples_and_is_called_broken(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=6)
    whole = (shards / "photos-00001.tar").read_bytes()
    (shards / "photos-00001.tar").write_bytes(whole[: len(whole) // 2])
    report = embed(shards, tmp_path / "out")
    assert report["balanced"]
    assert report["shards"]["broken"] == 1
    assert report["problems"] == []
    assert rows(tmp_path / "out", "errors")[0]["image_id"] is None
    kept = [row["image_id"] for row in rows(tmp_path / "out") if row["shard"] == "photos-00001"]
    assert kept == [f"001-{i:04d}" for i in range(len(kept))]
    assert len(kept) >= 2
    (shards / "photos-00001.tar").write_bytes(whole)
    report = embed(shards, tmp_path / "out")
    assert report["shards"]["broken"] == 0
    assert len(rows(tmp_path / "out")) == 12
    assert not rows(tmp_path / "out", "errors")


def test_what_was_read_of_a_broken_shard_stays_when_it_can_no_longer_be_read(tmp_path: Path) -> None:
    shard = write_shards(tmp_path / "in", num_shards=1, samples_each=6) / "photos-00000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    embed(tmp_path / "in", tmp_path / "out")
    before = rows(tmp_path / "out")
    assert len(before) >= 2
    job = job_for(tmp_path / "in", tmp_path / "out")
    times = shard.stat()

    def spoil(*_: object) -> None:
        # Another content of the same size and time, which is the same version.
        shard.write_bytes(b"?" * times.st_size)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))

    report = run(
        job, make_plan(job.shards, job.config.output), Watcher(lambda *_: None, spoil, lambda tally: None), IN_PROCESS
    )
    assert (report["balanced"], report["shards"]["broken"]) == (True, 1)
    assert rows(tmp_path / "out") == before


def test_a_shard_that_vanishes_during_a_run_is_told(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=2)
    job = job_for(shards, tmp_path / "out")

    def remove(*_: object) -> None:
        (shards / "photos-00001.tar").unlink(missing_ok=True)

    report = run(
        job,
        make_plan(job.shards, job.config.output),
        Watcher(lambda *_: None, remove, lambda tally: None),
        IN_PROCESS,
    )
    assert (report["balanced"], report["samples"], report["shards"]["vanished"]) == (True, 2, 1)
    assert "1 shard went from the input before the end of the run: photos-00001" in report["problems"]
    assert report["exit_code"] == 3


def test_what_does_not_balance_is_counted_again_by_the_next_run_though_it_has_nothing_to_do(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=4)
    assert embed(shards, tmp_path / "out", part_rows=2)["balanced"]
    good = next((tmp_path / "out" / "embeddings").glob("photos-00000.*-00000.parquet"))
    content = good.read_bytes()
    good.write_bytes(content[:-20])
    next((tmp_path / "out" / "embeddings").glob("photos-00000.*-last.parquet")).unlink()
    for _ in range(2):
        report = embed(shards, tmp_path / "out", part_rows=2)
        assert not report["balanced"]
        assert json.loads((tmp_path / "out" / "report.json").read_text())["imbalances"] == report["imbalances"]
    # Nor is it forgotten where another run has work of its own.
    write_tar(shards / "photos-00002.tar", sample_members("new", 9))
    assert not embed(shards, tmp_path / "out", part_rows=2)["balanced"]
    good.write_bytes(content)
    assert embed(shards, tmp_path / "out", part_rows=2)["balanced"]


def test_what_a_run_stored_that_died_before_it_counted_is_counted_by_the_next(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=4)
    embed(shards, tmp_path / "out", part_rows=2)
    assert not (tmp_path / "out" / UNCOUNTED_FILE).exists()
    mark_uncounted(str(tmp_path / "out"))
    part = next((tmp_path / "out" / "embeddings").glob("photos-00000.*-00000.parquet"))
    part.write_bytes(part.read_bytes()[:-20])
    report = embed(shards, tmp_path / "out", part_rows=2)
    assert not report["balanced"]
    assert not (tmp_path / "out" / UNCOUNTED_FILE).exists()


def test_a_run_without_work_is_judged_by_the_errors_of_the_last_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", b"no image"), *sample_members("b", 1)])
    for _ in range(2):
        report = embed(tmp_path / "in", tmp_path / "out", max_error_fraction=0.1)
        assert (report["errors"], report["samples"]) == (1, 2)
        assert report["exit_code"] == 5


def test_one_bad_shard_among_good_ones_is_too_much_for_a_limit_of_its_own(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2, samples_each=6)
    write_tar(tmp_path / "in" / "bad.tar", [("a.jpg", b"no image"), *sample_members("b", 1)])
    report = embed(tmp_path / "in", tmp_path / "out", max_error_fraction=0.1, max_shard_error_fraction=0.4)
    assert report["exit_code"] == 5
    assert report["verdict"]["happened"] == (
        "1 of 2 samples of bad.tar are errors, a fraction of 0.5, which is more than --max-shard-error-fraction 0.4"
    )
    assert embed(tmp_path / "in", tmp_path / "out", max_shard_error_fraction=0.5)["exit_code"] == 0


def test_an_empty_shard_is_done_and_gives_no_row(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    write_tar(tmp_path / "in" / "empty.tar", [])
    report = embed(tmp_path / "in", tmp_path / "out")
    assert (report["balanced"], report["samples"], report["shards"]["done_now"]) == (True, 2, 2)
    assert make_plan(job_for(tmp_path / "in", tmp_path / "out").shards, str(tmp_path / "out")).pending == []


def test_shards_of_no_bytes_are_broken_and_cost_the_others_nothing(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    for name in ("a", "b", "z"):
        (tmp_path / "in" / f"{name}.tar").write_bytes(b"")
    first = embed(tmp_path / "in", tmp_path / "out")
    assert (first["balanced"], first["embedded"]) == (True, 2)
    # Only they are pending now.
    again = embed(tmp_path / "in", tmp_path / "out")
    for report in (first, again):
        assert report["broken_shards"] == dict.fromkeys("abz", "empty file: 0 bytes")
        assert report["exit_code"] == 3


def test_a_limited_run_takes_on_whole_shards_and_the_next_goes_on(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=3)
    first, rest = (embed(shards, tmp_path / "out", limit=2) for _ in range(2))
    assert (first["shards"]["done_now"], rest["shards"]["done_now"]) == (2, 1)
    assert first["verdict"]["next"] == "--limit left 1 shard: run the same command again to go on."
    assert rest["verdict"]["next"] == ""


def test_feature_maps_are_stored_as_tensors(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1, samples_each=3)
    embed(shards, tmp_path / "out", features="map")
    (path,) = (tmp_path / "out" / "embeddings").glob("*.parquet")
    table = pq.read_table(path)
    assert isinstance(table.schema.field("embedding").type, pa.FixedShapeTensorType)
    assert vectors(table).shape == (3, 512, 3, 3)
    embed(shards, tmp_path / "pooled")
    (path,) = (tmp_path / "pooled" / "embeddings").glob("*.parquet")
    np.testing.assert_allclose(vectors(table).mean((2, 3)), vectors(pq.read_table(path)), rtol=1e-4, atol=1e-5)


def test_an_output_and_its_input_may_be_moved_together(tmp_path: Path) -> None:
    write_shards(tmp_path / "tour" / "in", num_shards=2)
    embed(tmp_path / "tour" / "in", tmp_path / "tour" / "out")
    before = stored(tmp_path / "tour" / "out" / "embeddings")
    (tmp_path / "tour").rename(tmp_path / "holiday")
    write_tar(tmp_path / "holiday" / "in" / "new.tar", sample_members("new", 9))
    report = embed(tmp_path / "holiday" / "in", tmp_path / "holiday" / "out")
    assert (report["shards"]["done_before"], report["shards"]["done_now"]) == (2, 1)
    after = stored(tmp_path / "holiday" / "out" / "embeddings")
    assert {name: after[name] for name in before} == before


def test_shards_that_another_folder_would_name_otherwise_are_not_embedded_twice(tmp_path: Path) -> None:
    write_shards(tmp_path / "in" / "2026", num_shards=1)
    embed(tmp_path / "in", tmp_path / "out")
    job = job_for(tmp_path / "in" / "2026", tmp_path / "out")
    with pytest.raises(InputError, match=r"'photos-00000' is stored as '2026/photos-00000'"):
        check_names(job, make_plan(job.shards, job.config.output))
    # Other shards of another folder may join.
    write_tar(tmp_path / "more" / "photos-00000.tar", sample_members("other", 8))
    job = job_for(tmp_path / "more", tmp_path / "out")
    check_names(job, make_plan(job.shards, job.config.output))


def test_a_shard_that_cannot_be_stored_or_named_costs_only_itself(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=3, samples_each=2)
    # A name of more bytes than a file system takes with what is added to it.
    write_tar(shards / f"{'n' * 240}.tar", sample_members("long", 7))
    first = embed(shards, tmp_path / "out")
    assert (first["balanced"], first["embedded"]) == (True, 6)
    assert (first["shards"]["refused"], list(first["refused_shards"])) == (1, ["n" * 240])
    assert first["exit_code"] == 3
    # A folder in the place of a part.
    (part,) = (tmp_path / "out" / "embeddings").glob("photos-00001.*")
    part.unlink()
    part.mkdir()
    write_tar(shards / "photos-00003.tar", sample_members("new", 8))
    again = embed(shards, tmp_path / "out")
    assert (again["balanced"], again["shards"]["done_now"], again["shards"]["refused"]) == (True, 1, 2)
    assert "part 0 cannot be stored" in again["refused_shards"]["photos-00001"]
    assert again["exit_code"] == 3
    part.rmdir()
    assert embed(shards, tmp_path / "out")["shards"]["done_now"] == 1
