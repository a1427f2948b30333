"""A process that does not compile does not import torch's compiler."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.conftest import ROOT

_SCRIPT = """
import sys
from shard_embedder.pipeline.backbones import build_backbone, compiler, library_of

library = library_of("resnet50")
assert library.output_shape("squeezenet1_1", "pooled", (224, 224)) == (512,)
import torch
assert build_backbone("squeezenet1_1", "random:0")(torch.zeros(1, 3, 64, 64)).shape == (1, 512)
assert "torch._dynamo" not in sys.modules

# What torchvision took, and what somebody else takes at the same moment, is torch's own.
from torchvision.ops.roi_align import is_compile_supported
with compiler.imported_when_used():
    stand_in = sys.modules["torch._dynamo.utils"]
    from torch._dynamo.utils import counters, is_compile_supported as meanwhile
import torch._dynamo.utils as real
assert real is not stand_in
assert counters is real.counters
for device in ("cpu", "cuda"):
    assert is_compile_supported(device) == meanwhile(device) == real.is_compile_supported(device)
with compiler.imported_when_used():
    assert sys.modules["torch._dynamo.utils"] is real
"""


@pytest.mark.slow
def test_a_backbone_is_planned_built_and_run_without_the_compiler_and_torchvision_gets_it_when_it_asks() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
