"""A network of torch converted for OpenVINO: its graph and its constants.

torch.jit.trace and freeze are deprecated, and what OpenVINO decodes them by is undocumented. They stay, and only
here, because torch.export with ov.convert_model costs a job's start seconds of one core (1.7 instead of 0.3 with
resnet50, 7.0 instead of 2.0 with swin_t) and loses networks: freezing computes the resampled positions of
timm/test_vit once, an exported graph keeps them, and OpenVINO has no rule for that. A test in
tests/embedding/test_deprecated.py fails when either changes. (torch 2.15, OpenVINO 2026.4.1, two cores of a Xeon,
2026-11-28.)
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shard_embedder.pipeline.embedding.openvino_runner import SharedGraph
from shard_embedder.pipeline.embedding.quiet_openvino import ov
from shard_embedder.pipeline.embedding.torch_runner import NetworkModule


def convert(network: NetworkModule, crop: tuple[int, int]) -> SharedGraph:
    """Convert a network (`build_network`) for inputs of `crop` (height, width).

    Raises:
        Exception: of any kind, where tracing or converting does not work for this architecture.
    """
    with torch.no_grad(), warnings.catch_warnings():
        # Of checks of the input's size, which is fixed here, and of the tracer's age.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)
        example = torch.zeros((1, *crop, 3), dtype=torch.uint8)
        traced = torch.jit.freeze(torch.jit.trace(network, example, check_trace=False))  # type: ignore[no-untyped-call]
    # Of OpenVINO, which is loaded without its telemetry by now.
    from openvino.frontend import FrontEndManager  # noqa: PLC0415
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder  # noqa: PLC0415

    # Not by ov.convert_model, which traces twice and takes ten times as long.
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced)
    model = frontend.convert(frontend.load(decoder))
    pixels = model.inputs[0].get_node()
    pixels.set_element_type(ov.Type.u8)
    pixels.set_partial_shape(ov.PartialShape([-1, *crop, 3]))
    model.validate_nodes_and_infer_types()
    with tempfile.TemporaryDirectory(prefix="graph-") as folder:
        ov.serialize(model, f"{folder}/graph.xml", f"{folder}/graph.bin")
        graph = SharedGraph(Path(folder, "graph.xml").read_bytes(), np.fromfile(f"{folder}/graph.bin", np.uint8))
    _let_weights_go(traced.graph)
    return graph


def _let_weights_go(graph: Any) -> None:
    """Empty the constants of a traced graph: torch keeps each graph, with its weights, until the process ends."""
    for node in graph.findAllNodes("prim::Constant"):
        if "value" in node.attributeNames() and node.kindOf("value") == "t":
            node.t_("value", torch.empty(0))
