"""An index holds what the output holds, finds what an exact search finds, and is never stale or half written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from shard_embedder.jobs.index import main
from shard_embedder.pipeline.core.errors import OutputError
from shard_embedder.pipeline.core.schema import (
    EMBEDDING,
)
from shard_embedder.pipeline.output.fingerprint import read_fingerprint
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.retrieval.build import Options, build
from shard_embedder.pipeline.retrieval.index import ROWS_FILE, open_index
from shard_embedder.pipeline.retrieval.kinds import FLAT_ROWS, KINDS, METRICS, choose_kind, num_lists
from tests.conftest import ROOT
from tests.retrieval.stored import Vectors, clusters, garble, numbers, store, true_neighbours

faiss = pytest.importorskip("faiss", reason="the extra `index` is not installed")


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


@pytest.mark.slow
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


@pytest.mark.slow
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
