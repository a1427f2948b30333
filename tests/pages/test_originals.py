"""A result leads to the image's own file, where the output was made of files that are still there."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from shard_embedder import embed as run_embed
from shard_embedder.jobs.duplicates import main as duplicates
from shard_embedder.jobs.search import main as search
from shard_embedder.pipeline.core.errors import NoShardError
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.stored import StoredPart
from shard_embedder.pipeline.retrieval.build import build
from shard_embedder.pipeline.retrieval.index import open_index
from shard_embedder.pipeline.retrieval.originals import Input, Original, Originals, find_input
from shard_embedder.pipeline.shards.find import find_shards
from shard_embedder.pipeline.shards.pack import PackConfig, find_images, pack
from tests.browser import Browser
from tests.conftest import encode, photo, write_tar
from tests.outputs import embed
from tests.pages.looking import check_looks

pytest.importorskip("faiss", reason="the extra `index` is not installed")

SETTINGS = {"backbone": "squeezenet1_1", "weights": "random:0", "image_size": "64", "precision": "fp32"}
NAMES = ("trip/a b#1.v2.jpg", "trip/c:d.jpg", "home/e%f.jpg", "home/<g>&.jpg")


def write_photos(folder: Path) -> Path:
    for seed, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(photo(seed)))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of a folder of photos as it is, and one of shards that were packed by hand, each with its index."""
    folder = tmp_path_factory.mktemp("originals")
    write_photos(folder / "photos")
    run_embed(folder / "photos", folder / "out", **SETTINGS)
    pack(PackConfig(folder=folder / "photos", shards=folder / "shards"), find_images(folder / "photos"))
    embed(folder / "shards", folder / "kept", keep=["cls", "file=json:path"])
    for name in ("out", "kept"):
        build(str(folder / name), folder / f"{name}-index")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


QUERY = f"photos/{NAMES[0]}"


@pytest.mark.slow
def test_a_search_of_a_folders_images_prints_their_files(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(["out-index", QUERY]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split("  ")[-2] for line in lines) == sorted(f"photos/{name}" for name in NAMES[1:])
    assert search(["out-index", QUERY, "--json"]) == 0
    (hit,) = json.loads(capsys.readouterr().out)
    for near in hit["neighbours"]:
        assert near["file"] == str(here / "photos" / near["image_id"])


def test_the_shards_of_a_page_are_listed_once(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed: list[str] = []
    listing = os.scandir

    def count(folder: str) -> object:
        listed.append(str(folder))
        return listing(folder)

    monkeypatch.setattr(os, "scandir", count)
    assert search(["kept-index", QUERY, "--input", "shards", "--html", str(tmp_path / "near.html")]) == 0
    assert listed.count(str(here / "shards")) == 1
    assert capsys.readouterr().out.endswith(f"\nwritten to {tmp_path}/near.html\n")


def test_no_part_is_read_for_files_that_no_folder_can_have(here: Path) -> None:
    index = open_index("kept-index")
    rows = [(image_id, (shard, number)) for image_id, shard, number in index.names([0, 1]).values()]

    def parts() -> list[StoredPart]:
        raise AssertionError("the parts are listed")

    assert Originals(str(here / "kept"), index.facts.made, parts).files(rows) == {}
    with pytest.raises(AssertionError, match="the parts are listed"):
        Originals(str(here / "kept"), index.facts.made, parts, here / "photos").files(rows)


def test_of_packed_shards_the_folder_is_named_and_the_kept_path_leads_to_the_file(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search(["kept-index", QUERY]) == 0
    # Nothing says where the files are: the ids stand there.
    assert "photos/" not in "".join(capsys.readouterr().out.splitlines()[1:])
    assert search(["kept-index", QUERY, "--input", "photos", "--html", "near.html"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert sorted(line.split("  ")[-2] for line in lines) == sorted(f"photos/{name}" for name in NAMES[1:])
    page = (here / "near.html").read_text()
    # Pictures come from the shards, which are found by themselves.
    assert page.count("<img") == 4
    assert 'href="photos/trip/c%3Ad.jpg"' in page
    assert "home/e%25f in images-00000 [" in re.sub("<wbr>", "", page)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["out", "kept"])
def test_pages_link_to_the_files_and_a_click_opens_one(name: str, here: Path, browser: Browser) -> None:
    assert search([f"{name}-index", QUERY, "--html", "near.html", "--input", "photos"]) == 0
    pairs = ["--pairs", "pairs.parquet", "--threshold", "0.01"]
    assert duplicates([name, *pairs, "--html", "pairs.html", "--input", "photos"]) == 0
    for page, linked in (("near.html", NAMES[1:]), ("pairs.html", NAMES)):
        for width, scheme in ((1280, "light"), (390, "dark")):
            check_looks(browser, here / page, width, scheme, here / f"{page}-{width}-{scheme}.png")
        found = browser.value("[...document.querySelectorAll('figcaption a')].map(link => link.href)")
        assert set(found) == {(here / "photos" / one).as_uri() for one in linked}
        texts = browser.value("[...document.querySelectorAll('figcaption a')].map(link => link.textContent)")
        assert set(texts) == set(linked)
        browser.click("figcaption a")
        browser.wait("location.href.endsWith('.jpg') && document.readyState === 'complete'")
        assert browser.value("document.images[0].naturalWidth") == 96


def test_what_leads_out_of_the_folder_or_is_gone_is_no_file(made: Path, tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos")
    (tmp_path / "secret.txt").write_text("x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.txt")
    fingerprint = read_fingerprint(str(made / "out"))
    assert fingerprint is not None
    assert fingerprint.photos_folder == str(made / "photos")
    originals = Originals("none", fingerprint, list, folder)
    paths = [
        "../secret.txt",
        str(tmp_path / "secret.txt"),
        "link.jpg",
        "trip",
        "gone.jpg",
        "a\0b",
        "x" * 5000,
        NAMES[1],
    ]
    found = originals.find((path, ("s", row)) for row, path in enumerate(paths))
    assert [found["s", row].file for row in range(len(paths))] == [None] * 7 + [folder / NAMES[1]]
    # An absolute path inside is as good.
    inside = str(folder / NAMES[1])
    assert originals.find([(inside, ("s", 0))]) == {("s", 0): Original(inside, folder / NAMES[1])}


def test_an_output_that_names_no_paths_or_is_gone_has_no_files(made: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", encode(photo(1)))])
    embed(tmp_path / "in", tmp_path / "out")
    assert Originals.of_output(str(tmp_path / "out"), tmp_path).find([("a.jpg", ("s", 0))]) == {}
    shutil.copytree(made / "kept", tmp_path / "kept")
    build(str(tmp_path / "kept"), tmp_path / "index")
    index = open_index(tmp_path / "index")
    row = [("ignored", ("images-00000", 0))]
    assert list(Originals.of_index(index).find(row).values()) == [Original(sorted(NAMES)[0], None)]
    shutil.rmtree(tmp_path / "kept")
    assert Originals.of_index(index, made / "photos").find(row) == {}


def test_an_input_is_shards_or_a_folder_of_images_as_for_the_job(made: Path, tmp_path: Path) -> None:
    assert find_input([]) == Input((), None)
    assert find_input([str(made / "photos")]) == Input((), made / "photos")
    shards = [str(made / "shards")]
    assert find_input(shards) == Input(find_shards(shards).shards, None)
    with pytest.raises(NoShardError):
        find_input([str(tmp_path)])
