"""What `--compile` finds in torch's cache on disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Two processes that compile the same, forked from one that has imported what takes them longest. Between them, every
# library is as the linker leaves it that is killed, and as torch finds it in the next process.
COMPILE = """
import os, pathlib, sys
import torch
import torch._inductor.compile_fx
from shard_embedder.pipeline.embedding.compiling import compiled

def run():
    with torch.inference_mode():
        print(compiled(lambda values: (values + 1).relu(), "default")(torch.tensor([-3.0, 2.0])).tolist(), flush=True)

def libraries():
    return list(pathlib.Path(sys.argv[1]).rglob("*.so"))

for made_before in (False, True):
    assert bool(libraries()) == made_before
    for library in libraries():
        library.write_bytes(b"")
    process = os.fork()
    if process == 0:
        run()
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
assert all(library.stat().st_size for library in libraries())
"""


@pytest.mark.slow
def test_a_library_that_a_killed_process_left_unfinished_is_made_again(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # That of torch's headers takes longer than they save one small kernel, as do nine trials of the compiler.
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "TORCHINDUCTOR_VEC_ISA_OK": "0",
    }
    command = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[0.0, 3.0]\n" * 2), done.stderr[-2000:]
