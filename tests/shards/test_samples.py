"""Samples and parts: keys, fields, and parts that are the same in every run."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.core.schema import IMAGE, REASON, SHARD_SCHEMA, UNKNOWN_INDEX, part_rows
from shard_embedder.pipeline.shards import samples as samples_module
from shard_embedder.pipeline.shards.samples import SampleReader
from tests.conftest import sample_members, write_tar
from tests.shards.reading import PHOTO, make_config, parts, pending, rows, without_times


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Ten samples."""
    return write_tar(tmp_path / "ten.tar", [member for i in range(10) for member in sample_members(f"{i:04d}", i)])


# Members that do not stand side by side


def photos_and_texts(count: int) -> tuple[list[tuple[str, bytes]], list[tuple[str, bytes]]]:
    texts = [(f"d/{i}.json", json.dumps({"id": f"p{i}"}).encode()) for i in range(count)]
    return [(f"d/{i}.jpg", PHOTO) for i in range(count)], texts


@given(st.permutations(range(12)))
@settings(max_examples=60, deadline=None)
def test_in_whatever_order_the_members_stand_every_image_is_embedded_once(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    photos, texts = photos_and_texts(6)
    members = [[*photos, *texts][position] for position in order]
    path = write_tar(tmp_path_factory.mktemp("shards") / "s.tar", members)
    found = parts(path, part_rows=4, keep=["json:id"])
    got = [row for _, samples in found for row in samples.to_pylist()]
    embedded = [row for row in got if row[REASON] is None]
    assert sorted(row["image_id"] for row in embedded) == [f"d/{i}" for i in range(6)]
    names = [name for name, _ in members]
    beside = [f"d/{i}" for i in range(6) if abs(names.index(f"d/{i}.jpg") - names.index(f"d/{i}.json")) == 1]
    # Beside its image a member is of its sample; apart it is a row of its own that says so.
    assert {row["image_id"]: row["keep:id"] for row in embedded} == {
        f"d/{i}": f"p{i}" if f"d/{i}" in beside else None for i in range(6)
    }
    errors = [row for row in got if row[REASON] is not None]
    assert sorted(row["image_id"] for row in errors) == sorted({f"d/{i}" for i in range(6)} - {*beside})
    assert {row[REASON].partition(":")[0] for row in errors} <= {"no image", "members apart"}
    assert all("tar --sort=name" in row[REASON] for row in errors)
    assert sum(values["apart_samples"] for values, _ in found) == 6 - len(beside)


def test_an_image_whose_id_stands_apart_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    photos, texts = photos_and_texts(2)
    for members, kind in (([*photos, *texts], "members apart"), ([*texts, *photos], "no image")):
        found = rows(write_tar(tmp_path / "s.tar", members), id="json:id")
        reasons = {row["member"]: row[REASON] for row in found}
        for name, _ in photos:
            assert reasons[name] == (
                "no id: json:id is missing, not text or an integer; it has no json beside it: "
                "members of a sample must stand side by side, as `tar --sort=name` puts them"
            )
        assert {reasons[name].partition(":")[0] for name, _ in texts} == {kind}


def test_metadata_without_an_image_takes_neither_a_key_nor_an_id(tmp_path: Path) -> None:
    own = b'{"id": "one"}'
    path = write_tar(tmp_path / "s.tar", [("a.json", own), ("b.jpg", PHOTO), ("b.json", own), ("b.txt", b"")])
    assert [(row["image_id"], row[REASON] is None) for row in rows(path, id="json:id")] == [
        ("one", False),
        ("one", True),
    ]


# Parts


@pytest.mark.parametrize("part_rows_", [1, 2, 3, 5, 9, 10, 11, 1000])
def test_part_boundaries_depend_on_part_rows_alone(shard: Path, part_rows_: int) -> None:
    found = parts(shard, part_rows=part_rows_)
    sizes = [part_rows_] * (10 // part_rows_) + ([10 % part_rows_] if 10 % part_rows_ else [])
    assert [len(samples) for _, samples in found] == sizes
    assert [values["num_samples"] for values, _ in found] == sizes
    assert [values["first_index"] for values, _ in found] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert [values["part"] for values, _ in found] == list(range(len(sizes)))
    assert [values["end"] for values, _ in found] == [""] * (len(sizes) - 1) + ["last"]
    assert [row["image_id"] for _, samples in found for row in samples.to_pylist()] == [f"{i:04d}" for i in range(10)]


@pytest.mark.parametrize("stored", [(0,), (1, 2), (0, 1, 2), (3,), (0, 1, 2, 3)])
def test_stored_parts_are_left_out_and_the_others_are_unchanged(shard: Path, stored: tuple[int, ...]) -> None:
    every = parts(shard, part_rows=3, keep=["cls", "json:caption"])
    some = parts(shard, *stored, part_rows=3, keep=["cls", "json:caption"])
    expected = [part for part in every if part[0]["part"] not in stored]
    assert [without_times(values) for values, _ in some] == [without_times(values) for values, _ in expected]
    assert all(ours.equals(theirs) for (_, ours), (_, theirs) in zip(some, expected, strict=True))


def test_parts_are_the_same_in_every_run_but_for_their_times(shard: Path) -> None:
    first, second = (parts(shard, part_rows=4, keep=["cls"], id="json:id") for _ in range(2))
    assert [without_times(values) for values, _ in first] == [without_times(values) for values, _ in second]
    assert all(a.equals(b) for (_, a), (_, b) in zip(first, second, strict=True))
    assert all(values["read_s"] > 0 for values, _ in first)
    assert sum(values["read_bytes"] for values, _ in first) == shard.stat().st_size


def test_many_shards_in_one_task_give_the_parts_of_each(shard: Path, tmp_path: Path) -> None:
    other = write_tar(tmp_path / "other.tar", sample_members("x", 1))
    shards = [pending(shard)._asdict(), pending(other, 0)._asdict() | {"name": "other"}]
    tables = SampleReader(make_config(part_rows=6))(pa.Table.from_pylist(shards, schema=SHARD_SCHEMA))
    found = [(values["name"], values["num_samples"]) for table in tables for values, _ in part_rows(table)]
    assert found == [("shard", 6), ("shard", 4)]


def test_a_part_ends_early_where_its_images_would_take_too_much_memory(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = [len(row[IMAGE]) + len(row["image_id"]) + len(row["member"]) for row in rows(shard)]
    monkeypatch.setattr(samples_module, "MAX_PART_BYTES", max(row_bytes) + 1)
    found = parts(shard, part_rows=9)
    assert [values["num_samples"] for values, _ in found] == [2] * 5
    assert [row["image_id"] for _, samples in found for row in samples.to_pylist()] == [f"{i:04d}" for i in range(10)]


@pytest.mark.parametrize("keep", [[], ["cls"], ["cls", "json:a.b=float64", "txt"]])
def test_an_empty_shard_is_one_part_of_no_samples_with_all_columns(tmp_path: Path, keep: list[str]) -> None:
    ((values, samples),) = parts(write_tar(tmp_path / "s.tar", []), keep=keep)
    assert (values["end"], values["num_samples"], len(samples)) == ("last", 0, 0)
    ((_, full),) = parts(write_tar(tmp_path / "t.tar", sample_members("a", 1)), keep=keep)
    assert samples.type == full.type


def test_a_shard_that_changed_since_it_was_planned_is_void(shard: Path) -> None:
    planned = pending(shard)
    write_tar(shard, sample_members("other", 1))
    found = [part for table in SampleReader(make_config()).parts(planned) for part in part_rows(table)]
    ((values, samples),) = found
    assert (values["end"], len(samples), values["fault_transient"]) == ("broken", 0, True)
    assert values["fault"].startswith("changed while it was read: ")


def test_a_fault_before_the_end_of_what_is_stored_is_a_part_of_its_own_after_it(shard: Path) -> None:
    planned = pending(shard, 0, 1)._replace(version="replaced since")
    reader = SampleReader(make_config(part_rows=4))
    ((values, samples),) = [part for table in reader.parts(planned) for part in part_rows(table)]
    assert (values["part"], values["end"], len(samples)) == (2, "broken", 0)
    assert values["first_index"] == UNKNOWN_INDEX
    assert values["fault"].startswith("changed while it was read: ")
