"""The backbone on torch: on a GPU, and on CPUs where nothing faster computes it."""

from __future__ import annotations

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
from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.embedding.network import Network, Placement

BATCH_SIZES = {"cuda": 128, "cpu": 16}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Batches on their way through the device at once: one computes while the next is copied in and the last out.
_IN_FLIGHT = 3


def device_here(asked: str) -> str:
    """`cpu` or `cuda`, where `auto` is the GPU that torch sees, if any.

    Raises:
        SettingsError: the device is cuda, and there is none.
    """
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

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [N, C] or [N, C, H', W']."""
        images = self.normalize_pixels(pixels)
        features: Tensor = self.backbone(images.to(self.dtype, memory_format=torch.channels_last)).float()
        if self.normalize:
            # A vector of length 0 has no direction: it becomes NaN, and so a row of errors.
            features = features / features.norm(dim=1, keepdim=True)
        return features


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
    copied: torch.cuda.Event | None  # when they are there; None where they are already
    num_images: int  # without the padding

    def fetch(self) -> np.ndarray[Any, Any]:
        """Its embeddings, when the device is done with them."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.features.numpy()[: self.num_images].copy()


class TorchRunner:
    """One backbone on one device.

    Calls of `embed` from several threads take turns in one that is the runner's own: CUDA graphs belong to the
    thread that recorded them. A turn ends when the call's last batch is on its way: while a GPU computes that, the
    next call's first is copied to it. Batches have one fixed shape (the last is padded), so that an embedding does
    not depend on what else is in its batch. Where the device's memory does not hold a batch they are halved, for
    good; kernels of another shape may round the last bit otherwise.

    With `compiled`, torch.compile fuses what is between the convolutions, and on a GPU replays CUDA graphs. That
    takes a C compiler and some ten seconds for each batch size; torch keeps what it made on disk, for the next actor.
    """

    def __init__(self, network: NetworkModule, crop: tuple[int, int], placement: Placement) -> None:
        if placement.num_threads is not None:
            # Ray sets OMP_NUM_THREADS from the CPUs that the actor reserves; it may use more than it reserves.
            torch.set_num_threads(placement.num_threads)
        self._device = torch.device(placement.device)
        if placement.precision == "fp32":
            # On GPUs cuDNN's convolutions would round their inputs to 10 bits (TF32), as fp16 does.
            torch.backends.cudnn.allow_tf32 = False
        self._crop = crop
        module = network.as_precision(_DTYPES[placement.precision]).eval().to(self._device)
        self._network: Callable[[Tensor], Tensor] = module
        # What is copied in the stream that computes would wait for the batch before.
        on_gpu = self._device.type == "cuda"
        self._copies = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self.use_batches_of(placement.batch_size or BATCH_SIZES[self._device.type])
        self._thread = ThreadPoolExecutor(1, "torch")
        self._is_compiled = placement.compiled
        if placement.compiled:
            mode = "reduce-overhead" if self._device.type == "cuda" else "default"
            self._network = torch.compile(self._network, mode=mode, dynamic=False)
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
        on_gpu = self._device.type == "cuda"
        # Each with what says when it has been copied from, which is waited for before it is filled again.
        self._buffers = deque(
            (
                torch.empty((batch_size, *self._crop, 3), dtype=torch.uint8, pin_memory=on_gpu),
                torch.cuda.Event(blocking=True) if on_gpu else None,  # type: ignore[no-untyped-call]
            )
            for _ in range(_IN_FLIGHT)
        )

    def memory_share(self) -> float:
        """Of the device's memory, what torch has held at most; 0 on CPUs, whose memory is for others, too."""
        if self._device.type != "cuda":
            return 0.0
        total = torch.cuda.get_device_properties(self._device).total_memory
        return float(torch.cuda.max_memory_reserved(self._device)) / float(total)

    def embed(self, pixels: np.ndarray[Any, Any] | Tensor, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`, as `pipeline.embedding.embedder.Runner.embed` does.

        Raises:
            torch.OutOfMemoryError: not even one image fits into the device's memory.
        """
        done, in_flight = self._thread.submit(self._launched, pixels, rows).result()
        return np.concatenate([*done, *(batch.fetch() for batch in in_flight)])

    def _launched(
        self, pixels: np.ndarray[Any, Any] | Tensor, rows: np.ndarray[Any, Any]
    ) -> tuple[list[np.ndarray[Any, Any]], deque[_Batch]]:
        """All batches of a call, in sizes that fit: the embeddings of the first, and the last ones in flight."""
        while True:
            try:
                return self._launch_all(pixels, rows)
            except torch.OutOfMemoryError:
                if self._batch_size == 1:
                    raise
            # Outside of the handler, whose traceback holds what fills the memory.
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.use_batches_of(self._batch_size // 2)
            if self._is_compiled:
                # Recorded graphs hold the memory that they were recorded with.
                torch.compiler.reset()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _launch_all(
        self, pixels: np.ndarray[Any, Any] | Tensor, rows: np.ndarray[Any, Any]
    ) -> tuple[list[np.ndarray[Any, Any]], deque[_Batch]]:
        # What is on the device is chosen there: an upload for each batch would wait for the batch before.
        chosen = (
            torch.from_numpy(np.ascontiguousarray(rows)).to(pixels.device) if isinstance(pixels, Tensor) else rows
        )
        in_flight: deque[_Batch] = deque()
        done: list[np.ndarray[Any, Any]] = []
        with torch.inference_mode():
            for start in range(0, len(rows), self._batch_size):
                if len(in_flight) == _IN_FLIGHT:
                    done.append(in_flight.popleft().fetch())
                in_flight.append(self._launch(pixels, chosen[start : start + self._batch_size]))
        return done, in_flight

    def _launch(self, pixels: Any, batch: Any) -> _Batch:
        """Start one batch on the device."""
        features = self._network(
            self._gathered(pixels, batch) if isinstance(pixels, Tensor) else self._copied(pixels, batch)
        )
        if self._device.type != "cuda":
            return _Batch(features, None, len(batch))
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        host.copy_(features, non_blocking=True)
        # Whoever waits for it shall not keep a core busy, which decodes meanwhile.
        copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record()
        return _Batch(host, copied, len(batch))

    def _copied(self, pixels: np.ndarray[Any, Any], batch: np.ndarray[Any, Any]) -> Tensor:
        """A batch on its way to the device, padded."""
        buffer, free = self._buffers[0]
        self._buffers.rotate(-1)
        if free is not None:
            free.synchronize()
        staged = buffer.numpy()
        np.take(pixels, batch, axis=0, out=staged[: len(batch)], mode="clip")
        staged[len(batch) :] = 0
        if self._copies is None or free is None:
            return buffer
        with torch.cuda.stream(self._copies):
            copied = buffer.to(self._device, non_blocking=True)
            free.record()
        computes = torch.cuda.current_stream(self._device)
        computes.wait_stream(self._copies)
        # Its memory is the other stream's, and is not to be given away before the batch is computed.
        copied.record_stream(computes)
        return copied

    def _gathered(self, pixels: Tensor, batch: Tensor) -> Tensor:
        """A batch of what is on the device already, padded."""
        gathered = pixels.new_zeros((self._batch_size, *self._crop, 3))
        gathered[: len(batch)] = pixels[batch]
        return gathered
