"""An index holds what the output holds, finds what an exact search finds, and is never stale or half written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_embedder.jobs.index import main
from shard_embedder.pipeline.core.config import Config, parse
from shard_embedder.pipeline.core.errors import OutputBusyError, OutputError, SettingsError
from shard_embedder.pipeline.core.schema import (
    EMBEDDING,
    END_LAST,
    END_NONE,
    STAGES,
    embedding_field,
    part_row,
    sample_type,
)
from shard_embedder.pipeline.output.fingerprint import read_fingerprint, write_fingerprint
from shard_embedder.pipeline.output.names import RUN_FILE
from shard_embedder.pipeline.output.parts import PartWriter, vectors
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import ROWS_FILE, open_index, read_index_facts
from shard_embedder.pipeline.retrieval.kinds import FLAT_ROWS, KINDS, METRICS, choose_kind, num_lists
from tests.conftest import ROOT, SmallDisk, sample_members, write_shards, write_tar
from tests.output.test_fingerprint import made as fingerprint
from tests.outputs import embed

faiss = pytest.importorskip("faiss", reason="the extra `index` is not installed")

Vectors = np.ndarray[Any, np.dtype[np.float32]]


def clusters(num_rows: int, num_features: int = 24, seed: int = 0) -> Vectors:
    """Embeddings [N, C] that lie around 40 centres, as real ones do, of lengths from 1 to 3."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((40, num_features))
    values = centres[rng.integers(0, 40, num_rows)] + 0.5 * rng.standard_normal((num_rows, num_features))
    values *= rng.uniform(1, 3, (num_rows, 1)) / np.linalg.norm(values, axis=1, keepdims=True)
    return values.astype(np.float32)


def store(output: Path, shard: str, values: Vectors, part_rows: int = 500) -> None:
    """The parts of one shard with chosen embeddings [N, C], as the job writes them."""
    config: Config = parse({"input": "in", "output": str(output), "part_rows": part_rows})
    shape = (values.shape[1],)
    made = replace(fingerprint(), settings=replace(fingerprint().settings, embedding_shape=shape))
    write_fingerprint(str(output), made)
    writer = PartWriter(config, made, shape)
    field = embedding_field(shape, "float32")
    kind = sample_type(field, ())
    for part, start in enumerate(range(0, len(values), part_rows)):
        some = values[start : start + part_rows]
        column = pa.FixedSizeListArray.from_arrays(pa.array(some.reshape(-1)), type=field.type)
        numbers = range(start, start + len(some))
        names = pa.array([f"{shard}-{number:06d}" for number in numbers])
        empty = pa.nulls(len(some), pa.string())
        columns = [pa.array(numbers, pa.int32()), names, empty, empty, empty, column]
        samples = pa.StructArray.from_arrays(columns, fields=list(kind))
        facts = {"name": shard, "url": f"{shard}.tar", "num_bytes": 1, "version": "1", "part": part}
        facts |= {"first_index": start, "num_samples": len(some), "fault": None, "fault_transient": False}
        facts |= {"end": END_LAST if start + part_rows >= len(values) else END_NONE, "ignored_members": 0}
        facts |= {"unused_images": 0, "unused_example": None, "apart_samples": 0, "kept": []}
        facts |= {"device_refused": 0, "device_refusal": None}
        facts |= {"kept_nulls": 0, "read_bytes": 0, "batch_size": 1, **{f"{stage}_s": 0.0 for stage in STAGES}}
        writer(part_row(facts, samples))


def true_neighbours(values: Vectors, queries: Vectors, metric: str, count: int) -> np.ndarray[Any, Any]:
    """The numbers of the nearest rows, in float64: [Q, count]."""
    wide, asked = values.astype(np.float64), queries.astype(np.float64)
    scores = -np.linalg.norm(asked[:, None] - wide[None], axis=2) if metric == "l2" else asked @ wide.T
    if metric == "cosine":
        scores /= np.linalg.norm(wide, axis=1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("index") / "in", num_shards=2)


@pytest.fixture(scope="module")
def embedded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output that the stages made of real shards: 14 images in two shards of three parts each."""
    output = tmp_path_factory.mktemp("embedded") / "out"
    embed(shards, output)
    return output


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vectors]:
    """An output of 3000 chosen embeddings in two shards, and these."""
    output = tmp_path_factory.mktemp("chosen") / "out"
    values = clusters(3000)
    store(output, "a", values[:1800])
    store(output, "b", values[1800:])
    return output, values


def numbers(index: Path, values: Vectors, count: int) -> list[list[int]]:
    """What a search of an index of `chosen` finds, as numbers of the chosen embeddings."""
    found = open_index(index).search(values, count)
    first = {"a": 0, "b": 1800, "c": 3000}
    return [[first[near.shard] + near.sample_index for near in row] for row in found]


def test_every_embedding_of_an_output_finds_itself_under_its_own_id(embedded: Path, tmp_path: Path) -> None:
    built = build(str(embedded), tmp_path / "index")
    assert (built.facts.kind, built.facts.metric, built.facts.num_rows) == ("flat", "cosine", 14)
    table = pq.read_table(embedded / "embeddings")
    found = open_index(tmp_path / "index").search(vectors(table).astype(np.float32), 3)
    for row, (nearest, *_) in zip(table.drop_columns(EMBEDDING).to_pylist(), found, strict=True):
        assert {key: getattr(nearest, key) for key in row} == row
        assert nearest.score == pytest.approx(1.0, abs=1e-5)
    assert all([near.score for near in row] == sorted((near.score for near in row), reverse=True) for row in found)
    rows = pq.read_table(tmp_path / "index" / built.facts.data / ROWS_FILE)
    assert rows["row"].to_pylist() == list(range(14))
    assert rows.drop_columns("row").sort_by("image_id") == table.drop_columns(EMBEDDING).sort_by("image_id")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_what_an_exact_search_finds(
    kind: str, metric: str, chosen: tuple[Path, Vectors], tmp_path: Path
) -> None:
    output, values = chosen
    built = build(str(output), tmp_path / "index", Options(metric, kind))
    assert (built.facts.kind, built.facts.metric) == (kind, metric)
    assert built.facts.recall >= 0.95
    queries = clusters(200, seed=5)
    expected = true_neighbours(values, queries, metric, 10)
    found = numbers(tmp_path / "index", queries, 10)
    share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, expected.tolist(), strict=True)])
    assert (share == 1.0) if kind == "flat" else share >= 0.9
    assert abs(share - built.facts.recall) < 0.08


def test_scores_are_what_the_metric_says(chosen: tuple[Path, Vectors], tmp_path: Path) -> None:
    output, values = chosen
    query = clusters(1, seed=8)
    for metric in METRICS:
        build(str(output), tmp_path / metric, Options(metric))
        (found,) = open_index(tmp_path / metric).search(query, 5)
        for near in found:
            row = values[near.sample_index + (1800 if near.shard == "b" else 0)].astype(np.float64)
            product, lengths = float(query[0] @ row), np.linalg.norm(query) * np.linalg.norm(row)
            expected = {"cosine": product / lengths, "ip": product, "l2": np.linalg.norm(query[0] - row)}[metric]
            assert near.score == pytest.approx(expected, abs=1e-4)


def test_a_search_too_narrow_is_widened_until_it_finds_enough(tmp_path: Path) -> None:
    """Embeddings without any clusters are the hardest for lists: eight of them do not find enough."""
    values = np.random.default_rng(0).standard_normal((4000, 48)).astype(np.float32)
    store(tmp_path / "out", "a", values)
    facts = build(str(tmp_path / "out"), tmp_path / "index", Options(kind="ivf")).facts
    assert facts.lists > 32
    assert facts.width > 8
    assert facts.recall >= 0.95


def test_the_rule_chooses_by_rows_and_memory() -> None:
    gib = 2**30
    assert choose_kind(FLAT_ROWS, 2048, 4 * gib) == "flat"
    assert choose_kind(FLAT_ROWS + 1, 2048, 4 * gib) == "hnsw"
    assert choose_kind(1_000_000, 512, 4 * gib) == "hnsw"
    assert choose_kind(1_000_000, 2048, 4 * gib) == "ivf"
    assert choose_kind(1000, 25088, 2**20) == "ivf"
    assert num_lists(10, 512, gib) == 1
    assert num_lists(10_000, 512, gib) == 156
    assert num_lists(10_000_000, 512, 8 * gib) == 12649


# What is new, gone and changed.


def test_without_anything_new_nothing_is_done(chosen: tuple[Path, Vectors], tmp_path: Path) -> None:
    output, _ = chosen
    first = build(str(output), tmp_path / "index")
    again = build(str(output), tmp_path / "index")
    assert (first.num_added, again.num_added, again.rebuilt) == (3000, 0, "")
    assert again.facts == first.facts


@pytest.mark.parametrize("kind", KINDS)
def test_new_parts_are_added_and_the_rest_is_kept(kind: str, tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3600)
    store(output, "b", values[1800:3000])
    build(str(output), tmp_path / "index", Options(kind=kind))
    store(output, "a", values[:1800])
    store(output, "c", values[3000:])
    built = build(str(output), tmp_path / "index")
    assert (built.facts.kind, built.facts.num_rows, built.num_added, built.rebuilt) == (kind, 3600, 2400, "")
    assert built.facts.recall >= 0.95
    found = numbers(tmp_path / "index", values, 1)
    assert np.mean([row == [number] for number, row in enumerate(found)]) >= (1.0 if kind == "flat" else 0.98)
    folders = [path.name for path in (tmp_path / "index").iterdir() if path.is_dir()]
    assert folders == [built.facts.data]


def test_a_part_that_is_gone_means_an_index_built_anew(tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3000)
    store(output, "a", values[:1800])
    store(output, "b", values[1800:])
    build(str(output), tmp_path / "index")
    for path in (output / "embeddings").glob("a.*"):
        path.unlink()
    built = build(str(output), tmp_path / "index")
    assert built.rebuilt.startswith("of the parts in the index, 4 have gone, such as a.")
    assert built.facts.num_rows == 1200
    assert {near.shard for (near,) in open_index(tmp_path / "index").search(values, 1)} == {"b"}


def test_a_part_of_other_content_means_an_index_built_anew_and_a_touched_one_does_not(tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(1000)
    store(output, "a", values)
    build(str(output), tmp_path / "index")
    for path in (output / "embeddings").iterdir():
        os.utime(path, (1, 1))
    assert build(str(output), tmp_path / "index").num_added == 0
    values[700] += 1
    store(output, "a", values)
    built = build(str(output), tmp_path / "index")
    assert built.rebuilt.startswith("of the parts in the index, 1 have changed, such as a.")
    ((near,),) = open_index(tmp_path / "index").search(values[700:701], 1)
    assert (near.sample_index, near.score) == (700, pytest.approx(1.0, abs=1e-5))


def test_an_index_that_outgrows_its_kind_is_built_anew(tmp_path: Path) -> None:
    values = clusters(8000, 64)
    store(tmp_path / "out", "a", values[:3000])
    small = Options(memory_bytes=2**20)
    assert build(str(tmp_path / "out"), tmp_path / "index", small).facts.kind == "flat"
    store(tmp_path / "out", "b", values[3000:])
    built = build(str(tmp_path / "out"), tmp_path / "index", small)
    assert built.rebuilt == "it was flat, and is ivf for 8000 rows"
    assert built.facts.recall >= 0.95


def test_lists_laid_out_for_far_fewer_rows_are_laid_out_anew(tmp_path: Path) -> None:
    values = clusters(3000)
    store(tmp_path / "out", "a", values[:500])
    assert build(str(tmp_path / "out"), tmp_path / "index", Options(kind="ivf")).facts.lists == 7
    store(tmp_path / "out", "b", values[500:])
    built = build(str(tmp_path / "out"), tmp_path / "index")
    assert built.rebuilt == "its lists were laid out for 500 rows, and it has 3000 now"
    assert built.facts.lists == 46


def test_a_shard_that_is_not_whole_is_indexed_as_far_as_it_is_and_told(embedded: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(embedded, tmp_path / "out"))
    (last,) = output.glob("embeddings/photos-00001.*-last.parquet")
    last.unlink()
    built = build(str(output), tmp_path / "index")
    assert built.facts.num_rows == 13
    assert built.notes == ["1 shard not whole yet, such as 'photos-00001': what is stored there is indexed"]


# What is refused.


def test_an_index_of_other_settings_is_refused_and_the_difference_named(
    embedded: Path, shards: Path, tmp_path: Path
) -> None:
    build(str(embedded), tmp_path / "index")
    before = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    embed(shards, tmp_path / "other", normalize=True)
    with pytest.raises(OutputError, match="normalize: index false, output true"):
        build(str(tmp_path / "other"), tmp_path / "index")
    assert {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()} == before


def test_another_metric_feature_maps_strange_folders_and_two_versions_are_refused(
    embedded: Path, shards: Path, tmp_path: Path
) -> None:
    build(str(embedded), tmp_path / "index")
    with pytest.raises(SettingsError, match="has metric cosine, asked for l2"):
        build(str(embedded), tmp_path / "index", Options("l2"))
    embed(shards, tmp_path / "map", features="map")
    with pytest.raises(OutputError, match=r"only pooled features \[C\] can be compared"):
        build(str(tmp_path / "map"), tmp_path / "other")
    with pytest.raises(OutputError, match=r"is not empty and no index: it has 'photos-00000\.tar'"):
        build(str(embedded), shards)
    with pytest.raises(OutputError, match=r"nowhere is not an output"):
        build(str(tmp_path / "nowhere"), tmp_path / "other")
    with pytest.raises(SettingsError, match="kind must be one of flat, hnsw, ivf, got 'tree'"):
        Options(kind="tree")
    own = Path(shutil.copytree(shards, tmp_path / "own"))
    embed(own, tmp_path / "twice")
    write_tar(own / "photos-00001.tar", sample_members("x", 1))
    embed(own, tmp_path / "twice")
    with pytest.raises(OutputError, match="1 shard stored in two versions, such as 'photos-00001'"):
        build(str(tmp_path / "twice"), tmp_path / "other")


def test_parts_of_other_settings_and_parts_that_are_cut_are_refused(embedded: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(embedded, tmp_path / "out"))
    made = read_fingerprint(str(output))
    assert made is not None
    (output / RUN_FILE).unlink()
    write_fingerprint(str(output), replace(made, settings=replace(made.settings, precision="bf16")))
    with pytest.raises(OutputError, match=r"was made with other settings than run\.json"):
        build(str(output), tmp_path / "index")
    (output / RUN_FILE).unlink()
    write_fingerprint(str(output), made)
    path = next((output / "embeddings").iterdir())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(OutputError, match="is not whole Parquet"):
        build(str(output), tmp_path / "index")
    assert not (tmp_path / "index" / "index.json").exists()


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.parquet", "parts.parquet", "lists.ivfdata"])
def test_an_index_with_a_file_of_another_size_is_refused_and_the_next_build_makes_it_anew(
    name: str, chosen: tuple[Path, Vectors], tmp_path: Path
) -> None:
    output, values = chosen
    facts = build(str(output), tmp_path / "index", Options(kind="ivf")).facts
    path = tmp_path / "index" / facts.data / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OutputError, match=rf"{name} must have \d+ bytes, it has \d+; remove the folder"):
        open_index(tmp_path / "index")
    built = build(str(output), tmp_path / "index")
    assert re.search(rf"{name} must have \d+ bytes, it has \d+", built.rebuilt)
    assert (built.facts.kind, built.num_added) == ("ivf", 3000)
    (tmp_path / "index" / built.facts.data / name).unlink()
    assert build(str(output), tmp_path / "index").rebuilt.endswith("it is missing")
    assert np.mean([row == [number] for number, row in enumerate(numbers(tmp_path / "index", values, 1))]) > 0.98


def garble(path: Path, start: int, data: bytes = b"\xff" * 64) -> None:
    """Overwrite some bytes of a file, which keeps its size."""
    whole = path.read_bytes()
    start %= len(whole)
    path.write_bytes(whole[:start] + data + whole[start + len(data) :])


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.parquet", "parts.parquet", "lists.ivfdata"])
def test_nothing_is_added_to_an_index_whose_bytes_have_changed_but_it_is_made_anew(name: str, tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3000)
    store(output, "a", values[:1800])
    facts = build(str(output), tmp_path / "index", Options(kind="ivf")).facts
    garble(tmp_path / "index" / facts.data / name, 500)
    store(output, "b", values[1800:])
    built = build(str(output), tmp_path / "index")
    assert built.rebuilt.endswith(f"{name} has changed since it was written")
    assert (built.facts.num_rows, built.num_added) == (3000, 3000)
    assert np.mean([row == [number] for number, row in enumerate(numbers(tmp_path / "index", values, 1))]) > 0.98


INFINITE = np.float32(np.inf).tobytes()


@pytest.mark.parametrize(
    ("kind", "name", "start", "data", "message"),
    [
        ("ivf", "vectors.faiss", 500, bytes(64), "vectors.faiss has changed since it was written"),
        ("flat", "rows.parquet", 64, bytes(64), "rows.parquet has changed since it was written"),
        ("flat", "parts.parquet", 4, bytes(64), "parts.parquet has changed since it was written"),
        ("hnsw", "vectors.faiss", 0, bytes(64), "vectors.faiss is not a FAISS index: "),
        ("flat", "vectors.faiss", -4, INFINITE, "data-00000 gives rows or scores that cannot be: it is damaged"),
        ("ivf", "lists.ivfdata", -8, b"\x7f" * 8, "data-00000 gives rows or scores that cannot be: it is damaged"),
    ],
    ids=range(6),
)
def test_a_search_of_a_damaged_index_names_the_file_and_says_what_to_do(
    kind: str, name: str, start: int, data: bytes, message: str, tmp_path: Path
) -> None:
    values = clusters(50)
    store(tmp_path / "out", "a", values)
    facts = build(str(tmp_path / "out"), tmp_path / "index", Options("ip", kind)).facts
    garble(tmp_path / "index" / facts.data / name, start, data)
    with pytest.raises(OutputError, match=f"{message}.*; remove the folder of the index, and build the index again"):
        open_index(tmp_path / "index").search(values, 50)


def test_an_index_json_changed_by_hand_is_refused(embedded: Path, tmp_path: Path) -> None:
    build(str(embedded), tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    path.write_text(path.read_text().replace("squeezenet1_1", "resnet18"))
    with pytest.raises(OutputError, match="was changed by hand"):
        open_index(tmp_path / "index")


# Where it lies, and what it survives.


def test_an_index_may_be_moved_and_needs_no_right_to_write(chosen: tuple[Path, Vectors], tmp_path: Path) -> None:
    output, values = chosen
    build(str(output), tmp_path / "index", Options(kind="ivf"))
    expected = numbers(tmp_path / "index", values[:50], 5)
    moved = (tmp_path / "index").rename(tmp_path / "moved")
    for path in moved.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert numbers(moved, values[:50], 5) == expected
    finally:
        for path in moved.rglob("*"):
            path.chmod(0o755)


def test_parts_are_added_to_lists_on_disk_that_were_moved(tmp_path: Path) -> None:
    output, values = tmp_path / "out", clusters(3000)
    store(output, "a", values[:1800])
    build(str(output), tmp_path / "index", Options(kind="ivf"))
    (tmp_path / "index").rename(tmp_path / "moved")
    store(output, "b", values[1800:])
    built = build(str(output), tmp_path / "moved")
    assert (built.num_added, built.rebuilt, built.facts.num_rows) == (1200, "", 3000)
    assert np.mean([row == [number] for number, row in enumerate(numbers(tmp_path / "moved", values, 1))]) > 0.98


def test_an_output_on_s3_is_indexed(s3_server: Any, s3_url: str, embedded: Path, tmp_path: Path) -> None:
    s3_server.filesystem().put(f"{embedded}/", f"{s3_url}/", recursive=True)
    facts = build(s3_url, tmp_path / "index").facts
    assert (facts.output, facts.num_rows, facts.recall) == (s3_url, 14, 1.0)
    assert build(s3_url, tmp_path / "index").num_added == 0


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "jobs" / "index.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_kill_leaves_the_old_index_usable_and_the_next_run_goes_on(tmp_path: Path) -> None:
    output, index, values = tmp_path / "out", tmp_path / "index", clusters(6000, 256)
    store(output, "a", values[:2000])
    first = build(str(output), index, Options(kind="hnsw")).facts
    store(output, "b", values[2000:], part_rows=200)
    process = start(output, index)
    deadline = time.monotonic() + 120
    while not (index / "data-00001").is_dir():
        assert process.poll() is None, process.stdout and process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert read_index_facts(index) == first, "the kill came too late to show anything"
    ((near,),) = open_index(index).search(values[7:8], 1)
    assert (near.shard, near.sample_index) == ("a", 7)
    built = build(str(output), index)
    assert (built.num_added, built.rebuilt, built.facts.num_rows) == (4000, "", 6000)
    assert sorted(path.name for path in index.iterdir() if path.is_dir()) == [built.facts.data]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_told_and_leaves_the_index_as_it_was(
    kind: str, small_disk: SmallDisk, tmp_path: Path, run_job: Callable[..., Any]
) -> None:
    small_disk.resize(8192)
    output, index, values = tmp_path / "out", small_disk.folder / "index", clusters(4000, 64)
    store(output, "a", values[:2000])
    first = build(str(output), index, Options(kind=kind)).facts
    store(output, "b", values[2000:])
    before = everything(index)
    small_disk.fill(700_000)
    done = run_job("index.py", output, index)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert f"the index {index} cannot be written: " in done.stderr
    assert "No space left on device" in done.stderr
    assert everything(index) == before
    assert read_index_facts(index) == first
    assert sorted(path.name for path in index.iterdir()) == [".lock", "data-00000", "index.json"]


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder but its lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["data-00000", "data-2024", "data-x.csv", "data-00000/photo.jpg", ".tmp/x"])
def test_what_the_user_has_in_a_folder_is_never_removed(name: str, embedded: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / (name if "." in name else f"{name}/vectors.faiss")
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"is not empty and no index: it has '.*'; name another folder"):
        build(str(embedded), tmp_path / "mine")
    assert everything(tmp_path / "mine") == {str(mine.relative_to(tmp_path / "mine")): b"mine"}


def test_an_index_leaves_what_lies_beside_it_alone_and_refuses_what_has_the_name_of_its_own(
    embedded: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    build(str(embedded), index)
    before = everything(index)
    (index / "data-x.csv").write_bytes(b"mine")
    (index / "data-2024").mkdir()
    (index / "data-2024" / "vectors.faiss").write_bytes(b"mine")
    assert build(str(embedded), index).num_added == 0
    assert everything(index) == before | {"data-x.csv": b"mine", "data-2024/vectors.faiss": b"mine"}
    for name in ("data-00001", "data-00007/notes.txt"):
        (index / name).parent.mkdir(exist_ok=True)
        (index / name).write_bytes(b"mine")
        with pytest.raises(OutputError, match=f"{name[:10]} has the name of an index's own, and is none"):
            build(str(embedded), index)
        assert (index / name).read_bytes() == b"mine"
        (index / name).unlink()


def test_what_a_first_build_that_was_killed_left_is_cleared_away(embedded: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    build(str(embedded), index)
    (index / "index.json").unlink()
    (index / "data-00000").rename(index / "data-00003")
    assert build(str(embedded), index).facts.num_rows == 14
    assert sorted(path.name for path in index.iterdir()) == [".lock", "data-00000", "index.json"]


def test_two_at_once_are_refused(embedded: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "index").mkdir()
    with open(tmp_path / "index" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputBusyError, match=r"another index\.py is at work"):
            build(str(embedded), tmp_path / "index")


MEMORY = """\
import sys
from shard_embedder.pipeline.retrieval.build import Options, build
def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) // 1024
peak = 0
def look(what, done, total):
    global peak
    peak = max(peak, resident())
import faiss, numpy, pyarrow.parquet
before = resident()
facts = build(sys.argv[1], sys.argv[2], Options(memory_bytes=16 * 2**20), look).facts
print(facts.kind, facts.num_rows, peak - before)
"""


@pytest.mark.slow
def test_lists_on_disk_are_built_in_memory_that_does_not_grow_with_them(tmp_path: Path) -> None:
    """With 16 MiB for what is indexed at once, 195 MiB of embeddings take no more than 39 MiB do."""
    values = clusters(20_000, 512)
    peaks = []
    for shards in (1, 5):
        for number in range(shards):
            store(tmp_path / "out", f"s{number}", values, part_rows=2048)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path / "out"), str(tmp_path / f"index-{shards}")],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # FAISS tells on standard output how large the lists become.
        kind, num_rows, mib = done.stdout.splitlines()[-1].split()
        assert (kind, num_rows) == ("ivf", str(20_000 * shards))
        peaks.append(int(mib))
    assert peaks[1] < peaks[0] + 60


# FAISS beside torch, and without FAISS.

BESIDE = """\
import numpy as np
def convolve():
    import torch
    torch.manual_seed(0)
    return float(torch.nn.Conv2d(3, 64, 3)(torch.randn(8, 3, 128, 128)).sum())
def search():
    import faiss
    values = np.random.default_rng(0).standard_normal((4000, 64)).astype("float32")
    for index in (faiss.IndexFlatIP(64), faiss.IndexHNSWFlat(64, 16)):
        index.add(values)
        assert (index.search(values[:500], 1)[1][:, 0] == np.arange(500)).mean() > 0.5
for step in {steps}:
    step()
print("both work")
"""


@pytest.mark.parametrize("steps", ["(convolve, search, convolve)", "(search, convolve, search)"])
def test_faiss_and_torch_work_in_one_process_whichever_comes_first(steps: str) -> None:
    code = BESIDE.format(steps=steps)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "both work\n"), done.stderr


def test_without_faiss_the_error_names_the_extra(embedded: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['faiss'] = None; from shard_embedder.jobs.index import main; sys.exit(main())"
    command = [sys.executable, "-c", code, str(embedded), str(tmp_path / "index")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install faiss-cpu" in done.stderr
    assert "Traceback" not in done.stderr


# The command.


def test_the_command_tells_what_it_made(embedded: Path, tmp_path: Path, run_job: Callable[..., Any]) -> None:
    done = run_job("index.py", embedded, tmp_path / "index")
    assert done.returncode == 0, done.stderr
    assert "flat, cosine, 512 features" in done.stdout
    assert "14, 14 of them added now" in done.stdout
    assert "recall@10  1.000 of exact search, on 14 of its rows" in done.stdout
    done = run_job("index.py", embedded, tmp_path / "index")
    assert "nothing to do" in done.stdout
    stated = json.loads((tmp_path / "index" / "index.json").read_text())
    made = read_fingerprint(str(embedded))
    assert made is not None
    assert stated["made"] == made.to_json()
    assert set(stated["files"]) == {"parts.parquet", "rows.parquet", "vectors.faiss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "index"], "nowhere is not an output: it has no run.json"),
        (["nowhere", "s3://bucket/index"], "not an output"),
        (["nowhere", "index", "--kind", "tree"], "kind must be one of flat, hnsw, ivf, got 'tree'"),
        (["nowhere", "index", "--memory", "nan"], "--memory must be a number of GiB, got nan"),
        (["nowhere", "index", "--memory", "inf"], "--memory must be a number of GiB, got inf"),
        (["nowhere", "index", "--memory", "0"], "memory_bytes must be at least 1048576, got 0"),
    ],
)
def test_the_command_refuses_wrong_usage_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
