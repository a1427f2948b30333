"""Spark reads every row of an output, whatever its shards are called: with the code of docs/readers.md."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import sample_members, write_tar
from tests.output.test_readers import check, run_code
from tests.outputs import embed

# Names that Spark passes over, makes columns of, or takes for a URL.
NAMES = ["plain", "deeper/still", "_private", "_new/_x", "shard=7/y", "dt=2026-01-01/image_id=3/z", "a:b", "_SUCCESS"]


@pytest.mark.slow
def test_spark_reads_shards_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyspark", reason="Spark is not installed: uv pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17: apt-get install openjdk-17-jre-headless")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    for number, name in enumerate(NAMES):
        write_tar(tmp_path / "in" / f"{name}.tar", sample_members(f"key-{number}", number))
    embed(tmp_path / "in", tmp_path / "out", keep=["cls"])
    (tmp_path / "run").mkdir()
    check("Spark", tmp_path / "out", tmp_path / "run")
    (tmp_path / "again").mkdir()
    found, _, _ = run_code("Spark", tmp_path / "out", tmp_path / "again")
    try:
        frame = found["frame"]
        assert sorted(row.shard for row in frame.select("shard").collect()) == sorted(NAMES)
        assert sorted(frame.columns) == ["cls", "embedding", "image_id", "sample_index", "shard"]
    finally:
        found["spark"].stop()
