"""Groups are what chains of near-duplicates connect, whatever the blocks; one image of each is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_embedder.jobs.duplicates import main
from shard_embedder.pipeline.core.errors import InputError, SettingsError
from shard_embedder.pipeline.retrieval.build import build
from shard_embedder.pipeline.retrieval.duplicates import find_duplicates
from shard_embedder.pipeline.retrieval.group_files import GROUPS_SCHEMA, GroupFiles
from shard_embedder.pipeline.retrieval.groups import Components, choose_kept
from shard_embedder.pipeline.retrieval.index import open_index
from tests.conftest import encode, photo, write_tar
from tests.outputs import embed
from tests.retrieval.stored import clusters, store

Edges = list[tuple[int, int]]


def by_hand(num_rows: int, edges: Edges) -> list[int]:
    """The number of each row's component, in the order of first rows, one edge after the other."""
    labels = list(range(num_rows))
    for a, b in edges:
        low, high = sorted((labels[a], labels[b]))
        labels = [low if label == high else label for label in labels]
    order = sorted(set(labels))
    return [order.index(label) for label in labels]


ROW = st.integers(0, 19)


@given(st.lists(st.tuples(ROW, ROW), max_size=40), st.integers(0, 40))
def test_components_are_those_of_the_edges_in_whatever_order_and_number_they_come(edges: Edges, at: int) -> None:
    components = Components(20)
    for some in (edges[:at], edges[at:]):
        a, b = np.array(some, np.int64).reshape(-1, 2).T
        components.join(a, b)
    assert components.numbers().tolist() == by_hand(20, edges)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(5, 19)), max_size=60))
def test_a_matrix_connects_what_its_edges_connect(edges: Edges) -> None:
    is_near = np.zeros((10, 15), bool)
    for a, b in edges:
        is_near[a, b - 5] = True
    components = Components(20)
    components.join_near(range(10), range(5, 20), is_near)
    assert components.numbers().tolist() == by_hand(20, edges)


def test_the_kept_row_is_the_largest_and_of_equal_ones_the_first() -> None:
    numbers = np.array([0, 1, 0, 2, 1, 0])
    assert choose_kept(numbers).tolist() == [True, True, False, True, False, False]
    by_size = choose_kept(numbers, np.array([5, -1, 7, -1, 3, 7]))
    assert by_size.tolist() == [False, False, True, True, True, False]


def read_groups(path: Path) -> list[dict[str, Any]]:
    table = pq.read_table(path)
    assert table.schema.equals(GROUPS_SCHEMA)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


@pytest.mark.parametrize("how", [4096, 300, 7, "flat"])
def test_every_image_has_the_group_that_pairs_connect(how: int | str, tmp_path: Path) -> None:
    values = clusters(400)
    store(tmp_path / "out", "a", values)
    unit = values.astype(np.float64) / np.linalg.norm(values, axis=1, keepdims=True)
    edges = [(int(a), int(b)) for a, b in zip(*np.nonzero(unit @ unit.T >= 0.9), strict=True) if a < b]
    expected = by_hand(400, edges)
    index = None
    if how == "flat":
        pytest.importorskip("faiss", reason="the extra `index` is not installed")
        build(str(tmp_path / "out"), tmp_path / "index")
        index = open_index(tmp_path / "index")
    files = GroupFiles(groups=tmp_path / "groups.parquet", drop=tmp_path / "drop.txt")
    found = find_duplicates(
        str(tmp_path / "out"), None, 0.9, index=index, group_files=files, block_rows=how if how != "flat" else 4096
    )  # type: ignore[arg-type]
    rows = read_groups(tmp_path / "groups.parquet")
    assert [row["group"] for row in rows] == expected
    assert [row["sample_index"] for row in rows] == list(range(400))
    first = [expected.index(group) for group in expected]
    assert [row["keep"] for row in rows] == [number == row for row, number in enumerate(first)]
    dropped = (tmp_path / "drop.txt").read_text().splitlines()
    assert dropped == [row["image_id"] for row in rows if not row["keep"]]
    assert found.groups is not None
    assert found.groups.num_groups == len({group for group in expected if expected.count(group) > 1})
    assert found.groups.num_others == len(dropped) > 10
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["drop.txt", "groups.parquet"]


def test_a_chain_of_images_each_near_the_next_is_one_group(tmp_path: Path) -> None:
    angles = np.random.default_rng(0).permutation(np.arange(2000) * 0.001)
    store(tmp_path / "out", "a", np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    files = GroupFiles(groups=tmp_path / "groups.parquet")
    # The cosine of neighbours is 0.9999995, of those after them 0.999998.
    find_duplicates(str(tmp_path / "out"), None, 0.9999995, group_files=files, block_rows=300)
    assert {row["group"] for row in read_groups(tmp_path / "groups.parquet")} == {0}


@pytest.mark.parametrize("with_index", [False, True])
def test_thousands_of_copies_of_one_image_are_a_group_and_a_bounded_number_of_pairs(
    with_index: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.concatenate([np.ones((5000, 16)), np.eye(16)]).astype(np.float32)
    store(tmp_path / "out", "a", values)
    options = []
    if with_index:
        pytest.importorskip("faiss", reason="the extra `index` is not installed")
        build(str(tmp_path / "out"), tmp_path / "index")
        options = ["--index", str(tmp_path / "index")]
    pairs, groups = str(tmp_path / "pairs.parquet"), str(tmp_path / "groups.parquet")
    assert main([str(tmp_path / "out"), *options, "--pairs", pairs, "--groups", groups, "--max-pairs", "20"]) == 0
    said = capsys.readouterr().out
    rows = read_groups(tmp_path / "groups.parquet")
    assert [row["group"] for row in rows] == [0] * 5000 + list(range(1, 17))
    assert "1 group of near-duplicates among 5,016 embeddings: 17 to keep, 4,999 to drop" in said
    table = pq.read_table(pairs)
    of_each = np.bincount(table["sample_index_a"].to_numpy())
    assert of_each.max() == 20
    if not with_index:
        # All but the last 20 copies have 20 and more after them.
        assert len(table) == 4980 * 20 + sum(range(20))
        assert "4,979 embeddings with more than 20 pairs: only the nearest are written" in said


@pytest.mark.parametrize("block_rows", [4096, 64])
def test_the_pairs_that_are_written_of_many_are_the_nearest(block_rows: int, tmp_path: Path) -> None:
    values = clusters(600)
    store(tmp_path / "out", "a", values)
    found = find_duplicates(str(tmp_path / "out"), tmp_path / "pairs", 0.5, max_pairs=5, block_rows=block_rows)
    unit = values.astype(np.float64) / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = np.triu(unit @ unit.T, 1)
    cosines[cosines < 0.5] = 0
    expected = {a: np.sort(cosines[a][cosines[a] > 0])[::-1][:5] for a in range(600)}
    table = pq.read_table(tmp_path / "pairs")
    first, scores = table["sample_index_a"].to_numpy(), table["score"].to_numpy()
    assert first.tolist() == sorted(first.tolist())
    for a in range(600):
        assert np.allclose(np.sort(scores[first == a])[::-1], expected[a], atol=1e-5)
    assert found.truncated == np.count_nonzero((cosines > 0).sum(axis=1) > 5)
    assert found.num_pairs == len(table) == sum(map(len, expected.values()))


@pytest.fixture(scope="module")
def qualities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and output of six photos, each at two qualities: the better one, of more bytes, comes second."""
    folder = tmp_path_factory.mktemp("qualities")
    members = []
    for number in range(6):
        members += [(f"p{number}-{q}.jpg", encode(photo(number), quality=q)) for q in (80, 95)]
    write_tar(folder / "in" / "a.tar", members[:7])
    write_tar(folder / "in" / "b.tar", members[7:])
    embed(folder / "in", folder / "out")
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_the_largest_image_of_a_group_is_kept(named: bool, qualities: Path, tmp_path: Path) -> None:
    options = ["--groups", str(tmp_path / "groups"), "--drop", str(tmp_path / "drop"), "--threshold", "0.999"]
    options += ["--keep-one", "largest", *(["--input", str(qualities / "in")] if named else [])]
    assert main([str(qualities / "out"), *options]) == 0
    assert {row["image_id"] for row in read_groups(tmp_path / "groups") if row["keep"]} == {
        f"p{number}-95" for number in range(6)
    }
    assert (tmp_path / "drop").read_text().splitlines() == [f"p{number}-80" for number in range(6)]
    assert main([str(qualities / "out"), "--drop", str(tmp_path / "first"), "--threshold", "0.999"]) == 0
    assert (tmp_path / "first").read_text().splitlines() == [f"p{number}-95" for number in range(6)]


def test_images_of_unknown_size_are_told_and_the_largest_needs_shards(
    qualities: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.tar").write_bytes((qualities / "in" / "b.tar").read_bytes())
    options = ["--groups", str(tmp_path / "groups"), "--threshold", "0.999", "--keep-one", "largest"]
    assert main([str(qualities / "out"), *options, "--input", str(tmp_path / "in")]) == 0
    # The one shard is not named, and the copy of the other has another time: another version.
    assert "12 images of unknown size" in capsys.readouterr().out
    shutil.copytree(qualities / "out", tmp_path / "out")
    stored = tmp_path / "out" / "run.json"
    stored.write_text(stored.read_text().replace(str(qualities / "in"), str(tmp_path / "nothing")))
    files = GroupFiles(groups=tmp_path / "g", keep_one="largest")
    with pytest.raises(InputError):
        find_duplicates(str(tmp_path / "out"), None, 0.9, group_files=files)
    assert not (tmp_path / "g").exists()


def test_no_id_is_listed_to_drop_that_would_drop_a_kept_image_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One photo under one id in two shards, and another with a line break in its id."""
    same, other = encode(photo(1)), encode(photo(2))
    ids = {"a": ["same", "kept"], "b": ["same", "line\\nbreak"], "c": ["free"]}
    for shard, names in ids.items():
        members = []
        for number, (name, image) in enumerate(zip(names, (same, other), strict=False)):
            members += [(f"{number}.jpg", image), (f"{number}.json", f'{{"id": "{name}"}}'.encode())]
        write_tar(tmp_path / "in" / f"{shard}.tar", members)
    embed(tmp_path / "in", tmp_path / "out", id="json:id")
    options = ["--groups", str(tmp_path / "groups"), "--drop", str(tmp_path / "drop"), "--threshold", "0.9999"]
    assert main([str(tmp_path / "out"), *options]) == 0
    assert "2 groups of near-duplicates among 5 embeddings: 2 to keep, 3 to drop" in (said := capsys.readouterr().out)
    assert "2 images to drop not in the list: a kept image has the same id, or the id has a line break" in said
    assert (tmp_path / "drop").read_text() == "free\n"
    dropped = {(row["shard"], row["sample_index"]) for row in read_groups(tmp_path / "groups") if not row["keep"]}
    assert dropped == {("b", 0), ("b", 1), ("c", 0)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--groups", "g", "--html", "page.html"], "--html and --group-pattern need --pairs"),
        (["--drop", "d", "--group-pattern", "(.)"], "--html and --group-pattern need --pairs"),
        (["--keep-one", "largest"], "--keep-one needs --groups or --drop, got 'largest' without them"),
        (["--groups", "x", "--drop", "./x"], "--pairs, --groups, --drop and --html must be different files"),
        (["--groups", "no/such/g"], "--groups must be in a folder that is there, got 'no/such/g'"),
        (["--drop", "."], "--drop must be a file, got the folder '.'"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["out", *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_rules_are_told_with_their_values() -> None:
    with pytest.raises(SettingsError, match="keep_one must be one of first, largest, got 'best'"):
        GroupFiles(keep_one="best")
    with pytest.raises(SettingsError, match="max_pairs must be at least 1, got 0"):
        find_duplicates("nowhere", "p", 0.9, max_pairs=0)
