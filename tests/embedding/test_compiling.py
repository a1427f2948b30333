"""What `--compile` finds in torch's cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILE = """
import torch
from shard_embedder.pipeline.embedding.compiling import compiled
with torch.inference_mode():
    print(compiled(lambda values: (values + 1).relu(), "default")(torch.tensor([-3.0, 2.0])).tolist())
"""


@pytest.mark.slow
def test_a_library_that_a_killed_process_left_unfinished_is_made_again(tmp_path: Path) -> None:
    def run() -> None:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            # That of torch's headers takes longer than they save one small kernel.
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        }
        done = subprocess.run(
            [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == "[0.0, 3.0]", done.stderr[-2000:]

    run()
    libraries = list(tmp_path.rglob("*.so"))
    assert libraries
    # As the linker leaves them that is killed, and as torch finds them in the next process.
    for library in libraries:
        library.write_bytes(b"")
    run()
