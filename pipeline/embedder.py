"""The actor of the embed stage: one backbone on one device, pixels to embeddings."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from pipeline.backbones import Backbone, build_backbone
from pipeline.decode import Preprocess
from pipeline.schema import (
    EMBEDDING,
    PIXELS,
    REASON,
    STAGE,
    STAGE_EMBED,
    embedding_field,
    part_row,
    part_rows,
    with_payload,
)
from pipeline.weights import Weights

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Batches on their way through the device at once: one computes while the next is copied in and the last out.
_IN_FLIGHT = 3


@dataclass(frozen=True)
class SharedWeights:
    """Weights as they travel to the actors: random ones by their seed, others in the object store."""

    name: str
    sha256: str
    seed: int | None
    state: Any  # ObjectRef of dict[str, numpy array], or None

    @classmethod
    def share(cls, weights: Weights) -> SharedWeights:
        """Put the state dict into the object store, once for all actors."""
        if weights.state is None:
            return cls(weights.name, weights.sha256, weights.seed, None)
        # numpy arrays are read from shared memory in place, torch tensors would be copied.
        arrays = {key: value.detach().float().numpy() if value.is_floating_point() else value.numpy()
                  for key, value in weights.state.items()}  # fmt: skip
        return cls(weights.name, weights.sha256, None, ray.put(arrays))

    @classmethod
    def local(cls, weights: Weights) -> SharedWeights:
        """For an embedder in this process, without Ray."""
        return cls(weights.name, weights.sha256, weights.seed, weights.state)

    def get(self) -> Weights:
        """The weights, in this process."""
        if self.state is None or isinstance(self.state, dict):
            return Weights(self.name, self.sha256, self.state, self.seed)
        state = {key: torch.from_numpy(np.array(value)) for key, value in ray.get(self.state).items()}
        return Weights(self.name, self.sha256, state)


def _folded(backbone: nn.Module) -> nn.Module:
    """The backbone with its batch norms folded into the convolutions before them: the same function, faster.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018, section 3.2; done by `torch.fx`.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules()):
        return backbone
    return fuse(backbone.eval())


class _Embedding(nn.Module):
    """uint8 RGB [N, H, W, 3] to what is stored: normalisation, backbone, and L2 where asked."""

    def __init__(self, backbone: Backbone, preprocess: Preprocess, dtype: torch.dtype, normalize: bool) -> None:
        super().__init__()
        self.backbone = _folded(backbone).to(dtype).to(memory_format=torch.channels_last)
        # (x / 255 - mean) / std as one multiplication and one addition.
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("scale", (1.0 / (255.0 * std))[None, :, None, None])
        self.register_buffer("shift", (-mean / std)[None, :, None, None])
        self.scale: Tensor
        self.shift: Tensor
        self.dtype = dtype
        self.normalize = normalize

    def forward(self, pixels: Tensor) -> Tensor:
        images = pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift
        features: Tensor = self.backbone(images.to(self.dtype, memory_format=torch.channels_last)).float()
        if self.normalize:
            # A vector of length 0 has no direction: it becomes NaN, and so a row of errors.
            features = features / features.norm(dim=1, keepdim=True)
        return features


class Embedder:
    """Embeds parts: `__call__` takes and gives the tables between the stages.

    Batches have one fixed shape (the last of a part is padded) and never cross parts, so that a
    sample's embedding does not depend on what else runs.
    """

    def __init__(
        self,
        *,
        backbone: str,
        weights: SharedWeights,
        features: str,
        preprocess: Preprocess,
        shape: tuple[int, ...],
        dtype: str,
        precision: str,
        normalize: bool,
        device: str,
        batch_size: int,
        num_threads: int | None,
    ) -> None:
        if num_threads is not None:
            # Ray sets OMP_NUM_THREADS from the CPUs that the actor reserves; it may use more than it reserves.
            torch.set_num_threads(num_threads)
        self._device = torch.device(device)
        self._batch_size = batch_size
        self._crop = preprocess.crop
        self._field = embedding_field(shape, dtype)
        self._stored = np.dtype(dtype)
        module = build_backbone(backbone, weights.get(), features)
        self._model = _Embedding(module, preprocess, _DTYPES[precision], normalize).eval().to(self._device)
        on_gpu = self._device.type == "cuda"
        # One buffer more than batches in flight, so that none is filled while it is still copied from.
        self._buffers = [
            torch.empty((batch_size, *self._crop, 3), dtype=torch.uint8, pin_memory=on_gpu)
            for _ in range(_IN_FLIGHT + 1)
        ]
        self._next_buffer = 0

    def __call__(self, table: pa.Table) -> pa.Table:
        """Parts with pixels in, the same parts with embeddings out."""
        return pa.concat_tables([self._part(values, samples) for values, samples in part_rows(table)])

    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = time.perf_counter()
        stages, reasons = samples.field(STAGE).to_pylist(), samples.field(REASON).to_pylist()
        rows = np.flatnonzero([reason is None for reason in reasons])
        shape = self._storage_shape()
        stored = np.zeros((len(samples), *shape), self._stored)
        if len(rows):
            pixels = samples.field(PIXELS).values.to_numpy().reshape(-1, *self._crop, 3)
            offset = samples.field(PIXELS).offset
            with np.errstate(over="ignore"):
                embedded = self.embed(pixels, rows + offset).astype(self._stored).reshape(len(rows), *shape)
            stored[rows] = embedded
            for row in rows[~np.isfinite(embedded).all(axis=1)]:
                stages[row] = STAGE_EMBED
                reasons[row] = f"not finite: the embedding has NaN or infinite values as {self._stored}"
        column = self._column(stored, [reason is not None for reason in reasons])
        result = with_payload(
            samples,
            pa.field(EMBEDDING, column.type),
            **{
                STAGE: pa.array(stages, pa.string()),
                REASON: pa.array(reasons, pa.string()),
                EMBEDDING: column,
            },
        )
        return part_row({**values, "embed_s": time.perf_counter() - start}, result)

    def _storage_shape(self) -> tuple[int]:
        kind = self._field.type
        return (getattr(kind, "storage_type", kind).list_size,)

    def _column(self, stored: np.ndarray[Any, Any], failed: list[bool]) -> pa.FixedSizeListArray:
        kind = getattr(self._field.type, "storage_type", self._field.type)
        mask = pa.array(failed, pa.bool_()) if failed else None
        return pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), type=kind, mask=mask)

    def embed(self, pixels: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Embed `pixels[rows]`.

        Args:
            pixels: uint8 of shape [N, H, W, 3].
            rows: which of the N to embed, in order.

        Returns:
            float32 of shape [len(rows), C] or [len(rows), C, H', W'].
        """
        in_flight: deque[tuple[Tensor, Any, int]] = deque()
        done: list[np.ndarray[Any, Any]] = []

        def finish() -> None:
            features, copied, count = in_flight.popleft()
            if copied is not None:
                copied.synchronize()
            done.append(features.numpy()[:count].copy())

        with torch.inference_mode():
            for start in range(0, len(rows), self._batch_size):
                if len(in_flight) == _IN_FLIGHT:
                    finish()
                batch = rows[start : start + self._batch_size]
                in_flight.append((*self._launch(pixels, batch), len(batch)))
            while in_flight:
                finish()
        return np.concatenate(done)

    def _launch(self, pixels: np.ndarray[Any, Any], batch: np.ndarray[Any, Any]) -> tuple[Tensor, Any]:
        """Start one batch on the device; the result is there when the event is, or at once without one."""
        buffer = self._buffers[self._next_buffer]
        self._next_buffer = (self._next_buffer + 1) % len(self._buffers)
        staged = buffer.numpy()
        np.take(pixels, batch, axis=0, out=staged[: len(batch)], mode="clip")
        staged[len(batch) :] = 0
        features = self._model(buffer.to(self._device, non_blocking=True))
        if self._device.type != "cuda":
            return features, None
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        host.copy_(features, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return host, copied


def cpu_has_bf16() -> bool:
    """Whether this machine's processor computes bf16 natively (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
