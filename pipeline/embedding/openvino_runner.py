"""The backbone on OpenVINO, which computes it on CPUs two to three times as fast as eager torch.

The driver traces and converts the network once (`pipeline.embedding.openvino_graph`). Actors read the converted graph
from the object store, compile it in a second, and never import torch.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from socket import gethostname
from typing import Any, ClassVar

import numpy as np

from shard_embedder.pipeline.core.errors import PrecisionError
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.quiet_openvino import ov

# Larger batches are no faster, and small ones waste less where a part ends.
BATCH_SIZE = 4
_PRECISIONS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
_HINT = "INFERENCE_PRECISION_HINT"


def computes(precision: str) -> bool:
    """Whether this machine's processor does: OpenVINO takes bf16 in silence for an fp16 that it has not."""
    core = ov.Core()
    core.set_property("CPU", {_HINT: _PRECISIONS[precision]})
    return bool(core.get_property("CPU", _HINT).to_string() == _PRECISIONS[precision])


@dataclass(frozen=True)
class SharedGraph:
    """A converted network as it travels to the actors: its graph, and its constants in the object store."""

    has_own_batch_size: ClassVar[bool] = True

    graph: bytes
    constants: np.ndarray[Any, np.dtype[np.uint8]]

    def runner(self, network: Network, placement: Placement) -> OpenVinoRunner:
        """The network on the CPUs of this process. What it computes stands in the graph, which is always compiled."""
        return OpenVinoRunner(self.graph, self.constants, network.preprocess.crop, placement)


class OpenVinoRunner:
    """One network on the CPUs of this process.

    Each thread takes batches of its own, so that none waits for another that does not get its core; those of
    another call of `embed`, too, so that none waits for the last batch of a call. Batches have one fixed shape; the
    last is padded.
    """

    gpu: ClassVar[None] = None

    def __init__(
        self, graph: bytes, constants: np.ndarray[Any, Any], crop: tuple[int, int], placement: Placement
    ) -> None:
        precision, num_threads = placement.precision, placement.num_threads
        if not computes(precision):
            raise PrecisionError(f"precision must be one that the processor of {gethostname()} has, got {precision}")
        self._batch_size = placement.batch_size or BATCH_SIZE
        # The model reads its constants in place.
        self._constants = ov.Tensor(constants)
        core = ov.Core()
        model = core.read_model(graph, self._constants)
        model.reshape([self._batch_size, *crop, 3])
        settings: dict[str, Any] = {_HINT: _PRECISIONS[precision], "ENABLE_CPU_PINNING": False}
        if num_threads is not None:
            settings |= {"INFERENCE_NUM_THREADS": num_threads, "NUM_STREAMS": num_threads}
        self._compiled = core.compile_model(model, "CPU", settings)
        self._shape = tuple(self._compiled.output(0).shape)[1:]
        self._crop = crop
        self._own = threading.local()
        num_requests = num_threads or self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._threads = ThreadPoolExecutor(num_requests, "openvino")

    @property
    def batch_size(self) -> int:
        """Images a batch."""
        return self._batch_size

    def embed(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`, as `pipeline.embedding.embedder.Runner.embed` does."""
        embedded = np.empty((len(rows), *self._shape), np.float32)

        def compute(start: int) -> None:
            batch = slice(start, start + self._batch_size)
            self._batch(pixels, rows[batch], embedded[batch])

        list(self._threads.map(compute, range(0, len(rows), self._batch_size)))
        return embedded

    def _batch(
        self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], embedded: np.ndarray[Any, Any]
    ) -> None:
        own = self._own
        # Not by the pool's initializer: its threads would hold this runner, and neither ever end.
        if not hasattr(own, "request"):
            own.request = self._compiled.create_infer_request()
            own.buffer = np.zeros((self._batch_size, *self._crop, 3), np.uint8)
        request, buffer = own.request, own.buffer
        np.take(pixels, rows, axis=0, out=buffer[: len(rows)], mode="clip")
        buffer[len(rows) :] = 0
        request.infer({0: buffer}, share_inputs=True)
        embedded[:] = request.get_output_tensor(0).data[: len(rows)]
