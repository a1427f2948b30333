"""Near-duplicates are all the pairs above a cosine, each once, with and without an index."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import ImageEnhance

from shard_embedder.jobs.duplicates import main
from shard_embedder.pipeline.core.errors import OutputError, SettingsError
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.duplicates import PAIRS_SCHEMA, draw_duplicates, find_duplicates
from shard_embedder.pipeline.retrieval.index import open_index
from tests.conftest import SmallDisk, encode, photo, write_tar
from tests.outputs import embed
from tests.retrieval.stored import clusters, store

PHOTOS = 12


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Shards and output of three views of each of twelve photos: as it is, brighter, and compressed harder."""
    folder = tmp_path_factory.mktemp("duplicates")
    members = []
    for number in range(PHOTOS):
        image = photo(number)
        versions = [encode(image), encode(ImageEnhance.Brightness(image).enhance(1.02)), encode(image, quality=60)]
        members += [(f"p{number:02d}-view{i}.jpg", data) for i, data in enumerate(versions)]
    write_tar(folder / "in" / "a.tar", members[:20])
    write_tar(folder / "in" / "b.tar", members[20:])
    embed(folder / "in", folder / "out", part_rows=7)
    return folder / "in", folder / "out"


def all_pairs(values: np.ndarray[Any, Any], threshold: float) -> dict[tuple[int, int], float]:
    """By float64, one after the other."""
    unit = values.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    return {(int(a), int(b)): cosines[a, b] for a, b in zip(*np.nonzero(cosines >= threshold), strict=True) if a < b}


def stored_pairs(path: Path) -> dict[tuple[int, int], float]:
    table = pq.read_table(path)
    assert table.schema.equals(PAIRS_SCHEMA)
    rows = table.to_pylist()
    found = {(int(row["id_a"].rpartition("-")[2]), int(row["id_b"].rpartition("-")[2])): row["score"] for row in rows}
    assert len(found) == len(rows), "a pair is there twice"
    return found


def same(found: dict[tuple[int, int], float], expected: dict[tuple[int, int], float]) -> bool:
    return found.keys() == expected.keys() and all(abs(found[pair] - expected[pair]) < 1e-5 for pair in found)


@pytest.mark.parametrize("block_rows", [4096, 300, 1])
def test_every_pair_above_the_threshold_is_found_once_whatever_the_blocks(block_rows: int, tmp_path: Path) -> None:
    values = clusters(120 if block_rows == 1 else 1000)
    store(tmp_path / "out", "a", values)
    pairs = tmp_path / "pairs.parquet"
    found = find_duplicates(str(tmp_path / "out"), pairs, 0.85, block_rows=block_rows)
    expected = all_pairs(values, 0.85)
    assert (found.num_pairs, found.num_rows) == (len(expected), len(values))
    assert len(expected) > 10
    assert same(stored_pairs(tmp_path / "pairs.parquet"), expected)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_finds_the_same_pairs(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    values = clusters(1000)
    store(tmp_path / "out", "a", values)
    build(str(tmp_path / "out"), tmp_path / "index", Options(kind=kind))
    index = open_index(tmp_path / "index")
    found = find_duplicates(str(tmp_path / "out"), tmp_path / "pairs.parquet", 0.85, index=index)
    expected, pairs = all_pairs(values, 0.85), stored_pairs(tmp_path / "pairs.parquet")
    assert found.truncated == 0
    if kind == "flat":
        assert same(pairs, expected)
    assert pairs.keys() <= expected.keys()
    assert len(pairs) >= 0.95 * len(expected) > 100


@pytest.mark.parametrize(("kind", "is_told"), [("flat", False), ("hnsw", True), ("ivf", True)])
def test_an_approximate_index_is_told_with_its_recall_on_the_output_and_the_page(
    kind: str, is_told: bool, views: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    index, pairs, page = (str(tmp_path / name) for name in ("index", "pairs.parquet", "page.html"))
    facts = build(str(views[1]), index, Options(kind=kind)).facts
    assert main([str(views[1]), "--index", index, "--pairs", pairs, "--html", page, "--input", str(views[0])]) == 0
    line = f"looked for in an index of kind {kind}, recall@10 {facts.recall:.3f}: pairs may be missing"
    assert (line in capsys.readouterr().out) == is_told
    assert (line in Path(page).read_text()) == is_told


def test_a_row_with_more_near_duplicates_than_were_looked_for_is_told(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    values = np.repeat(clusters(1), 100, axis=0)
    store(tmp_path / "out", "a", values)
    build(str(tmp_path / "out"), tmp_path / "index")
    index = open_index(tmp_path / "index")
    assert find_duplicates(str(tmp_path / "out"), tmp_path / "p", 1.0, index=index).num_pairs == 4950
    found = find_duplicates(str(tmp_path / "out"), tmp_path / "p", 1.0, index=index, max_pairs=32)
    assert found.truncated == 100


_PEAK = """
import sys
from pathlib import Path
from shard_embedder.pipeline.retrieval.duplicates import find_duplicates
from shard_embedder.pipeline.retrieval.index import open_index
output, pairs, index, most = sys.argv[1:]
found = find_duplicates(output, pairs, 0.9, index=open_index(index) if index else None, max_pairs=int(most))
status = Path("/proc/self/status").read_text()
print(found.num_pairs, int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("with_index", [False, True])
def test_one_image_thousands_of_times_takes_no_more_memory(with_index: bool, tmp_path: Path) -> None:
    if with_index:
        pytest.importorskip("faiss", reason="the extra `index` is not installed")
    rng = np.random.default_rng(0)
    found = {}
    for name, values in (("other", rng.normal(size=(3000, 64))), ("same", np.ones((3000, 64)))):
        store(tmp_path / name, "a", values.astype(np.float32))
        index = tmp_path / f"{name}-index" if with_index else ""
        if with_index:
            build(str(tmp_path / name), index)
        command = [
            sys.executable,
            "-c",
            _PEAK,
            tmp_path / name,
            tmp_path / f"{name}.parquet",
            index,
            2047 if with_index else 3000,
        ]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
        found[name] = tuple(map(int, done.stdout.split()))
    (none, control_mib), (num_pairs, peak_mib) = found["other"], found["same"]
    assert none == 0
    # Of an index, at most 2048 neighbours of each row.
    assert num_pairs == 3000 * 2999 // 2 if not with_index else num_pairs >= 3000 * 2047 // 2
    assert pq.read_metadata(tmp_path / "same.parquet").num_rows == num_pairs
    # All 4.5 million pairs at once, and what sorts them, would be 400 MiB and more.
    assert peak_mib < control_mib + 300


def test_views_of_one_photo_are_found_and_precision_and_recall_told(
    views: tuple[Path, Path], tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    shards, output = views
    done = run_job(
        "duplicates.py", output, "--threshold", 0.999, "--group-pattern", "^(p[0-9]+)-view",
        "--html", "page.html", "--input", shards,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pairs = pq.read_table(tmp_path / "duplicates.parquet").to_pylist()
    right = [row for row in pairs if row["id_a"][:3] == row["id_b"][:3]]
    assert len(right) == 3 * PHOTOS
    precision = len(right) / len(pairs)
    assert f"precision {precision:.4f}, recall 1.0000 (36 pairs of the 36 that share a group)" in done.stdout
    assert {row["shard_a"] for row in pairs} == {"a", "b"}
    text = (tmp_path / "page.html").read_text()
    assert "no preview" not in text
    heads = len({row["id_a"] for row in pairs})
    assert text.count('<figure class="head">') == heads
    assert not re.search(r"(src|href)=\"(?!data:)", text)


@pytest.mark.slow
def test_a_page_is_drawn_from_all_pairs_however_many_one_image_has(tmp_path: Path) -> None:
    """One image 700 times at the front is 244,650 pairs, and 20 others are there twice behind it."""
    values = np.concatenate([np.repeat(clusters(1), 700, axis=0), np.tile(np.eye(24)[:20], (2, 1))])
    store(tmp_path / "out", "a", values.astype(np.float32))
    assert find_duplicates(str(tmp_path / "out"), tmp_path / "pairs", 0.999).num_pairs == 700 * 699 // 2 + 20
    drawn = draw_duplicates(tmp_path / "pairs", 1000, 6)
    assert sorted(one.place[1] for one in drawn) == [*range(699), *range(700, 720)]
    assert all(len(one.near) == min(6, 699 - one.place[1]) for one in drawn if one.place[1] < 700)
    assert all(
        [near.sample_index - 20 for near in one.near] == [one.place[1]] for one in drawn if one.place[1] >= 700
    )
    some = draw_duplicates(tmp_path / "pairs", 100, 6)
    assert len({one.place for one in some}) == 100
    assert any(one.place[1] >= 700 for one in some)
    assert some == draw_duplicates(tmp_path / "pairs", 100, 6)
    for one in some:
        assert [near.score for near in one.near] == sorted((near.score for near in one.near), reverse=True)


def test_without_a_pair_nothing_is_drawn(tmp_path: Path) -> None:
    store(tmp_path / "out", "a", np.eye(24, dtype=np.float32))
    assert find_duplicates(str(tmp_path / "out"), tmp_path / "pairs", 0.9).num_pairs == 0
    assert draw_duplicates(tmp_path / "pairs", 10, 6) == []


def test_an_id_that_does_not_match_is_in_no_group(views: tuple[Path, Path], tmp_path: Path) -> None:
    found = find_duplicates(str(views[1]), tmp_path / "p", 0.5, group_pattern="^(p0[01])-")
    assert found.num_true == 2 * 3
    assert found.num_right == 6
    assert found.recall == 1.0
    nothing = find_duplicates(str(views[1]), tmp_path / "p", 0.5, group_pattern="^(x)")
    assert (nothing.num_true, nothing.recall, nothing.precision) == (0, None, 0.0)


@pytest.mark.parametrize("kib", [40, 400])
def test_a_full_disk_is_told_and_nothing_is_left_on_it(
    kib: int, small_disk: SmallDisk, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    store(tmp_path / "out", "a", np.repeat(clusters(1), 1000, axis=0))
    build(str(tmp_path / "out"), tmp_path / "index")
    small_disk.resize(kib)
    done = run_job("duplicates.py", tmp_path / "out", "--index", tmp_path / "index", "--scratch", small_disk.folder)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert f"No space left on device: '{small_disk.folder}/duplicates-" in done.stderr
    assert list(small_disk.folder.iterdir()) == []
    assert not (tmp_path / "duplicates.parquet").exists()


def test_an_index_that_is_not_of_the_output_as_it_is_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="the extra `index` is not installed")
    store(tmp_path / "out", "a", clusters(50))
    build(str(tmp_path / "out"), tmp_path / "index")
    build(str(tmp_path / "out"), tmp_path / "l2", Options("l2"))
    store(tmp_path / "out", "b", clusters(50))
    with pytest.raises(OutputError, match=r"does not hold the parts .* run the index command again"):
        find_duplicates(str(tmp_path / "out"), tmp_path / "p", 0.9, index=open_index(tmp_path / "index"))
    with pytest.raises(OutputError, match="with metric cosine"):
        find_duplicates(str(tmp_path / "out"), tmp_path / "p", 0.9, index=open_index(tmp_path / "l2"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threshold", "0"], "threshold must be above 0 and at most 1, got 0.0"),
        (["--group-pattern", "("], "is no regular expression"),
        (["--group-pattern", "x"], "must have a group in parentheses, got 'x'"),
        (["--index", "nowhere"], "nowhere is not an index"),
        (["--group-pattern", "(a{99999999999999999999})"], "is no regular expression"),
        (["--pairs", "no/such/p.parquet"], "--pairs must be in a folder that is there, got 'no/such/p.parquet'"),
        (["--pairs", "."], "--pairs must be a file, got the folder '.'"),
        (["--html", "no/such/page.html"], "--html must be in a folder that is there, got 'no/such/page.html'"),
        (["--html", "page.html", "--input", "nothing.tar"], "nothing.tar"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(
    options: list[str], message: str, views: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([str(views[1]), *options]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "it is told before the work, not after"


@pytest.mark.parametrize("option", ["--pairs", "--html", "--index", "--scratch"])
def test_an_empty_path_is_not_taken_for_the_current_folder(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["output", option, ""])
    assert f"argument {option}: must not be empty, got ''" in capsys.readouterr().err


def test_a_threshold_that_is_no_number_is_refused_before_anything_else() -> None:
    with pytest.raises(SettingsError, match="threshold must be above 0"):
        find_duplicates("nowhere", "p", float("nan"))
