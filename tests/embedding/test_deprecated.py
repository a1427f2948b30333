"""What torch and torchvision will take away, and the one module that still uses each: these tests fail first."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from shard_embedder.pipeline.backbones import library_of, load_weights
from shard_embedder.pipeline.backbones.torchvision_models import preprocess_for
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.torch_runner import build_network


@pytest.mark.usefixtures("one_thread")
def test_openvino_graph_still_has_its_tracer_and_its_decoder() -> None:
    """`pipeline.embedding.openvino_graph`: without these a job falls back to eager torch, at half the speed."""
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    from shard_embedder.pipeline.embedding.openvino_graph import convert

    with pytest.warns(FutureWarning) as told:
        torch.jit.freeze(torch.jit.trace(torch.nn.ReLU().eval(), torch.zeros(1, 3), check_trace=False))
    texts = [str(one.message) for one in told]
    for name in ("trace", "freeze"):
        assert any(text.startswith(f"`torch.jit.{name}` is deprecated") for text in texts)

    preprocess = preprocess_for("squeezenet1_1", "random").with_size((64, 64))
    network = Network(backbone="squeezenet1_1", preprocess=preprocess)
    module = build_network(network, load_weights("squeezenet1_1", "random:0"))
    pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    found = convert(module, (64, 64)).runner(network, Placement(num_threads=1)).embed(pixels, np.arange(5))
    with torch.no_grad():
        wanted = module(torch.from_numpy(pixels)).numpy()
    assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_torch_export_still_loses_networks_that_the_tracer_takes(caplog: pytest.LogCaptureFixture) -> None:
    """Why `pipeline.embedding.openvino_graph` does not use it; where this fails, it may be time."""
    pytest.importorskip("openvino", reason="OpenVINO has no wheel for this machine")
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    from shard_embedder.pipeline.embedding.openvino_graph import convert
    from shard_embedder.pipeline.embedding.quiet_openvino import ov

    name, crop = "timm/test_vit", (160, 160)
    preprocess = library_of(name).preprocess_for(name, "random")
    module = build_network(Network(backbone=name, preprocess=preprocess), load_weights(name, "random:0"))
    assert convert(module, crop).graph
    with torch.no_grad():
        program = torch.export.export(module, (torch.zeros((4, *crop, 3), dtype=torch.uint8),))
    rule = r"No conversion rule found for .* aten\._upsample"
    # It sets the level of the root logger to ERROR, which would silence what later tests listen for.
    with caplog.at_level(logging.root.level), pytest.raises(ov.frontend.OpConversionFailure, match=rule):
        ov.convert_model(program)
