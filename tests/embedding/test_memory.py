"""What computed a network lets go of it: in a process that embeds with one after another."""

from __future__ import annotations

import ctypes
import gc
import resource
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, build_network

NETWORK = Network(backbone="resnet18", preprocess=preprocess_for("resnet18", "random").with_size((64, 64)))
PLACEMENT = Placement(precision="fp32", num_threads=2)
PIXELS = np.zeros((5, 64, 64, 3), np.uint8)


def resident_mib() -> float:
    gc.collect()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@pytest.mark.parametrize("library", ["openvino", "torch"])
def test_a_runner_that_nobody_holds_ends_with_its_threads(library: str) -> None:
    weights = load_weights("resnet18", "random:0")
    source = SharedWeights.of(weights)
    if library == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
        from shard_embedder.pipeline.embedding.openvino_graph import convert

        source = convert(build_network(NETWORK, weights), NETWORK.preprocess.crop)
    before = set(threading.enumerate())
    runner = source.runner(NETWORK, PLACEMENT)
    runner.embed(PIXELS, np.arange(5))
    assert set(threading.enumerate()) > before
    held = weakref.ref(runner)
    del runner
    gc.collect()
    assert held() is None
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc: memory cannot be told")
def test_the_tracer_keeps_no_weights_of_what_was_converted() -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    from shard_embedder.pipeline.embedding.openvino_graph import convert

    def convert_one() -> float:
        module = build_network(NETWORK, load_weights("resnet18", "random:0"))
        return convert(module, NETWORK.preprocess.crop).constants.nbytes / 2**20

    weights_mib = convert_one()
    before = resident_mib()
    for _ in range(4):
        convert_one()
    assert resident_mib() - before < 2 * weights_mib
