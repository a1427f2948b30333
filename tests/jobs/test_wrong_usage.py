"""Wrong usage is told before anything heavy is loaded, and in full before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

_RUN = """
import sys
from importlib import import_module
try:
    code = import_module(f"shard_embedder.jobs.{sys.argv[1]}").main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
print(code, *({"torch", "faiss", "ray", "openvino"} & {*sys.modules}))
"""


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["index", "nowhere", "index"], "nowhere is not an output"),
        (["search", "nowhere", "image.jpg"], "nowhere is not an index"),
        (["search", "nowhere", "image.png"], "image image.png not found"),
        (["search", "nowhere", "image.jpg", "--html", "no/page.html"], "--html must be in a folder that is there"),
        (["search", "nowhere", "image.jpg", "--input", "none.tar"], "none.tar"),
        (["serve", "nowhere"], "nowhere is not an index"),
        (["duplicates", "nowhere"], "nowhere is not an output"),
        (["duplicates", "nowhere", "--threshold", "2"], "threshold must be above 0"),
        (["pack", "nowhere", "shards"], "FOLDER must be a folder of images, got 'nowhere'"),
        (["embed", "--device", "mps"], "argument --device: invalid choice: 'mps'"),
        (["embed", "photos", "out"], "photos out; shards or photos are named by --input, and the result by --output"),
        (["pack", "empty", "shards"], "FOLDER must hold images"),
    ],
)
def test_wrong_usage_is_told_before_heavy_libraries_are_loaded(command: list[str], told: str, tmp_path: Path) -> None:
    (tmp_path / "image.jpg").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *command], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout == "2\n"
    assert told in done.stderr
