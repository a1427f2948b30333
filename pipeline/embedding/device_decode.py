"""Plain JPEGs to uint8 RGB pixels on the device of the backbone: nvJPEG on a GPU, libjpeg on a CPU.

The pixels are not those of the CPU: a GPU's decoder rounds, and widens colours that are stored at half the size, in
its own way.
"""

from __future__ import annotations

import queue
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack
from torchcodec.decoders import decode_jpeg

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.schema import ENCODED
from shard_embedder.pipeline.decoding import child
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import PIXELS_ALREADY
from shard_embedder.pipeline.embedding.device_resize import Group, Plan, plan_resizes, resize_group
from shard_embedder.pipeline.embedding.embedder import PARTS_AT_ONCE, PartPixels
from shard_embedder.pipeline.embedding.gpu import Gpu, Span, lacks_memory, use_exact_fp32
from shard_embedder.pipeline.embedding.tries import counted_try

# Groups of a part whose pixels the device still makes, while the next one is decoded: each holds memory until then.
_IN_FLIGHT = 2
# Times that a part may end its process, or fail, while the device decodes it; then the CPU does, in a child process.
_MOST_TRIES = 2


@dataclass
class _Part:
    """The JPEGs of a part in the order of `plan`, and where their pixels go."""

    jpegs: list[Tensor]
    sizes: list[tuple[int, ...]]  # of their pixels [3, H, W]
    plan: Plan
    axes: Tensor  # `plan.axes` on the device
    places: Tensor  # among `pixels`, on the device
    pixels: Tensor
    refusal: str | None = None


class _Lane:
    """Decodes one part at a time. On a GPU it has its own streams and its own groups in flight."""

    def __init__(self, gpu: Gpu | None) -> None:
        self._gpu = gpu
        self._decodes = None if gpu is None else gpu.stream()
        self._resizes = None if gpu is None else gpu.stream()
        # Groups, each of which ends with its span; what was decoded is not freed before it has been resized.
        self._in_flight: deque[tuple[Span, list[Tensor]]] = deque()

    def resizing(self) -> AbstractContextManager[Any]:
        """Launch in the stream that resizes meanwhile."""
        return nullcontext() if self._gpu is None or self._resizes is None else self._gpu.using(self._resizes)

    def decoded(self, images: list[Tensor], device: torch.device) -> tuple[list[Tensor], Span | None]:
        """Each image as uint8 [3, H, W] on the device, for the stream that resizes, and when that began.

        Raises `RuntimeError`.
        """
        if self._gpu is None or self._decodes is None or self._resizes is None:
            return decode_jpeg(images, device=device), None
        self._finish(_IN_FLIGHT - 1)
        # nvJPEG's hardware does not wait for the stream that it is given: memory that was freed there may be read by
        # what is still to run.
        self._decodes.synchronize()
        with self._gpu.using(self._decodes):
            span = self._gpu.span()
            decoded: list[Tensor] = decode_jpeg(images, device=device)
        self._resizes.wait_stream(self._decodes)
        return decoded, span

    def launched(self, span: Span | None, images: list[Tensor]) -> None:
        """All that resizes a group is launched."""
        if span is not None:
            span.ended.record()
            self._in_flight.append((span, images))

    def finish(self) -> None:
        """Wait for all groups."""
        if self._resizes is not None:
            # They are computed with in another stream.
            self._resizes.synchronize()
            self._finish(0)

    def _finish(self, most: int) -> None:
        """Wait until at most so many groups are in flight."""
        while self._gpu is not None and len(self._in_flight) > most:
            span, _ = self._in_flight.popleft()
            span.ended.synchronize()
            self._gpu.add_busy(span)


class DeviceDecoder:
    """Makes the pixels of parts on one device; `decoder` takes what that refuses, so that errors are its own.

    `PARTS_AT_ONCE` threads decode a part each, and others wait. On a GPU all is done in streams beside what the
    backbone computes: while one resizes a group of images, another decodes the next. `gpu` is told how long; what its
    decoder does on the host meanwhile counts, too, since no event can be recorded inside it.

    Raises:
        RuntimeError: the device decodes nothing, not even the JPEG that it is tried with.
    """

    def __init__(self, decoder: Decoder, device: str, gpu: Gpu | None = None) -> None:
        self._decoder = decoder
        self._preprocess = decoder.rules.preprocess
        self._gpu = Gpu(torch.device(device)) if gpu is None and torch.device(device).type == "cuda" else gpu
        self._device = torch.device(device) if self._gpu is None else self._gpu.device
        self._lanes: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        if self._gpu is not None:
            # TF32 would round the weights of pixels to 10 bits.
            use_exact_fp32()
        # With one lane, the GPU waits while the host prepares the next group.
        lanes = [_Lane(self._gpu) for _ in range(PARTS_AT_ONCE)]
        # Otherwise a device that decodes nothing would refuse each image, and the CPU would decode them one by one.
        lanes[0].decoded([from_dlpack(np.frombuffer(bytearray(_TINY), np.uint8))], self._device)
        for lane in lanes:
            self._lanes.put(lane)

    def __call__(self, samples: pa.StructArray, rows: np.ndarray[Any, Any], part: str) -> PartPixels:
        """As `pipeline.embedding.embedder.Intake` does; the pixels are a tensor on the device."""
        lane = self._lanes.get()
        try:
            with counted_try(part) as num_tries, lane.resizing():
                made = self._made(lane, samples, rows, num_tries)
                lane.finish()
                return made
        finally:
            self._lanes.put(lane)

    def _made(self, lane: _Lane, samples: pa.StructArray, rows: np.ndarray[Any, Any], num_tries: int) -> PartPixels:
        crop = self._preprocess.crop
        encoded = samples.field(ENCODED)
        orientations = _column(encoded, "orientation", rows)
        data = _views(encoded.field("data"), rows)
        pixels = torch.zeros((len(rows), *crop, 3), dtype=torch.uint8, device=self._device)
        is_pixels = orientations == PIXELS_ALREADY
        ready, places = np.flatnonzero(is_pixels), np.flatnonzero(~is_pixels)
        if len(ready):
            whole = torch.stack([data[place] for place in ready]).to(self._device)
            pixels[self._uploaded(ready)] = whole.view(-1, *crop, 3)
        sizes = np.stack([_column(encoded, side, rows)[places] for side in ("height", "width")], 1)
        plan = plan_resizes(sizes, orientations[places], self._preprocess)
        places = places[plan.order]
        part = _Part(
            [data[place] for place in places],
            [(3, *size) for size in sizes[plan.order].tolist()],
            plan,
            self._uploaded(plan.axes),
            self._uploaded(places),
            pixels,
        )
        is_deadly = num_tries >= _MOST_TRIES
        if is_deadly:
            part.refusal = f"{num_tries} times the process died, or failed, while its device decoded this part"
            refused = list(range(len(places)))
        else:
            refused = [number for group in plan.groups for number in self._refused(lane, part, group)]
        faults: dict[int, str] = {}
        num_refused = 0
        for place in places[refused]:
            image = _with_orientation(data[place].numpy().tobytes(), int(orientations[place]))
            try:
                found = child.decode(image, self._decoder.rules)[0] if is_deadly else self._decoder.decode(image)
            except SampleError as error:
                faults[int(rows[place])] = str(error)
                continue
            pixels[place] = torch.from_numpy(np.array(found)).to(self._device)
            num_refused += 1
        good = np.array([place for place, row in enumerate(rows) if int(row) not in faults], np.int64)
        return PartPixels(pixels, good, faults, num_refused, part.refusal if num_refused else None)

    def _uploaded(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)

    def _refused(self, lane: _Lane, part: _Part, group: Group, *, may_retry: bool = True) -> list[int]:
        """Make the pixels of a group; those that the device refuses, each of them alone."""
        try:
            self._make(lane, part, group)
            return []
        except RuntimeError as error:
            is_of_memory = lacks_memory(error)
            if isinstance(error, torch.AcceleratorError) and not is_of_memory:
                # The device has failed, not an image: nothing more is computed there.
                raise
            part.refusal = part.refusal or describe(error)
        # Outside of the handler, whose traceback holds what fills the memory.
        if is_of_memory and may_retry:
            self._free_memory()
            return self._refused(lane, part, group, may_retry=False)
        if group.end - group.start == 1:
            return [group.start]
        return [number for half in group.halves() for number in self._refused(lane, part, half, may_retry=may_retry)]

    def _make(self, lane: _Lane, part: _Part, group: Group) -> None:
        """Decode and resize a group. Raises `RuntimeError` where the device refuses an image, or lacks the memory."""
        chosen = slice(group.start, group.end)
        images, span = lane.decoded(part.jpegs[chosen], self._device)
        for image, size in zip(images, part.sizes[chosen], strict=True):
            if image.shape != size:
                raise RuntimeError(f"decoded to {tuple(image.shape)}, and its header says {size}")
        part.pixels[part.places[chosen]] = resize_group(images, part.axes[chosen], group, self._preprocess)
        lane.launched(span, images)

    def _free_memory(self) -> None:
        if self._gpu is not None:
            self._gpu.synchronize()
            self._gpu.free_cache()


# What a device is tried with.
_TINY: bytes = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))


def _with_orientation(data: bytes, orientation: int) -> bytes:
    """A JPEG without metadata, with its EXIF orientation."""
    if orientation == 1:
        return data
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    told = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(told) + 2).to_bytes(2, "big") + told + data[2:]


def _column(encoded: pa.StructArray, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
    values: np.ndarray[Any, np.dtype[np.int64]] = (
        encoded.field(name).to_numpy(zero_copy_only=False)[rows].astype(np.int64)
    )
    return values


def _views(data: pa.LargeBinaryArray, rows: np.ndarray[Any, Any]) -> list[Tensor]:
    """These rows of `data`, uint8 [num_bytes] each, where they are: nothing is copied."""
    _, offsets, values = data.buffers()
    if values is None:
        return [torch.empty(0, dtype=torch.uint8) for _ in rows]
    ends = np.frombuffer(offsets, np.int64)[data.offset : data.offset + len(data) + 1]
    # By DLPack, as torch asks of other buffers that they can be written.
    whole = from_dlpack(pa.Array.from_buffers(pa.uint8(), values.size, [None, values]))
    return [whole[start:end] for start, end in zip(ends[rows].tolist(), ends[rows + 1].tolist(), strict=True)]
