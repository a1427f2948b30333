"""The code in docs/readers.md, as it stands there, run with the real packages on real outputs."""

from __future__ import annotations

import contextlib
import importlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.schema import embeddings_schema
from shard_embedder.pipeline.output.parts import vectors
from tests.conftest import ROOT, sample_members, write_shards, write_tar
from tests.outputs import embed

TESTED, _, UNTESTED = (ROOT / "docs" / "readers.md").read_text().partition("## Not tested here")
CODE = dict(re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```", TESTED, re.DOTALL | re.MULTILINE))
FIRST = re.findall(r"^```python\n(.*?)^```", TESTED.partition("\n## ")[0], re.DOTALL | re.MULTILINE)
MODULES = {
    "PyArrow": "pyarrow", "DuckDB": "duckdb", "Polars": "polars", "pandas": "pandas",
    "Hugging Face datasets": "datasets", "LanceDB": "lancedb", "FAISS": "faiss", "Ray Data": "ray",
    "Spark": "pyspark",
}  # fmt: skip
# Ray Data needs the tests' Ray, and Spark Java (`test_spark.py`).
IN_THIS_PROCESS = [name for name in MODULES if name not in ("Ray Data", "Spark")]
WIDENS = ("DuckDB", "FAISS", "Hugging Face datasets")


@pytest.fixture(scope="module", params=["float32", "float16"])
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three shards, of which one is in a folder, with a kept field."""
    folder = tmp_path_factory.mktemp("readers")
    write_shards(folder / "in", num_shards=2)
    write_shards(folder / "in" / "deeper" / "still", num_shards=1)
    embed(folder / "in", folder / request.param, dtype=request.param, keep=["cls"])
    return folder / request.param


def run_code(name: str, output: Path, folder: Path) -> tuple[dict[str, Any], list[str], np.ndarray[Any, Any]]:
    """What the code of a reader defines, run in `folder`; the ids and embeddings that are stored, part by part."""
    (folder / "embeddings").symlink_to(output)
    parts = [pq.read_table(path) for path in sorted((output / "embeddings").rglob("*.parquet"))]
    ids = [
        f"{row['shard']}|{row['image_id']}" for part in parts for row in part.drop_columns("embedding").to_pylist()
    ]
    stored = np.concatenate([vectors(part) for part in parts])
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for code in (*FIRST, CODE[name]):
            exec(compile(code, f"readers.md, {name}", "exec"), names)
            if name not in IN_THIS_PROCESS:  # but in the folder where its own processes were started
                names["OUTPUT"] = str(folder / "embeddings")
    assert names["C"] == stored.shape[1]
    return names, [image_id.partition("|")[2] for image_id in ids], stored


def check(name: str, output: Path, folder: Path) -> None:
    found, ids, stored = run_code(name, output, folder)
    assert sorted(found["ids"]) == sorted(ids)
    assert found["vectors"].shape == stored.shape
    is_widened = name in WIDENS
    assert found["vectors"].dtype == (np.float32 if is_widened else stored.dtype)
    # The order of the parts is the reader's own: an id is in two shards here, with the same image.
    by_id = {
        image_id: row.tobytes() for image_id, row in zip(ids, stored.astype(found["vectors"].dtype), strict=True)
    }
    assert [by_id[image_id] for image_id in found["ids"]] == [row.tobytes() for row in found["vectors"]]
    if "nearest" in found:
        unit = stored.astype(np.float64)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        (asked, *_) = np.flatnonzero((stored.astype(np.float32) == found["query"]).all(axis=1))
        scores = unit @ unit[asked]
        expected = [ids[row] for row in np.argsort(-scores, kind="stable")[:5]]
        assert sorted(found["nearest"]) == sorted(expected)
        assert found["nearest"][0] == ids[asked]


def test_every_reader_of_the_table_has_code_that_is_run() -> None:
    table = re.findall(r"^\| ([A-Z][^|]+|pandas) \|", TESTED, re.MULTILINE)
    assert [name.strip() for name in table] == list(CODE) == list(MODULES)
    assert len(FIRST) == 1
    assert TESTED.count("```") == 2 * len([*FIRST, *CODE])
    # What is shown without a test says so.
    assert "These need a server" in UNTESTED


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_the_same_ids_and_embeddings_arrive(name: str, output: Path, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[name], reason=f"{name} is not installed: pip install -e '.[readers]'")
    check(name, output, tmp_path)


@pytest.mark.slow
def test_the_same_ids_and_embeddings_arrive_in_ray(ray_session: None, output: Path, tmp_path: Path) -> None:
    check("Ray Data", output, tmp_path)


# Names that one reader or another passes over, takes for a pattern, or makes columns of.
ODD = [
    "plain", "_private", "_new/x", "_new/_y", "shard=7/y", "dt=2026-01-01/image_id=3/z", "embedding=1", "a:b",
    "s3:/c", "q?*[x]{y}", "50%41", "til~5Fde", "tab\tand\nline", "esc\x1b[2J", "back\\slash", "two words",
    "ünï-코드", "x.parquet/y", "dots.in.it", "h#ash", "quo'te\"s", "<b>", "_metadata", "_SUCCESS",
    "plain.000000000000-00000-last",
]  # fmt: skip


@pytest.fixture(scope="module")
def oddly_named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of shards of odd names, of a sample each."""
    folder = tmp_path_factory.mktemp("odd")
    for number, name in enumerate(ODD):
        write_tar(folder / "in" / f"{name}.tar", sample_members(f"key-{number}", number))
    embed(folder / "in", folder / "out", keep=["cls"])
    return folder / "out"


def shards_and_columns(name: str, output: Path, scratch: Path) -> tuple[list[str], list[str]]:
    """What a reader finds in the column `shard`, and all the columns that it sees."""
    pattern, base = f"{output}/embeddings/**/*.parquet", f"{output}/embeddings"
    library: Any = importlib.import_module(MODULES[name])
    if name == "PyArrow":
        table = (
            importlib.import_module("pyarrow.dataset").dataset(base, format="parquet", partitioning="hive").to_table()
        )
        return table["shard"].to_pylist(), table.column_names
    if name == "DuckDB":
        found = library.sql(f"SELECT * FROM '{pattern}'")
        return [row[0] for row in library.sql(f"SELECT shard FROM '{pattern}'").fetchall()], found.columns
    if name == "Polars":
        frame = library.read_parquet(pattern, hive_partitioning=True)
        return frame["shard"].to_list(), frame.columns
    if name == "pandas":
        frame = library.read_parquet(base)
        return frame["shard"].tolist(), list(frame.columns)
    assert name == "Hugging Face datasets"
    rows = library.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(scratch))
    return rows["shard"][:], rows.column_names


@pytest.mark.parametrize("name", ["PyArrow", "DuckDB", "Polars", "pandas", "Hugging Face datasets"])
def test_shards_of_any_name_are_read_under_their_true_name(name: str, oddly_named: Path, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[name], reason=f"{name} is not installed: pip install -e '.[readers]'")
    shards, columns = shards_and_columns(name, oddly_named, tmp_path)
    assert sorted(shards) == sorted(ODD)
    assert sorted(columns) == ["cls", "embedding", "image_id", "sample_index", "shard"]


@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_the_code_of_the_docs_reads_shards_of_any_name(name: str, oddly_named: Path, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[name], reason=f"{name} is not installed: pip install -e '.[readers]'")
    check(name, oddly_named, tmp_path)


@pytest.mark.slow
def test_the_code_of_the_docs_reads_shards_of_any_name_in_ray(
    ray_session: None, oddly_named: Path, tmp_path: Path
) -> None:
    check("Ray Data", oddly_named, tmp_path)


def test_a_kept_field_below_another_has_a_column_that_lancedb_takes(tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb", reason="LanceDB is not installed: pip install lancedb")
    keep = ["json:user.name", "author=json:user.author", "json:1.x-y"]
    config = parse({"input": ["in"], "output": "out", "keep": keep})
    schema = embeddings_schema((4,), "float32", config.kept_columns)
    table = lancedb.connect(f"{tmp_path}/lance").create_table("images", schema=schema)
    assert table.schema.names[-3:] == ["user_name", "author", "_1_x_y"]


def one_part(output: Path, tmp_path: Path) -> tuple[Path, Any]:
    """An output of one part alone, and its table as PyArrow reads it."""
    part = min((output / "embeddings").rglob("*.parquet"))
    (tmp_path / "alone" / "embeddings").mkdir(parents=True)
    (tmp_path / "alone" / "embeddings" / part.name).write_bytes(part.read_bytes())
    return tmp_path / "alone", pq.read_table(part)


def address(table: Any) -> int:
    """Where Arrow holds the embeddings of a table of one piece."""
    (chunk,) = table["embedding"].chunks
    found: int = chunk.values.buffers()[1].address
    return found


def test_numpy_sees_the_memory_of_arrow(output: Path, tmp_path: Path) -> None:
    alone, _ = one_part(output, tmp_path)
    found, _, _ = run_code("PyArrow", alone, tmp_path)
    assert found["vectors"].ctypes.data == address(found["table"])


def test_polars_and_numpy_see_the_memory_of_arrow(output: Path, tmp_path: Path) -> None:
    pl = pytest.importorskip("polars", reason="Polars is not installed: pip install -e '.[readers]'")
    _, table = one_part(output, tmp_path)
    frame = pl.from_arrow(table)
    assert frame["embedding"].to_numpy(allow_copy=False).ctypes.data == address(table)


def test_faiss_searches_the_memory_of_arrow(output: Path, tmp_path: Path) -> None:
    faiss = pytest.importorskip("faiss", reason="FAISS is not installed: pip install -e '.[index]'")
    alone, _ = one_part(output, tmp_path)
    found, _, _ = run_code("PyArrow", alone, tmp_path)
    values = found["vectors"]
    if values.dtype == np.float32:
        # The pointer that FAISS is given for an array.
        assert int(faiss.swig_ptr(values)) == address(found["table"])
        assert faiss.knn(values, values, 1)[1][:, 0].tolist() == list(range(len(values)))
