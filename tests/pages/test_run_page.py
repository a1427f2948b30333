"""The page of a run: what it says, that nothing in it can act, and how it looks in a browser."""

from __future__ import annotations

import io
import itertools
import json
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shard_embedder.jobs.support.console import Console
from shard_embedder.jobs.support.console_json import JsonConsole
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.formatting import format_duration
from shard_embedder.pipeline.core.schema import STAGES
from shard_embedder.pipeline.output.ledger import Counts
from shard_embedder.pipeline.pages.charts import axis
from shard_embedder.pipeline.pages.run_page import MAX_REASONS, draw_page, write_page
from shard_embedder.pipeline.pages.speed import make_bins, spread
from shard_embedder.pipeline.planning.job import prepare_job
from shard_embedder.pipeline.planning.plan import make_plan
from shard_embedder.pipeline.run.passes import run
from shard_embedder.pipeline.run.report import make_report
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.keys import Naming
from tests.browser import Browser
from tests.conftest import encode, photo, sample_members, write_shards, write_tar
from tests.outputs import IN_PROCESS, UNHEARD, embed
from tests.pages.looking import PICTURE, check_layout, check_looks, read

_SETTINGS = {"backbone": "squeezenet1_1", "weights": "random:0", "image_size": "64", "precision": "fp32"}
_HOSTILE = (
    "</style><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[2J\u202e\ud800" + "\U0001f40d" * 10_000
)


class Ran(NamedTuple):
    """A run's report and the shards of its input."""

    report: dict[str, Any]
    shards: dict[str, Shard]

    @property
    def page(self) -> str:
        return draw_page(self.report, self.shards, set(self.shards), Naming())


def ran(folder: Path | str, output: Path | str, **settings: Any) -> Ran:
    """Run the job in this process."""
    config = parse({**_SETTINGS, "part_rows": 3, "input": [str(folder)], "output": str(output), **settings})
    job = prepare_job(config)
    report = run(job, make_plan(job.shards, job.config.output), UNHEARD, IN_PROCESS)
    return Ran(report, {shard.name: shard for shard in job.shards})


def done(folder: Path | str, output: Path | str, **settings: Any) -> Ran:
    """A run that finds everything done."""
    embed(folder, output, **settings)
    return ran(folder, output, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A real run with errors and a broken shard: its folder, and what came of it."""
    folder = tmp_path_factory.mktemp("page")
    shards = write_shards(folder / "in", num_shards=4, samples_each=12)
    write_tar(
        shards / "bad.tar", [("a.jpg", b"no image"), ("b.jpg", encode(photo(1))[:600]), ("c.jpg", encode(photo(2)))]
    )
    cut = shards / "photos-00003.tar"
    cut.write_bytes(cut.read_bytes()[:30_000])
    found = ran(shards, folder / "out", price_per_hour=2.5)
    write_page(found.report, found.shards.values(), set(found.shards), Naming())
    return folder, found


def test_the_page_says_what_ran_how_fast_and_what_went_wrong(whole: tuple[Path, Ran]) -> None:
    folder, (report, _) = whole
    text = read((folder / "out" / "report.html").read_text())
    stored = json.loads((folder / "out" / "report.json").read_text())
    assert stored == report
    for key in ("run", "backbone", "precision", "engine", "device", "output", "fingerprint"):
        assert str(report[key]) in text, key
    assert 0 < report["start_s"] < report["first_part_s"] < report["wall_s"]
    assert f"started in {format_duration(report['start_s'])}" in text
    assert report["images_per_s"] == pytest.approx(report["embedded_now"] / report["work_s"], rel=0.01)
    assert "device-hours" not in text, "it did not work for a minute"
    slowest = report["slowest_stage"]
    assert f"{slowest.capitalize()} was the slowest stage: its workers were busy" in text
    assert "Incomplete shards Exit code 3: 1 of 5 shards is incomplete. Replace photos-00003.tar and run" in text
    assert f"photos-00003: {report['broken_shards']['photos-00003']}" in text
    assert report["errors_by_reason"]
    for reason, count in report["errors_by_reason"].items():
        assert f"{reason} {count}" in text
        assert report["error_examples"][reason] in text
    page = (folder / "out" / "report.html").read_text()
    assert page.count('<div class="near">') == 6
    assert page.count(f'<figure class="other">{PICTURE}') == 6 * 5
    assert len(re.findall(r"cosine \d\.\d{3}", text)) == 6 * 5
    assert "no preview" not in text


def test_errors_come_first_by_reason_and_by_shard_then_speed_then_facts(whole: tuple[Path, Ran]) -> None:
    report = whole[1].report
    page = whole[1].page
    assert re.findall("<h2>(.*?)</h2>", page) == ["Errors and broken shards", "Speed", "What ran", "The embeddings"]
    titles = [re.sub(r" \(.*", "", title) for title in re.findall("<h3>(.*?)</h3>", page)]
    assert titles[:3] == ["Errors by reason", "Errors by shard", "Broken shards"]
    assert report["errors_by_shard"]["bad"] == {"errors": 2, "samples": 3, "share": 0.6667}
    assert "bad 2 3 67 %" in read(page)


def test_the_console_has_the_shards_with_the_most_errors(
    whole: tuple[Path, Ran], capsys: pytest.CaptureFixture[str]
) -> None:
    report = whole[1].report
    Console().summary(report)
    told = capsys.readouterr().out
    assert "errors by shard\n  bad: 2 of 3 samples (67 %)\n" in told
    assert re.search(r"speed +started in [\w. ]+ s, then [\d.,]+ images/s\n", told)
    assert "million images" not in told
    many = {f"s{number}": {"errors": 1, "samples": 2_000, "share": 0.0005} for number in range(10)}
    Console().summary({**report, "errors_by_shard": many})
    told = capsys.readouterr().out
    assert "errors by shard, the 10 with the most\n  s0: 1 of 2,000 samples (under 1 %)\n" in told


def test_random_weights_are_marked(whole: tuple[Path, Ran]) -> None:
    report, shards = whole[1]
    mark = "Random weights The backbone is not trained"
    assert mark in read(draw_page(report, shards, set(), None))
    assert mark not in read(draw_page({**report, "weights": "DEFAULT"}, shards, set(), None))


def test_the_timeline_of_the_report_is_that_of_the_run(whole: tuple[Path, Ran]) -> None:
    report = whole[1].report
    assert sum(report["timeline"]["images"]) == report["embedded_now"] > 0
    for stage, seconds in report["stage_s"].items():
        assert sum(report["timeline"]["busy_s"][stage]) == pytest.approx(seconds, abs=0.05)
    bins = make_bins(report)
    drawn = sum(
        rate * (high - low)
        for rate, (low, high) in zip(bins.images_per_s, itertools.pairwise(bins.edges), strict=True)
    )
    assert drawn == pytest.approx(report["embedded_now"])
    assert bins.edges[-1] >= report["wall_s"]


def test_a_part_is_spread_over_the_time_since_the_one_before() -> None:
    assert spread([0, 0, 6, 4, 0, 8, 0], 9) == [2, 2, 2, 4, 4, 4, 0]
    assert spread([], 1) == []


def test_the_first_part_is_spread_over_no_more_than_it_took() -> None:
    assert spread([0, 0, 0, 6, 0, 8], 2) == [0, 0, 3, 3, 4, 4]
    busy_s = {stage: [0.0] * 39 + [1.0] for stage in STAGES}
    report = {
        "timeline": {"step_s": 0.5, "images": [0] * 39 + [100], "busy_s": busy_s},
        "wall_s": 20.0,
        "stage_workers": {},
    }
    bins = make_bins(report)
    begun = next(edge for edge, rate in zip(bins.edges, bins.images_per_s, strict=False) if rate)
    assert begun == 16.0


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1e-3), (0, 7), (18.9, 37.7), (-0.61, 0.58), (0, 987_654), (1e6, 1e6 + 3)]
)
def test_ticks_are_round_and_hold_what_is_shown(low: float, high: float) -> None:
    found = axis("x", low, high)
    assert found.low <= low < high <= found.high
    step = found.ticks[1] - found.ticks[0]
    assert 2 <= len(found.ticks) <= 8
    assert f"{step:.0e}"[0] in "125"
    assert step == pytest.approx(float(f"{step:.0e}"), rel=1e-6)


def test_a_run_with_nothing_to_do_shows_what_is_stored(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", num_shards=2, samples_each=5)
    text = read(done(tmp_path / "in", tmp_path / "out").page)
    assert "Nothing to do Exit code 0: nothing to do: all 2 shards had been embedded before." in text
    assert "10 embeddings from the fronts of 4 parts" in text
    assert "Throughput" not in text
    assert "cosine 0." in text


def test_errors_that_an_earlier_run_stored_are_told_and_their_reasons_are_not_claimed_to_be_known(
    tmp_path: Path,
) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    report, shards = done(tmp_path / "in", tmp_path / "out")

    def told(errors: int, reasons: dict[str, int]) -> str:
        return read(draw_page({**report, "errors": errors, "errors_by_reason": reasons}, shards, set(), Naming()))

    assert "No errors: no sample was read" in told(0, {})
    before = told(3, {})
    assert "3 errors, stored before this run, with the reasons in errors/" in before
    assert "No errors" not in before
    assert "reasons are of what this run stored; 5 samples of its shards failed in all" in told(5, {"empty": 2})
    assert "reasons are of" not in told(2, {"empty": 2})


def test_imbalances_that_are_not_listed_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "in", num_shards=1, samples_each=2)
    job = prepare_job(embed(tmp_path / "in", tmp_path / "out"))
    counts = Counts(faults=[f"s{number}: part 0 is missing" for number in range(150)])
    report = make_report(Tally(), counts, job, make_plan(job.shards, job.config.output), [], {})
    text = read(draw_page(report, {}, set(), Naming()))
    assert "150 disagreements in what is stored." in text
    assert "And 50 more, which are not listed." in text
    Console().summary(report)
    assert "IMBALANCE and 50 more, which are not listed\n" in capsys.readouterr().out
    JsonConsole().summary(report)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["num_imbalances"] == 150


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_outputs_of_hardly_any_rows_have_a_page(num_images: int, tmp_path: Path) -> None:
    members = [member for seed in range(num_images) for member in sample_members(f"k{seed}", seed)]
    write_tar(tmp_path / "in" / "s.tar", members)
    page = done(tmp_path / "in", tmp_path / "out").page
    text = read(page)
    assert f"{num_images} embedding" in text
    assert page.count('<div class="near">') == (2 if num_images == 2 else 0)


def test_equal_images_have_no_map_and_maps_in_halves_have_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "same" / "s.tar", [(f"{key}.jpg", encode(photo(1))) for key in range(8)])
    text = read(done(tmp_path / "same", tmp_path / "one").page)
    assert "All embeddings of the sample are equal: there is no map." in text
    assert "All 8 have length" in text
    assert text.count("cosine 1.000") == 6 * 5
    write_shards(tmp_path / "in", num_shards=1, samples_each=8)
    settings = {"features": "map", "dtype": "float16"}
    text = read(done(tmp_path / "in", tmp_path / "maps", **settings).page)
    assert "Feature maps are averaged over their grid here." in text
    assert "of the variance lies in this plane" in text


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path, whole: tuple[Path, Ran]) -> None:
    path = tmp_path / "in" / "s.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for seed, key in enumerate(
            ("<script>alert(1)<", "\x1b[2J\u202ex", "k" * 10_000, '" onload="x', "a&b;", "e", "f")
        ):
            data = encode(photo(seed))
            info = tarfile.TarInfo(f"{key}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = done(tmp_path / "in", tmp_path / "out")
    text = read(found.page)
    assert "<script>alert(1)<" in text
    assert "kkkk" in text
    assert "k" * 400 not in text
    many = {f"reason {number} {_HOSTILE if number < 3 else ''}": 10_000 - number for number in range(10_000)}
    report = {
        **whole[1].report,
        "errors_by_reason": many,
        "error_examples": dict.fromkeys(many, _HOSTILE),
        "broken_shards": {f"{number}{_HOSTILE}": _HOSTILE for number in range(100)},
        "missing_shards": [_HOSTILE] * 100,
        "problems": [_HOSTILE],
        "imbalances": ["x"],
        "num_imbalances": 1,
        "backbone": _HOSTILE,
        "input": [_HOSTILE] * 1000,
    }
    page = draw_page(report, whole[1].shards, set(whole[1].shards), Naming())
    text = read(page)
    assert page.encode()
    assert f"{10_000 - MAX_REASONS:,} more kinds of reason" in text
    assert "and 995 more" not in text, "long inputs are cut as a whole"
    assert len(page) < 2_000_000


def test_every_text_of_a_report_may_be_hostile(whole: tuple[Path, Ran]) -> None:
    def hostile(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hostile(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [hostile(inner) for inner in value]
        return _HOSTILE if isinstance(value, str) else value

    report, shards = whole[1]
    texts = {key: hostile(value) for key, value in report.items()}
    assert list(texts.values()).count(_HOSTILE) > 10
    # What is looked up, and not only shown.
    kept = {key: report[key] for key in ("slowest_stage", "output")}
    page = draw_page({**texts, **kept}, shards, set(), None)
    assert read(page).count("<script>alert(1)</script>") > 10
    assert max(len(text) for text in re.findall("\U0001f40d+", page)) <= 300


def test_a_shard_that_is_gone_or_another_now_costs_its_pictures_alone(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, samples_each=6)
    found = done(shards, tmp_path / "out")
    (shards / "photos-00000.tar").unlink()
    page = found.page
    text = read(page)
    assert "no pictures of shard photos-00000: FileNotFoundError" in text
    assert "among the 6 of this sample whose images were read" in text
    assert page.count(f'<figure class="other">{PICTURE}') == 6 * 5
    write_tar(shards / "photos-00001.tar", sample_members("other", 77))
    page = found.page
    text = read(page)
    assert "<img" not in page
    assert "no pictures of shard photos-00001: ShardError: it has changed since it was embedded" in text
    assert "cosine" in text


def test_a_store_that_fails_costs_one_section_with_its_reason(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=1)
    found = done(shards, tmp_path / "out")
    for path in (tmp_path / "out" / "embeddings").iterdir():
        path.write_bytes(b"")
    text = read(found.page)
    assert "0 embeddings from the fronts of 0 parts" in text
    assert "What ran" in text
    lost = draw_page({**found.report, "output": "nowhere://none/out"}, found.shards, set(found.shards), Naming())
    assert "This could not be drawn: " in lost
    assert "Nothing to do" in lost


def test_shards_that_the_run_did_not_open_are_not_opened_for_pictures(tmp_path: Path) -> None:
    found = done(write_shards(tmp_path / "in", num_shards=3, samples_each=7), tmp_path / "out")
    for name in ("photos-00000", "photos-00002"):
        (tmp_path / "in" / f"{name}.tar").unlink()
    page = draw_page(found.report, found.shards, {"photos-00001"}, Naming())
    read(page)
    assert "no pictures of shard" not in page
    assert page.count(f'<figure class="head">{PICTURE}') == 6
    nothing = draw_page(found.report, found.shards, set(), None)
    assert "this one opened none" in nothing
    assert "data:image/jpeg" not in nothing


@pytest.mark.slow
def test_pictures_are_read_from_object_storage_too(tmp_path: Path, s3_url: str, s3_server: Any) -> None:
    write_shards(tmp_path / "in", num_shards=2, samples_each=6)
    s3_server.filesystem().put(str(tmp_path / "in"), f"{s3_url}/in", recursive=True)
    found = done(f"{s3_url}/in", f"{s3_url}/out")
    write_page(found.report, found.shards.values(), set(found.shards), Naming())
    page = s3_server.filesystem().cat(f"{s3_url}/out/report.html").decode()
    read(page)
    assert page.count(f'<figure class="other">{PICTURE}') == 6 * 5


# How far pictures of the map, each chosen in turn, reach out of the window.
_REACH = """
(() => {
  let most = 0;
  for (const input of document.querySelectorAll('.pt input')) {
    input.checked = true;
    const box = input.nextElementSibling.getBoundingClientRect();
    if (box.width === 0) return 'a picture stays hidden';
    most = Math.max(most, -box.left, box.right - innerWidth);
  }
  document.querySelector('.hide input').checked = true;
  return most;
})()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "width", "scheme"), [
    ("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 390, "light"), ("phone-dark", 390, "dark"),
])  # fmt: skip
def test_it_looks_right_in_light_in_dark_and_on_a_phone(
    name: str, width: int, scheme: str, whole: tuple[Path, Ran], browser: Browser, tmp_path: Path
) -> None:
    check_looks(browser, whole[0] / "out" / "report.html", width, scheme, tmp_path / f"{name}.png")
    assert browser.value(_REACH) <= 0
    narrowest = browser.value("Math.min(...[...document.querySelectorAll('.facts dd')].map(e => e.clientWidth))")
    assert narrowest > width / 2, "paths and hashes have room"


@pytest.mark.slow
def test_hostile_text_makes_no_page_wider(whole: tuple[Path, Ran], browser: Browser, tmp_path: Path) -> None:
    wide = "W" * 5000
    changes = {"backbone": wide, "weights": wide, "output": wide, "problems": [wide], "errors_by_reason": {wide: 9}}
    (tmp_path / "wide.html").write_text(
        draw_page({**whole[1].report, **changes, "error_examples": {wide: wide}}, {}, set(), Naming())
    )
    for width in (390, 1280):
        browser.open(tmp_path / "wide.html", width=width)
        check_layout(browser, width)


def test_a_point_of_the_map_shows_its_picture_when_pointed_at_and_by_keyboard(
    whole: tuple[Path, Ran], browser: Browser
) -> None:
    browser.open(whole[0] / "out" / "report.html")
    shown = "[...document.querySelectorAll('.pt .tip')].filter(t => t.checkVisibility()).map(t => t.textContent)"
    assert browser.value(shown) == []
    x, y, id = browser.value(
        "(() => { const p = [...document.querySelectorAll('.pt')].at(-1); p.scrollIntoView({block: 'center'});"
        "const b = p.getBoundingClientRect();"
        "return [b.x + b.width / 2, b.y + b.height / 2, p.querySelector('input').ariaLabel] })()"
    )
    browser.move_to(x, y)
    (text,) = browser.value(shown)
    assert text.startswith(id)
    browser.move_to(1, 1)
    assert browser.value(shown) == []
    browser.value("document.querySelector('.hide input').focus()")
    browser.press("ArrowRight")
    first = browser.value(shown)
    browser.press("ArrowRight")
    assert len(first) == len(browser.value(shown)) == 1
    assert browser.value(shown) != first


def test_a_chosen_card_of_the_map_stays_and_closes_by_its_button(whole: tuple[Path, Ran], browser: Browser) -> None:
    browser.open(whole[0] / "out" / "report.html")
    shown = "[...document.querySelectorAll('.pt .tip')].filter(t => t.checkVisibility()).length"
    browser.click(".area > .pt:last-child")
    browser.move_to(1, 1)
    assert browser.value(shown) == 1
    button = browser.value("[...document.querySelectorAll('.pt .close')].find(e => e.checkVisibility()).innerText")
    assert button == "Close"
    browser.click(".pt .close")
    browser.move_to(1, 1)
    assert browser.value(shown) == 0
