"""What is done, pending, changed or broken, and whether the counts balance: from listings alone."""

from __future__ import annotations

import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_embedder.pipeline.core.errors import StoreError
from shard_embedder.pipeline.core.schema import UNKNOWN_INDEX
from shard_embedder.pipeline.core.storage import FileInfo
from shard_embedder.pipeline.core.writing import delete, write_bytes
from shard_embedder.pipeline.output import ledger
from shard_embedder.pipeline.output.ledger import count, list_parts
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, PartName, version_tag
from shard_embedder.pipeline.planning import plan as plan_module
from shard_embedder.pipeline.planning.plan import Plan, make_plan
from shard_embedder.pipeline.shards.find import Shard
from tests.output.test_parts import FINGERPRINT, embedded, writer

SHARDS = [Shard(name, f"s3://bkt/{name}.tar", 1000, "etag") for name in ("a", "b/c", "d.e")]
TAG = version_tag(1000, "etag")
OLD = version_tag(999, "old")


def store(output: str, *parts: str, folder: str = EMBEDDINGS, shard: str = "a", tag: str = TAG) -> None:
    """Files with the names of parts: `0`, `1-last`, `2-broken`."""
    for part in parts:
        number, _, end = part.partition("-")
        write_bytes(output, f"{folder}/{PartName(shard, tag, int(number), end)}", b"")


def planned(output: str) -> Plan:
    return make_plan(SHARDS, output)


def test_with_nothing_stored_all_is_pending(place: str) -> None:
    plan = planned(place)
    assert [shard[:4] for shard in plan.pending] == SHARDS
    assert [shard.stored_parts for shard in plan.pending] == [(), (), ()]
    assert (plan.num_done, plan.changed, plan.retried, plan.stale, plan.elsewhere) == (0, [], [], {}, 0)
    assert plan.pending_bytes == 3000


def test_a_shard_whose_parts_are_all_there_is_done(place: str) -> None:
    store(place, "0-last")
    store(place, "0", "1", "2-last", shard="b/c")
    store(place, "0", "1", shard="d.e")
    plan = planned(place)
    assert [(shard.name, shard.stored_parts) for shard in plan.pending] == [("d.e", (0, 1))]
    assert plan.num_done == 2
    assert plan.stale == {}


def test_more_than_ten_thousand_parts_are_counted_by_number_and_not_by_letter(tmp_path: Path) -> None:
    names = [PartName("a", TAG, number, "last" if number == 100_001 else "") for number in range(100_002)]
    assert plan_module._is_whole(sorted(name.part * 3 + (name.end == "last") for name in names))
    store(str(tmp_path), "99999", "100000-last")
    assert planned(str(tmp_path)).pending[0].stored_parts == (99999,)


@pytest.mark.parametrize(
    ("stored", "kept", "stale"),
    [
        (["0", "2-last"], (0,), ["2-last"]),
        (["1-last"], (), ["1-last"]),
        (["1", "2"], (1, 2), []),
        (["0", "1-last", "2-last"], (0,), ["1-last", "2-last"]),
        (["0", "1-last", "2"], (0,), ["1-last", "2"]),
        (["0", "1", "1-last"], (0,), ["1-last", "1"]),
        (["0", "1-broken"], (0,), []),
        (["0-broken"], (), []),
        (["0", "1", "1-broken"], (0, 1), ["1-broken"]),
        (["0", "1", "2-broken", "3-broken"], (0, 1), ["2-broken", "3-broken"]),
        (["0", "1", "2", "2-broken", "3-broken"], (0, 1, 2), ["2-broken"]),
        (["0", "1-broken", "1-last"], None, ["1-broken"]),
        (["0", "1", "3-broken"], (0, 1), ["3-broken"]),
    ],
)
def test_what_is_kept_and_what_must_go(
    tmp_path: Path, stored: list[str], kept: tuple[int, ...], stale: list[str]
) -> None:
    output = str(tmp_path)
    store(output, *stored)
    plan = planned(output)
    pending = {shard.name: shard.stored_parts for shard in plan.pending}
    assert pending.get("a") == kept
    old = [f"{EMBEDDINGS}/{PartName('a', TAG, int(p), e)}" for p, _, e in (part.partition("-") for part in stale)]
    assert plan.stale.get("a", []) == old


def test_a_broken_shard_is_tried_again_and_counts_as_retried(tmp_path: Path) -> None:
    store(str(tmp_path), "0", "1-broken")
    store(str(tmp_path), "1-broken", folder=ERRORS)
    plan = planned(str(tmp_path))
    assert (plan.retried, plan.changed) == (["a"], [])
    assert plan.stale == {}, "it may never again be read as far"
    store(str(tmp_path), "1-last")
    ended = planned(str(tmp_path))
    assert "a" not in [shard.name for shard in ended.pending]
    assert ended.stale["a"] == [f"{folder}/a.{TAG}-00001-broken.parquet" for folder in (EMBEDDINGS, ERRORS)]


def test_a_changed_shard_is_pending_and_its_old_parts_and_errors_must_go(tmp_path: Path) -> None:
    output = str(tmp_path)
    store(output, "0", "1-last", tag=OLD)
    store(output, "1-last", tag=OLD, folder=ERRORS)
    store(output, "0")
    plan = planned(output)
    assert (plan.changed, plan.retried) == (["a"], [])
    assert plan.pending[0].stored_parts == (0,)
    assert len(plan.stale["a"]) == 3
    delete(output, plan.stale["a"])
    assert planned(output).changed == []
    assert planned(output).stale == {}


def test_old_parts_beside_a_done_shard_are_told_as_stale(tmp_path: Path) -> None:
    store(str(tmp_path), "0-last", tag=OLD)
    store(str(tmp_path), "0-last")
    plan = planned(str(tmp_path))
    assert plan.num_done == 1
    assert plan.stale == {"a": [f"{EMBEDDINGS}/a.{OLD}-00000-last.parquet"]}


def test_errors_without_their_part_must_go_and_those_with_it_stay(tmp_path: Path) -> None:
    store(str(tmp_path), "0", "1-last")
    store(str(tmp_path), "0", "1-last", "2", folder=ERRORS)
    assert planned(str(tmp_path)).stale == {"a": [f"{ERRORS}/a.{TAG}-00002.parquet"]}


def test_shards_that_the_input_does_not_name_are_counted_and_left_alone(place: str) -> None:
    store(place, "0", "1-last", shard="other/x")
    store(place, "0-last", shard="a.b")
    store(place, "0", folder=ERRORS, shard="other/x")
    plan = planned(place)
    assert (plan.elsewhere, plan.num_done, plan.stale) == (2, 0, {})


def test_files_that_are_no_parts_are_passed_over(place: str) -> None:
    for name in ("_SUCCESS", "a.parquet", f"a.{TAG}-00000.parquet.tmp"):
        write_bytes(place, f"{EMBEDDINGS}/{name}", b"")
    assert list(list_parts(place, EMBEDDINGS)) == []
    assert planned(place).elsewhere == 0


def test_a_plan_does_not_depend_on_the_order_of_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = str(tmp_path)
    store(output, "0", "1", "2-last")
    store(output, "0", "1-broken", "3", shard="b/c")
    store(output, "0-last", tag=OLD, shard="d.e")
    store(output, "0", "1", shard="d.e")
    before = planned(output)
    listing = ledger.list_files
    for seed in range(5):

        def shuffled(*args: object, seed: int = seed, **options: object) -> list[FileInfo]:
            infos = list(listing(*args, **options))
            random.Random(seed).shuffle(infos)
            return infos

        monkeypatch.setattr(ledger, "list_files", shuffled)
        assert planned(output) == before


@pytest.mark.slow
def test_twenty_thousand_shards_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # A million must fit in 1 GiB with the shards themselves: 400 bytes each, and as much for the plan.
    num_shards, num_parts = 20_000, 3
    shards = [Shard(f"{i:08d}", f"s3://bkt/{i:08d}.tar", i, "etag") for i in range(num_shards)]

    def listing(fs: object, base: str, **options: object) -> Iterator[FileInfo]:
        if base.endswith(EMBEDDINGS):
            for shard in shards[: num_shards * 9 // 10]:
                tag = version_tag(shard.num_bytes, shard.version)
                for part in range(num_parts):
                    name = PartName(shard.name, tag, part, "last" if part == num_parts - 1 else "")
                    yield FileInfo(f"{base}/{name}", 0, "")

    monkeypatch.setattr(ledger, "list_files", listing)
    tracemalloc.start()
    try:
        plan = make_plan(shards, "/output")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (plan.num_done, len(plan.pending)) == (18_000, 2_000)
    assert peak / num_shards < 400


def embed(output: str) -> None:
    """Three shards: two parts with an error, one part, and one that broke after a sample."""
    make = writer(output)
    make(embedded(["a", "b", "c"], {1: "broken: x"}, name="a", end=""))
    make(embedded(["d"], name="a", part=1, first_index=3))
    make(embedded(["a", "b"], name="b/c"))
    make(embedded(["a"], name="d.e", end="broken", fault="cut: x"))


def test_counts_are_of_samples_and_balance(place: str) -> None:
    embed(place)
    counts = count(SHARDS, place)
    assert (counts.num_samples, counts.num_embedded, counts.num_errors) == (7, 6, 1)
    assert (counts.broken, counts.missing, counts.faults) == (["d.e"], [], [])
    assert counts.balanced


def test_the_shards_with_the_most_errors_are_named_with_their_samples(tmp_path: Path) -> None:
    make = writer(str(tmp_path))
    shards = [Shard(f"s{number:02d}", f"s{number:02d}.tar", 1000, "etag") for number in range(13)]
    for number, shard in enumerate(shards):
        # s00 has none; s01, s02, ... have 1, 2, ... errors, in two parts, and one sample that is well.
        bad = dict.fromkeys(range(number), "empty")
        make(embedded([f"k{row}" for row in range(number + 1)], bad, name=shard.name, end=""))
        make(embedded(["last"], {0: "empty"} if number else {}, name=shard.name, part=1, first_index=number + 1))
    found = count(shards, str(tmp_path)).errors_by_shard
    assert list(found.items()) == [(f"s{number:02d}", (number + 1, number + 2)) for number in range(12, 2, -1)]
    assert count(shards[:1], str(tmp_path)).errors_by_shard == {}


def test_only_the_named_shards_are_counted(tmp_path: Path) -> None:
    embed(str(tmp_path))
    counts = count(SHARDS[1:2], str(tmp_path))
    assert (counts.num_samples, counts.balanced) == (2, True)
    assert count([], str(tmp_path)).balanced


NAMES = {
    "first": f"a.{TAG}-00000.parquet",
    "last": f"a.{TAG}-00001-last.parquet",
    "only": f"b/c.{TAG}-00000-last.parquet",
    "broken": f"d.e.{TAG}-00000-broken.parquet",
}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("embeddings/first", "a: part 0 is missing"),
        ("errors/first", "a: .* has 2 embeddings and 0 errors for 3 samples"),
        ("errors/broken", "d.e: .* has 1 embedding and 0 errors for 1 sample"),
    ],
)
def test_a_part_that_is_gone_is_an_imbalance(tmp_path: Path, part: str, message: str) -> None:
    embed(str(tmp_path))
    folder, _, name = part.partition("/")
    (tmp_path / folder / NAMES[name]).unlink()
    counts = count(SHARDS, str(tmp_path))
    assert not counts.balanced
    assert [fault for fault in counts.faults if re.match(message, fault)]


@pytest.mark.parametrize(("name", "shard"), [("last", "a"), ("only", "b/c"), ("broken", "d.e")])
def test_a_shard_without_its_end_is_missing(tmp_path: Path, name: str, shard: str) -> None:
    embed(str(tmp_path))
    (tmp_path / EMBEDDINGS / NAMES[name]).unlink()
    counts = count(SHARDS, str(tmp_path))
    assert counts.missing == [shard]
    assert not counts.balanced


def test_every_other_imbalance_is_told(tmp_path: Path) -> None:
    output = str(tmp_path)
    make = writer(output)
    planted = {
        "cut": "is not whole Parquet",
        "orphan": "has errors and no embeddings",
        "old": "is of an older version",
        "after": "ends the shard, and part 1 is there",
        "twice": "part 0 is there twice",
        "shifted": "begins at sample 5, not 2",
        "short": "has 2 embeddings and 0 errors for 3 samples",
        "foreign": "is not whole Parquet",
    }
    shards = [Shard(name, name, 1000, "etag") for name in planted]
    for name in planted:
        if name not in ("shifted", "short"):
            make(embedded(["a", "b"], name=name))
    assert count([shard for shard in shards if shard.name not in ("shifted", "short")], output).balanced
    cut = tmp_path / EMBEDDINGS / f"cut.{TAG}-00000-last.parquet"
    cut.write_bytes(cut.read_bytes()[:-50])
    store(output, "5", folder=ERRORS, shard="orphan")
    store(output, "0-last", tag=OLD, shard="old")
    make(embedded(["c"], name="after", part=1, first_index=2))
    make(embedded(["a", "b"], name="twice", end=""))
    make(embedded(["a", "b"], name="shifted", end=""))
    make(embedded(["c"], name="shifted", part=1, first_index=5))
    make(embedded(["a", "b"], name="short", num_samples=3))
    (tmp_path / EMBEDDINGS / f"foreign.{TAG}-00000-last.parquet").write_bytes(b"<html></html>")
    counts = count(shards, output)
    assert not counts.balanced
    told = {fault.partition(":")[0]: fault for fault in counts.faults}
    assert told.keys() == planted.keys()
    for name, message in planted.items():
        assert message in told[name]


def test_a_part_of_other_settings_is_no_balance(tmp_path: Path) -> None:
    writer(tmp_path)(embedded(["a", "b"], name="a"))
    assert count(SHARDS[:1], str(tmp_path), FINGERPRINT.digest).balanced
    (fault,) = count(SHARDS[:1], str(tmp_path), "0" * 64).faults
    assert f"a.{TAG}-00000-last.parquet was made with other settings than 0000" in fault


def test_a_broken_end_that_has_more_stays_until_its_part_is_whole(tmp_path: Path) -> None:
    make = writer(tmp_path)
    make(embedded(["a", "b"], name="a", end="broken", fault="cut"))
    stored = (tmp_path / EMBEDDINGS / f"a.{TAG}-00000-broken.parquet").read_bytes()
    receipts = make(embedded(["a"], name="a", end="broken", fault="Access Denied"))
    assert (tmp_path / EMBEDDINGS / f"a.{TAG}-00000-broken.parquet").read_bytes() == stored
    assert receipts.column("num_embedded").to_pylist() == [0]
    make(embedded(["a", "b", "c"], name="a", end="broken", fault="cut later"))
    assert count(SHARDS[:1], str(tmp_path)).num_embedded == 3
    make(embedded(["a", "b", "c", "d"], name="a"))
    plan = make_plan(SHARDS[:1], str(tmp_path))
    assert plan.pending == []
    delete(str(tmp_path), plan.stale["a"])
    assert count(SHARDS[:1], str(tmp_path)).num_embedded == 4


def test_a_fault_after_stored_parts_balances_and_is_tried_again(tmp_path: Path) -> None:
    make = writer(tmp_path)
    make(embedded(["a", "b"], name="a", end=""))
    make(embedded(["c"], name="a", part=1, first_index=2, end=""))
    make(embedded([], name="a", part=2, first_index=UNKNOWN_INDEX, end="broken", fault="reading failed"))
    counts = count(SHARDS[:1], str(tmp_path))
    assert counts.balanced, counts.faults
    assert (counts.num_samples, counts.num_embedded, counts.num_errors, counts.broken) == (3, 3, 0, ["a"])
    plan = make_plan(SHARDS[:1], str(tmp_path))
    assert [shard.stored_parts for shard in plan.pending] == [(0, 1)]
    assert plan.stale == {}


def test_an_output_that_is_no_folder_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert planned(str(tmp_path / "file")).num_done == 0


def test_an_output_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*args: object, **options: object) -> list[FileInfo]:
        raise PermissionError("no")

    monkeypatch.setattr(ledger, "list_files", denied)
    with pytest.raises(StoreError, match=r"cannot list .*/embeddings: PermissionError: no"):
        planned(str(tmp_path))
