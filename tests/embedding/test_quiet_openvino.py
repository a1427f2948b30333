"""No process of a run tells anybody that OpenVINO is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

_WATCHED = """
import json, sys
asked = []
def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.posix_spawn"):
        asked.append(f"{event} {arguments!r}")
sys.addaudithook(hear)
import torch
asked.clear()
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.openvino_graph import convert
from shard_embedder.pipeline.embedding.torch_runner import build_network
from shard_embedder.pipeline.backbones import load_weights
from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
import numpy as np
preprocess = preprocess_for("squeezenet1_1", "random").with_size((64, 64))
network = Network(backbone="squeezenet1_1", preprocess=preprocess)
source = convert(build_network(network, load_weights("squeezenet1_1", "random:0")), (64, 64))
source.runner(network, Placement(num_threads=1)).embed(np.zeros((4, 64, 64, 3), np.uint8), np.arange(4))
import threading, time
deadline = time.monotonic() + 5
while threading.active_count() > 2 and time.monotonic() < deadline:
    time.sleep(0.05)
print(json.dumps([asked, "openvino_telemetry" in sys.modules]))
"""


@pytest.mark.slow
def test_openvino_opens_no_connection_and_writes_nothing_to_the_home_folder(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    # Where CI is said, its telemetry is silent by itself.
    for name in ("CI", "TF_BUILD", "JENKINS_URL"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED], env=environment, capture_output=True, text=True, check=True
    )
    asked, is_loaded = json.loads(done.stdout.splitlines()[-1])
    assert (asked, is_loaded) == ([], False)
    assert not (tmp_path / "intel").exists()
