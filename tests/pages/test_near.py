"""Pages of neighbours: one design with the report, pictures that can be enlarged, links between pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shard_embedder.pipeline.output.names import PAGE_FILE
from shard_embedder.pipeline.pages.links import Link, links
from shard_embedder.pipeline.pages.near import duplicates_page
from shard_embedder.pipeline.retrieval.duplicates import draw_duplicates, find_duplicates, tags_of
from tests.browser import Browser
from tests.conftest import encode, photo, write_tar
from tests.outputs import embed
from tests.pages.looking import PICTURE, check_looks, read

SIZES = [(1024, 768), (300, 900), (400, 400), (1600, 200)]
MARK = '<meta name="generator" content="shard-embedder {}">'


def draw(folder: Path, threshold: float, page: Path | None = None) -> str:
    """The page of near-duplicates of the output `out` in a folder, with the nearest six of each image."""
    output = str(folder / "out")
    found = find_duplicates(output, folder / "pairs.parquet", threshold)
    drawn = draw_duplicates(folder / "pairs.parquet", 50, 6)
    return duplicates_page(output, found, threshold, drawn, ["a note"], [], tags_of(output).get, page)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of which every image but the last is near all that follow, with images of many shapes."""
    folder = tmp_path_factory.mktemp("near")
    members = [(f"trip/IMG_{seed:04d}.jpg", encode(photo(seed, SIZES[seed % 4]))) for seed in range(12)]
    write_tar(folder / "in" / "camera_roll-00000.tar", members)
    embed(folder / "in", folder / "out")
    page = folder / "pairs.html"
    page.write_text(draw(folder, 0.01, page))
    return page


def test_every_image_is_there_with_its_score_size_and_place(pairs: Path) -> None:
    page = pairs.read_text()
    text = read(page, ())
    assert page.count(f'<figure class="head">{PICTURE}') == 11
    assert page.count(f'<figure class="other">{PICTURE}') == 6 * 6 + 5 + 4 + 3 + 2 + 1 == 51
    assert len(re.findall(r"cosine \d\.\d{4}", text)) == 51
    assert len(re.findall(r"1,600 \N{MULTIPLICATION SIGN} 200 px, \d+\.\d KiB", text)) > 3
    for said in ("pairs 66", "least cosine of a pair 0.01", "embeddings compared 12", "a note", "Random weights"):
        assert said in text


def test_without_a_pair_the_page_says_so(pairs: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", encode(photo(1)))])
    embed(tmp_path / "in", tmp_path / "out")
    assert "No two embeddings are this similar." in read(draw(tmp_path, 0.9))


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_looks_right_in_light_in_dark_and_on_a_phone(
    width: int, scheme: str, pairs: Path, browser: Browser, tmp_path: Path
) -> None:
    check_looks(browser, pairs, width, scheme, tmp_path / "near.png")


@pytest.mark.parametrize("width", [390, 1280, 1900])
def test_the_nearest_fill_the_width_and_no_picture_is_cropped(width: int, pairs: Path, browser: Browser) -> None:
    browser.open(pairs, width=width)
    left, right = browser.value(
        "(() => { const row = [...document.querySelectorAll('.others')].find(row => row.children.length === 6);"
        "const last = Math.max(...[...row.children].map(tile => tile.getBoundingClientRect().right));"
        "const section = row.closest('section').getBoundingClientRect();"
        "return [innerWidth - section.right, section.right - last] })()"
    )
    assert left <= 16
    assert right <= 24
    # The box of each picture is square; in it the picture keeps its shape.
    assert browser.value(
        "[...document.querySelectorAll('.picture')].every(box => Math.abs(box.clientWidth - box.clientHeight) <= 1)"
    )
    assert browser.value("[...document.images].every(i => getComputedStyle(i).objectFit === 'contain')")
    assert browser.value("Math.max(...[...document.images].map(i => i.naturalWidth / i.naturalHeight))") == 8


def test_a_picture_is_enlarged_by_a_click_or_a_key_and_closed_again(pairs: Path, browser: Browser) -> None:
    browser.open(pairs)
    # What lies on top in the middle of the window, its size, and whether a control says how to close it.
    top = (
        "(() => { const image = document.elementFromPoint(innerWidth / 2, innerHeight / 2).closest('img');"
        "const close = [...document.querySelectorAll('.picture .close')].filter(e => e.checkVisibility());"
        "return [image ? image.getBoundingClientRect().height : 0, close.map(e => e.innerText).join()] })()"
    )
    height, close = browser.value(top)
    assert height < 300
    assert close == ""
    browser.click(".picture img")
    height, close = browser.value(top)
    assert height > 600
    assert close == "Close"
    assert browser.call("Page.getLayoutMetrics")["cssContentSize"]["width"] == 1280
    browser.click("[open] .close")
    assert browser.value(top)[1] == ""
    browser.value("document.querySelector('.picture summary').focus()")
    browser.press("Enter")
    assert browser.value(top)[1] == "Close"
    browser.press("Enter")
    assert browser.value(top)[1] == ""


def test_a_page_links_to_those_beside_it_and_to_the_report_of_its_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for path, kind in (("out/report.html", "run"), ("a b#.html", "search"), ("pairs.html", "duplicates")):
        (tmp_path / path).write_text(f"<!doctype html>{MARK.format(kind)}")
    (tmp_path / "other.html").write_text("<!doctype html>somebody else's")
    (tmp_path / "odd.html").write_text(MARK.format("x"))
    page = tmp_path / "pairs.html"
    found = links(page, str(output))
    assert found == [
        Link("Nearest images (a b#.html)", "a%20b%23.html"),
        Link("Run report (out/report.html)", "out/report.html"),
    ]
    assert links(output / PAGE_FILE, str(output)) == []
    assert links(tmp_path / "a b#.html", "s3://bucket/out") == [Link("Near-duplicates (pairs.html)", "pairs.html")]
    assert links(None, str(output)) == []


def test_links_stand_in_the_page_and_a_page_knows_its_own_kind(pairs: Path, browser: Browser) -> None:
    beside = pairs.with_name("again.html")
    try:
        beside.write_text(draw(pairs.parent, 0.01, beside))
        assert "Near-duplicates (pairs.html)" in read(beside.read_text(), ("pairs.html",))
        browser.open(beside)
        browser.click("nav a")
        browser.wait("location.href.endsWith('/pairs.html') && document.readyState === 'complete'")
    finally:
        beside.unlink()
