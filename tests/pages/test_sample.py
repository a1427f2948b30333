"""What is taken of an output for its page: how much, from where, and whether the mathematics is right."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.output.names import PartName
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.output.stored import unit
from shard_embedder.pipeline.pages import sample as report_sample
from shard_embedder.pipeline.pages.sample import Sample, neighbours, norms, plane, spread, take_sample
from shard_embedder.pipeline.shards.find import Shard, find_shards
from tests.conftest import encode, photo, sample_members, write_shards, write_tar
from tests.outputs import embed


def shards_of(folder: Path) -> dict[str, Shard]:
    return {shard.name: shard for shard in find_shards([str(folder)]).shards}


def taken(folder: Path, output: Path, opened: Collection[str] = ()) -> Sample:
    return take_sample(str(output), shards_of(folder), opened)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, `in`, and what was made of them, `out`."""
    folder = tmp_path_factory.mktemp("sample")
    write_shards(folder / "in", num_shards=3, samples_each=7)
    embed(folder / "in", folder / "out")
    return folder


def test_a_small_output_is_taken_whole_row_for_row(made: Path) -> None:
    sample = taken(made / "in", made / "out")
    assert (len(sample.ids), sample.num_read, sample.num_stored) == (21, 9, 9)
    assert not sample.faults
    assert not sample.is_cut
    stored = {}
    for path in (made / "out" / "embeddings").glob("*.parquet"):
        table = pq.read_table(path)
        for row, vector in zip(table.to_pylist(), vectors(table), strict=True):
            stored[row["shard"], row["sample_index"]] = row["image_id"], vector
    assert sorted(sample.places) == sorted(stored)
    for id, place, vector in zip(sample.ids, sample.places, sample.vectors, strict=True):
        assert id == stored[place][0]
        assert np.array_equal(vector, stored[place][1])


def test_of_a_large_output_a_bounded_part_is_taken(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_sample, "MAX_PARTS", 2)
    monkeypatch.setattr(report_sample, "MAX_ROWS", 4)
    sample = taken(made / "in", made / "out")
    assert (len(sample.ids), sample.num_read, sample.num_stored) == (4, 2, 9)
    assert [index for _, index in sample.places] == [0, 1, 0, 1]
    # Half of it and more are of shards that the run opened.
    last = taken(made / "in", made / "out", {"photos-00002"})
    assert [name for name, _ in last.places] == ["photos-00002"] * 2 + ["photos-00000"] * 2
    monkeypatch.setattr(report_sample, "MAX_BYTES", 2 * 512 * 4)
    assert len(taken(made / "in", made / "out").ids) == 2
    monkeypatch.setattr(report_sample, "MAX_LISTED", 5)
    cut = taken(made / "in", made / "out")
    assert (cut.num_stored, cut.is_cut) == (5, True)


def test_first_parts_of_shards_come_first_evenly_over_their_names() -> None:
    many = [PartName(f"{shard:03d}", "0" * 12, part, "") for part in range(4) for shard in range(100)]
    assert [(part.shard, part.part) for part in spread(many, 4)] == [("000", 0), ("025", 0), ("050", 0), ("075", 0)]
    few = [part for part in many if part.shard < "002"]
    assert [(part.shard, part.part) for part in spread(few, 5)] == [
        ("000", 0), ("001", 0), ("000", 1), ("001", 1), ("000", 2),
    ]  # fmt: skip
    assert spread([], 5) == []


def test_parts_of_another_version_of_a_shard_are_left_out(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2)
    embed(tmp_path / "in", tmp_path / "out")
    write_tar(tmp_path / "in" / "photos-00001.tar", sample_members("fresh", 99))
    assert {name for name, _ in taken(tmp_path / "in", tmp_path / "out").places} == {"photos-00000"}


def test_a_broken_part_costs_itself_and_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2, samples_each=3)
    embed(tmp_path / "in", tmp_path / "out")
    first, second = sorted((tmp_path / "out" / "embeddings").glob("*.parquet"))
    first.write_bytes(first.read_bytes()[:-100])
    sample = taken(tmp_path / "in", tmp_path / "out")
    assert len(sample.ids) == 3
    assert len(sample.faults) == 1
    assert first.name in sample.faults[0]
    second.write_bytes(b"")
    assert len(taken(tmp_path / "in", tmp_path / "out").ids) == 0


def test_feature_maps_are_averaged_over_their_grid_and_halves_are_widened(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [(f"{seed}.jpg", encode(photo(seed))) for seed in range(4)])
    embed(tmp_path / "in", tmp_path / "maps", features="map", dtype="float16")
    sample = taken(tmp_path / "in", tmp_path / "maps")
    maps = np.concatenate(
        [vectors(pq.read_table(path)) for path in sorted((tmp_path / "maps" / "embeddings").glob("*"))]
    )
    assert sample.is_map
    assert sample.vectors.dtype == np.float32
    assert maps.ndim == 4
    assert np.allclose(sample.vectors, maps.astype(np.float64).mean(axis=(2, 3)), atol=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(300, 40), (40, 300), (5, 1), (2, 7), (30, 2)])
def test_the_plane_is_that_of_an_exact_decomposition(rows: int, columns: int) -> None:
    rng = np.random.default_rng(rows)
    values = (rng.standard_normal((rows, columns)) * 0.7 ** np.arange(columns) + 1).astype(np.float32)
    values *= rng.uniform(1, 50, (rows, 1)).astype(np.float32)
    found = plane(values)
    scaled = unit(values).astype(np.float64)
    centred = scaled - scaled.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    assert found is not None
    expected = [*(singular**2 / (singular**2).sum()), 0.0]
    assert found.explained == pytest.approx(expected[:2], abs=1e-4)
    for axis in range(min(2, (singular > 1e-6).sum())):
        exact = left[:, axis] * singular[axis]
        agree = abs(found.points[:, axis] @ exact) / (exact @ exact)
        assert agree == pytest.approx(1, abs=1e-3)


def test_equal_rows_have_no_plane_and_zeros_no_direction() -> None:
    assert plane(np.ones((9, 5), np.float32)) is None
    assert plane(np.ones((1, 5), np.float32)) is None
    assert plane(np.zeros((4, 5), np.float32)) is None
    assert norms(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)).tolist() == [5.0, 0.0]
    large = np.full((2, 4), 1e30, np.float32)
    assert np.isfinite(norms(large)).all()
    assert norms(np.full((1, 4), 1e4, np.float16).astype(np.float32))[0] == pytest.approx(2e4, rel=1e-3)


def test_neighbours_are_those_of_all_cosines_and_the_draw_is_the_same_each_time() -> None:
    values = np.random.default_rng(1).standard_normal((50, 16)).astype(np.float32)
    rows = list(range(10, 50))
    found = neighbours(values, rows, 6, 5)
    assert len({near.row for near in found}) == 6
    assert found == neighbours(values, rows, 6, 5)
    for near in found:
        cosine = {
            row: float(
                values[row] @ values[near.row] / np.linalg.norm(values[row]) / np.linalg.norm(values[near.row])
            )
            for row in rows
            if row != near.row
        }
        expected = sorted(cosine.items(), key=lambda item: -item[1])[:5]
        assert [row for row, _ in near.others] == [row for row, _ in expected]
        assert [score for _, score in near.others] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_one_row_has_no_neighbour_and_two_have_each_other() -> None:
    values = np.eye(2, dtype=np.float32)
    assert neighbours(values, [0], 6, 5) == []
    assert sorted((near.row, near.others) for near in neighbours(values, [0, 1], 6, 5)) == [
        (0, [(1, 0.0)]),
        (1, [(0, 0.0)]),
    ]
