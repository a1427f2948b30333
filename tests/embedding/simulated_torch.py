"""torch's own operations on the GPU that does not exist: launched in the stream of their thread, they run later.

Its tensors have a device that torch knows and never starts. What they hold lies in the simulated memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torchcodec.decoders import decode_jpeg

from tests.embedding.simulated_gpu import SimulatedGpu, Stream

DEVICE = torch.device("meta")
_MS = 1.0


class TorchGpu(SimulatedGpu):
    """A simulated GPU for torch's operations, and for a decoder of JPEGs."""

    def __init__(self, seed: int = 0, eagerness: float = 0.0, *, lacks: str = "") -> None:
        super().__init__(seed, eagerness, lacks=lacks)
        self.device = DEVICE
        # Beside all streams, as nvJPEG's hardware is.
        self._hardware: Stream | None = None

    def operations(self) -> TorchDispatchMode:
        """The block, of one thread, in which what is done with its tensors is launched."""
        return _Operations(self)

    def decode_jpeg(self, images: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        """As TorchCodec's: hardware that waits for no stream, and then a kernel that makes RGB of what it gives."""
        self._hardware = self._hardware or self.stream()
        decoded = [decode_jpeg(image) for image in images]
        # Freed when all is launched, as what the library keeps for a call.
        between = [Memory(self, pixels.nbytes, self._hardware) for pixels in decoded]
        return [self._made(*each, self._hardware) for each in zip(decoded, between, strict=True)]

    def _made(self, pixels: torch.Tensor, between: Memory, hardware: Stream) -> torch.Tensor:
        planes = between.array.view(torch.uint8).view(pixels.shape)
        done = self.launch(hardware, lambda: planes.copy_(pixels), takes_ms=_MS)
        stream = self.current_stream()
        self.launch(stream, lambda: None, waits_for=done)
        rgb = OnDevice.like(self, pixels)
        target = rgb.held
        self.launch(stream, lambda: target.copy_(planes), takes_ms=_MS)
        return rgb


class Memory:
    """Of the simulated device; freed when nobody has it."""

    def __init__(self, gpu: SimulatedGpu, num_bytes: int, writer: Stream | None = None) -> None:
        self._gpu, self._stream = gpu, gpu.current_stream()
        self._bytes = gpu.allocate(self._stream, max(num_bytes, 1), writer)
        self.array = torch.from_numpy(self._bytes)[:num_bytes]

    def __del__(self) -> None:
        self._gpu.free(self._stream, self._bytes, [])


class OnDevice(torch.Tensor):
    """A tensor of the simulated device: `held` is what it has once its stream has come so far."""

    held: torch.Tensor
    memory: Memory
    gpu: TorchGpu

    @staticmethod
    def of(gpu: TorchGpu, real: torch.Tensor, memory: Memory) -> OnDevice:
        self = torch.Tensor._make_wrapper_subclass(
            OnDevice, real.shape, real.stride(), real.storage_offset(), dtype=real.dtype, device=DEVICE
        )
        self.gpu, self.held, self.memory = gpu, real, memory
        return self

    @staticmethod
    def like(gpu: TorchGpu, shape: torch.Tensor) -> OnDevice:
        """A new one of this shape, with nothing in it."""
        memory = Memory(gpu, shape.numel() * shape.element_size())
        # Not before the memory is aligned: a view of another type asks for that.
        real = memory.array.view(shape.dtype)
        return OnDevice.of(gpu, real.as_strided(shape.shape, shape.stride()), memory)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is launched outside of the block of the device's operations")


class _Operations(TorchDispatchMode):
    """Within its block, what is done with tensors of the device is launched there."""

    def __init__(self, gpu: TorchGpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if OnDevice not in types and device != DEVICE.type:
            return func(*args, **kwargs)
        real_args, real_kwargs = tree_map_only(OnDevice, lambda one: one.held, (args, kwargs))
        stream = self._gpu.current_stream()
        if device == "cpu" or func is torch.ops.aten._local_scalar_dense.default:
            stream.synchronize()
            return func(*real_args, **real_kwargs)
        if device is not None:
            real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
        changed = [one for one, told in zip(args, func._schema.arguments, strict=False) if _is_written(told)]
        if changed:
            self._gpu.launch(stream, lambda: func(*real_args, **real_kwargs), takes_ms=_MS)
            return changed[0]
        if func._schema.returns[0].alias_info is not None:
            views = func(*real_args, **real_kwargs)
            return tree_map_only(torch.Tensor, lambda view: OnDevice.of(self._gpu, view, args[0].memory), views)
        if func is torch.ops.aten._to_copy.default and OnDevice not in types:
            # From memory that is not pinned: it is read before the call returns.
            real_args = (args[0].clone(),)
        made = OnDevice.like(self._gpu, _shape(func, real_args, real_kwargs))
        target = made.held
        self._gpu.launch(stream, lambda: target.copy_(func(*real_args, **real_kwargs)), takes_ms=_MS)
        return made


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _shape(func: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """What the operation gives, without its values."""
    meta_args, meta_kwargs = tree_map_only(
        torch.Tensor, lambda one: one if one.dim() == 0 else one.to("meta"), (args, kwargs)
    )
    if "device" in meta_kwargs:
        meta_kwargs = {**meta_kwargs, "device": torch.device("meta")}
    return func(*meta_args, **meta_kwargs)
