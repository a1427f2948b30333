"""The backbone on torch: on a GPU, and on CPUs where nothing faster computes it."""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.utils.fusion import fuse_conv_bn_eval

from shard_embedder.pipeline.backbones import build_backbone
from shard_embedder.pipeline.backbones.base import Backbone
from shard_embedder.pipeline.backbones.transform import Normalize
from shard_embedder.pipeline.backbones.weights_spec import Weights
from shard_embedder.pipeline.core.config import DEVICES
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.embedding.compiling import compiled
from shard_embedder.pipeline.embedding.fusing import fuse_convolutions
from shard_embedder.pipeline.embedding.gpu import Gpu, Span, lacks_memory, use_exact_fp32
from shard_embedder.pipeline.embedding.network import Network, Placement

_CPU_BATCH, _GPU_BATCH, _LARGE_GPU_BATCH = 16, 128, 256
_LARGE_GPU_BYTES = 40 * 10**9
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Batches on their way through the device at once: one computes while the next is copied in and the last out.
_IN_FLIGHT = 3


def device_here(asked: str) -> str:
    """`cpu` or `cuda`, where `auto` is the GPU that torch sees, if any.

    Raises:
        SettingsError: it is neither of these, or cuda where there is none.
    """
    if asked not in DEVICES:
        raise SettingsError(f"device must be one of {', '.join(DEVICES)}, got {asked!r}")
    has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise SettingsError("device must be one that this machine has, got 'cuda': torch sees no GPU here")
    if asked == "auto":
        return "cuda" if has_gpu else "cpu"
    return asked


@dataclass(frozen=True)
class SharedWeights:
    """Weights as they travel to the actors: random ones by their seed, others in the object store."""

    has_own_batch_size: ClassVar[bool] = False

    name: str
    sha256: str
    seed: int | None
    state: dict[str, np.ndarray[Any, Any]] | None

    @classmethod
    def of(cls, weights: Weights) -> SharedWeights:
        """For these weights. Where another process reads them from shared memory, it copies no tensor."""
        if weights.state is None:
            return cls(weights.name, weights.sha256, weights.seed, None)
        arrays = {key: value.detach().float().numpy() if value.is_floating_point() else value.numpy()
                  for key, value in weights.state.items()}  # fmt: skip
        return cls(weights.name, weights.sha256, weights.seed, arrays)

    def get(self) -> Weights:
        """The weights, in this process."""
        if self.state is None:
            return Weights(self.name, self.sha256, None, self.seed)
        # What comes from shared memory cannot be written, which torch asks of its tensors.
        state = {key: torch.from_numpy(value if value.flags.writeable else np.array(value))
                 for key, value in self.state.items()}  # fmt: skip
        return Weights(self.name, self.sha256, state)

    def runner(self, network: Network, placement: Placement) -> TorchRunner:
        """The backbone with these weights, on a device of this process."""
        return TorchRunner(build_network(network, self.get()), network.preprocess.crop, placement)


class NetworkModule(nn.Module):
    """uint8 RGB [N, H, W, 3] to what is stored: normalisation, backbone, and L2 where asked."""

    def __init__(self, backbone: Backbone, preprocess: Preprocess, normalize: bool) -> None:
        super().__init__()
        self.backbone = fold_batch_norms(backbone)
        self.normalize_pixels = Normalize(preprocess)
        self.dtype = torch.float32
        self.normalize = normalize

    def as_precision(self, dtype: torch.dtype) -> NetworkModule:
        """Compute in `dtype` from now on; what goes in and comes out stays as it is."""
        self.backbone = self.backbone.to(dtype).to(memory_format=torch.channels_last)
        self.dtype = dtype
        return self

    def fused(self, crop: tuple[int, int]) -> NetworkModule:
        """Compute with fused convolutions from now on, on the GPU that holds it. Tries one image of size `crop`."""
        pixels = torch.zeros((1, *crop, 3), dtype=torch.uint8, device=self.normalize_pixels.scale.device)
        self.backbone = fuse_convolutions(self.backbone, self._images(pixels))
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [N, C] or [N, C, H', W']."""
        features: Tensor = self.backbone(self._images(pixels)).float()
        if self.normalize:
            # A vector of length 0 has no direction: it becomes NaN, and so a row of errors.
            features = features / features.norm(dim=1, keepdim=True)
        return features

    def _images(self, pixels: Tensor) -> Tensor:
        images: Tensor = self.normalize_pixels(pixels)
        return images.to(self.dtype, memory_format=torch.channels_last)


def build_network(network: Network, weights: Weights) -> NetworkModule:
    """The network with these weights, in fp32.

    Raises:
        BackboneError, WeightsError: as `build_backbone` does.
    """
    backbone = build_backbone(network.backbone, weights, network.features, network.preprocess.crop)
    return NetworkModule(backbone, network.preprocess, network.normalize).eval()


def fold_batch_norms(backbone: nn.Module) -> nn.Module:
    """The backbone with its batch norms folded into the convolutions before them: the same function, faster.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, section 3.2.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    try:
        traced = fx.symbolic_trace(backbone.eval())
    except TraceError:  # `forward` branches on what it computes, as a few of timm's do
        return backbone
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for node in traced.graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        # Nothing else may see what the convolution gives, nor compute with it.
        if not isinstance(before, fx.Node) or len(before.users) != 1 or calls[before.target] != 1:
            continue
        convolution, norm = traced.get_submodule(str(before.target)), traced.get_submodule(str(node.target))
        # Subclasses may do more: timm's batch norms have an activation of their own.
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            traced.set_submodule(str(before.target), fuse_conv_bn_eval(convolution, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


class _Batch(NamedTuple):
    """A batch that the device computes, or has computed."""

    features: Tensor  # in host memory, the padding's too
    rows: slice  # of the call that it belongs to, without the padding
    # On a GPU, from its beginning until the features are there; elsewhere they are there already.
    span: Span | None


class TorchRunner:
    """One backbone on one device.

    Calls of `embed` from several threads take turns in one that is the runner's own, or that of all compiled runners
    of the process. A turn ends when the call's last batch is on its way: while a GPU computes that, the next call's
    first is copied to it. Batches have one fixed shape (the last is padded), so that an embedding does not depend on
    what else is in its batch. Where the memory does not hold a batch they are halved, for good; kernels of another
    shape may round the last bit otherwise.

    With `compiled`, torch.compile fuses what is between the convolutions, and on a GPU replays CUDA graphs. That
    takes a C compiler and some ten seconds for each batch size; torch keeps what it made on disk, for the next actor.

    `gpu` is the device where it is one, None on CPUs.
    """

    def __init__(
        self, network: NetworkModule, crop: tuple[int, int], placement: Placement, gpu: Gpu | None = None
    ) -> None:
        if placement.num_threads is not None:
            # Ray sets OMP_NUM_THREADS from the CPUs that the actor reserves; it may use more than it reserves.
            torch.set_num_threads(placement.num_threads)
        self._device = torch.device(placement.device)
        self.gpu = Gpu(self._device) if gpu is None and self._device.type == "cuda" else gpu
        if placement.precision == "fp32":
            use_exact_fp32()
        self._crop = crop
        network = network.as_precision(_DTYPES[placement.precision]).eval().to(self._device)
        # fp32 is what all else is compared with, and stays as plain as it can be.
        if self.gpu is not None and placement.precision != "fp32" and not placement.compiled:
            network = network.fused(crop)
        self._network: Callable[[Tensor], Tensor] = network
        # What is copied in the stream that computes would wait for the batch before.
        self._copies = None if self.gpu is None else self.gpu.stream()
        # Each with what says when it has been copied from, which is waited for before it is filled again.
        self._buffers: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self.use_batches_of(placement.batch_size or _own_batch_size(self.gpu))
        self._thread = _graph_thread() if placement.compiled else ThreadPoolExecutor(1, "torch")
        self._is_compiled = placement.compiled
        if placement.compiled:
            mode = "default" if self.gpu is None else "reduce-overhead"
            self._network = self._thread.submit(compiled, self._network, mode).result()
            # By the way that the work takes, and twice, as a graph is recorded in the second call.
            for _ in range(2):
                self.embed(np.zeros((1, *crop, 3), np.uint8), np.zeros(1, np.int64))

    @property
    def batch_size(self) -> int:
        """Images a batch, now."""
        return self._batch_size

    def use_batches_of(self, batch_size: int) -> None:
        """Compute in batches of so many images from now on."""
        self._batch_size = batch_size
        self._buffers.clear()

    def memory_share(self) -> float:
        """Of the device's memory, what torch has held at most; 0 on CPUs, whose memory is for others, too."""
        return 0.0 if self.gpu is None else self.gpu.most_held_bytes / self.gpu.total_bytes

    def embed(self, pixels: np.ndarray[Any, Any] | Tensor, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`, as `pipeline.embedding.embedder.Runner.embed` does.

        Raises:
            RuntimeError: torch's own; of memory where that does not even hold one image.
        """
        embedded, in_flight = self._thread.submit(self._launched, pixels, rows).result()
        for batch in in_flight:
            self._fetch(batch, embedded)
        return embedded

    def _launched(self, pixels: Any, rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], deque[_Batch]]:
        """All batches of a call, in sizes that fit: the embeddings, and the batches that they still lack."""
        while True:
            try:
                return self._launch_all(pixels, rows)
            except RuntimeError as error:
                if self._batch_size == 1 or not lacks_memory(error):
                    raise
            # Outside of the handler, whose traceback holds what fills the memory.
            if self.gpu is not None:
                self.gpu.synchronize()
            self.use_batches_of(self._batch_size // 2)
            if self._is_compiled:
                # Recorded graphs hold the memory that they were recorded with.
                torch.compiler.reset()
            if self.gpu is not None:
                self.gpu.free_cache()

    def _launch_all(self, pixels: Any, rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], deque[_Batch]]:
        in_flight: deque[_Batch] = deque()
        embedded = np.empty((0,), np.float32)
        with torch.inference_mode():
            for start in range(0, max(len(rows), 1), self._batch_size):
                if len(in_flight) == _IN_FLIGHT:
                    self._fetch(in_flight.popleft(), embedded)
                in_flight.append(self._launch(pixels, rows, start))
                if start == 0:
                    embedded = np.empty((len(rows), *in_flight[0].features.shape[1:]), np.float32)
        return embedded, in_flight

    def _launch(self, pixels: Any, rows: np.ndarray[Any, Any], start: int) -> _Batch:
        """Start one batch on the device."""
        batch = rows[start : start + self._batch_size]
        place = slice(start, start + len(batch))
        # numpy's are in host memory, torch's where it computes.
        images = self._copied(pixels, batch) if isinstance(pixels, np.ndarray) else self._gathered(pixels, batch)
        if self.gpu is None:
            return _Batch(self._network(images), place, None)
        span = self.gpu.span()
        features = self._network(images)
        host = self.gpu.pinned(features.shape, features.dtype)
        host.copy_(features, non_blocking=True)
        span.ended.record()
        return _Batch(host, place, span)

    def _fetch(self, batch: _Batch, embedded: np.ndarray[Any, Any]) -> None:
        """Put a batch's embeddings into those of its call, when the device is done with them."""
        if self.gpu is not None and batch.span is not None:
            batch.span.ended.synchronize()
            self.gpu.add_busy(batch.span)
        embedded[batch.rows] = batch.features.numpy()[: batch.rows.stop - batch.rows.start]

    def _copied(self, pixels: np.ndarray[Any, Any], batch: np.ndarray[Any, Any]) -> Tensor:
        """A batch on its way to the device, padded."""
        buffer, free = self._buffer()
        if free is not None:
            free.synchronize()
        staged = buffer.numpy()
        np.take(pixels, batch, axis=0, out=staged[: len(batch)], mode="clip")
        staged[len(batch) :] = 0
        if self.gpu is None or self._copies is None or free is None:
            return buffer
        with self.gpu.using(self._copies):
            copied = buffer.to(self._device, non_blocking=True)
            free.record()
        computes = self.gpu.current_stream()
        computes.wait_stream(self._copies)
        # Its memory is the other stream's, and is not to be given away before the batch is computed.
        copied.record_stream(computes)
        return copied

    def _buffer(self) -> tuple[Tensor, torch.cuda.Event | None]:
        """The one that was filled the longest ago; a new one while they are few."""
        if len(self._buffers) < _IN_FLIGHT:
            shape = (self._batch_size, *self._crop, 3)
            if self.gpu is None:
                self._buffers.append((torch.empty(shape, dtype=torch.uint8), None))
            else:
                self._buffers.append((self.gpu.pinned(shape, torch.uint8), self.gpu.event()))
        else:
            self._buffers.rotate(-1)
        return self._buffers[-1]

    def _gathered(self, pixels: Tensor, batch: np.ndarray[Any, Any]) -> Tensor:
        """A batch of what is on the device already, padded."""
        gathered = pixels.new_zeros((self._batch_size, *self._crop, 3))
        # By runs of neighbours, of which there are few: to choose by an index that comes from the host, the device
        # would first do all that it was given before.
        ends = np.flatnonzero(np.diff(batch) != 1) + 1
        for start, end in zip([0, *ends], [*ends, len(batch)], strict=True):
            if end > start:
                gathered[start:end] = pixels[int(batch[start]) : int(batch[end - 1]) + 1]
        return gathered


@functools.cache
def _graph_thread() -> ThreadPoolExecutor:
    """The thread of all compiled runners: CUDA graphs belong to the one that recorded them.

    In torch 2.11 no second thread of a process can record any.
    """
    return ThreadPoolExecutor(1, "torch-graphs")


def _own_batch_size(gpu: Gpu | None) -> int:
    if gpu is None:
        return _CPU_BATCH
    return _LARGE_GPU_BATCH if gpu.total_bytes >= _LARGE_GPU_BYTES else _GPU_BATCH
