"""Plain JPEGs to uint8 RGB pixels on the device of the backbone: nvJPEG on a GPU, libjpeg on a CPU.

The geometry is that of `pipeline.decoding.resize.resize_crop`. The pixels are not: a device's decoder rounds, and
widens colours that are stored at half the size, in its own way.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import ImageReadMode, decode_jpeg

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.groups import grouped
from shard_embedder.pipeline.core.schema import ENCODED
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.jpeg_forwarder import PIXELS_ALREADY
from shard_embedder.pipeline.decoding.preprocess import Preprocess, resized_size
from shard_embedder.pipeline.decoding.resize import TURNS, is_height_first

# What is decoded at once: enough to fill the device's decoder, and bounded whatever the images' size.
_GROUP_IMAGES = 64
_GROUP_PIXELS = 2**26


class _Jpeg(NamedTuple):
    """A JPEG, and its place among the pixels to be made."""

    place: int
    data: bytes
    height: int
    width: int
    orientation: int


class DeviceDecoder:
    """Makes the pixels of parts on one device; `decoder` takes what that refuses, so that errors are its own.

    Threads take turns: `decoder` may be of one thread, and what hides a warning is the process's. On a GPU all is
    done in a stream of its own, beside what the backbone computes.

    Raises:
        RuntimeError: the device decodes nothing, not even the JPEG that it is tried with.
    """

    def __init__(self, decoder: Decoder, device: str) -> None:
        self._decoder = decoder
        self._device = torch.device(device)
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._turn = threading.Lock()
        # Else each image would be refused, and decoded on the CPU one after the other, in silence.
        with self._own_stream():
            self._decode([_tensor(simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8)))])

    def __call__(
        self, samples: pa.StructArray, rows: np.ndarray[Any, Any]
    ) -> tuple[Tensor, np.ndarray[Any, Any], dict[int, str]]:
        """As `pipeline.embedding.embedder.Intake` does; the pixels are a tensor on the device."""
        with self._turn, self._own_stream():
            made = self._made(samples, rows)
            # They are computed with in another stream.
            self._finish()
            return made

    def _own_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _made(
        self, samples: pa.StructArray, rows: np.ndarray[Any, Any]
    ) -> tuple[Tensor, np.ndarray[Any, Any], dict[int, str]]:
        crop = self._decoder.rules.preprocess.crop
        pixels = torch.zeros((len(rows), *crop, 3), dtype=torch.uint8, device=self._device)
        encoded = samples.field(ENCODED)
        faults: dict[int, str] = {}
        jpegs: list[_Jpeg] = []
        for place, row in enumerate(rows):
            value = encoded[int(row)].as_py()
            if value["orientation"] == PIXELS_ALREADY:
                pixels[place] = _tensor(value["data"]).reshape(*crop, 3).to(self._device)
            else:
                jpegs.append(_Jpeg(place, **value))
        for group in grouped(jpegs, lambda jpeg: jpeg.height * jpeg.width, _GROUP_PIXELS, _GROUP_IMAGES):
            for jpeg, image in zip(group, self._decoded([jpeg.data for jpeg in group]), strict=True):
                try:
                    pixels[jpeg.place] = self._pixels(jpeg, image)
                except SampleError as error:
                    faults[int(rows[jpeg.place])] = str(error)
        good = np.array([place for place, row in enumerate(rows) if int(row) not in faults], np.int64)
        return pixels, good, faults

    def _decoded(self, images: list[bytes]) -> list[Tensor | None]:
        """Each image as uint8 [3, H, W] on the device; None where that refuses it."""
        try:
            return list(self._decode([_tensor(image) for image in images]))
        except RuntimeError:
            # One of them, or the device lacks the memory for all.
            return [None] if len(images) == 1 else [self._decoded([image])[0] for image in images]

    def _decode(self, images: list[Tensor]) -> list[Tensor]:
        # nvJPEG writes from a stream of torchvision's, which does not wait for this one: memory that was freed here,
        # and is given to it, may be read by what is still to run.
        self._finish()
        with warnings.catch_warnings():
            # What replaces it comes with a package of its own, torchcodec.
            warnings.filterwarnings("ignore", "The image decoding and encoding", DeprecationWarning)
            decoded: list[Tensor] = decode_jpeg(images, mode=ImageReadMode.RGB, device=self._device)
        return decoded

    def _pixels(self, jpeg: _Jpeg, image: Tensor | None) -> Tensor:
        """The image as the backbone is to see it, uint8 [H, W, 3]. Raises `SampleError`."""
        if image is not None and image.shape == (3, jpeg.height, jpeg.width):
            try:
                return resize_crop(upright(image, jpeg.orientation), self._decoder.rules.preprocess)
            except RuntimeError:  # too large for its memory, or for one of its kernels
                pass
        return torch.from_numpy(np.array(self._decoder.decode(jpeg.data))).to(self._device)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def upright(image: Tensor, orientation: int) -> Tensor:
    """An image [3, H, W] of an EXIF orientation (1 to 8), turned."""
    if orientation == 1:
        return image
    turned, mirrored = TURNS[orientation]
    return torch.rot90(image.flip(2) if mirrored else image, turned, (1, 2))


def resize_crop(image: Tensor, preprocess: Preprocess) -> Tensor:
    """uint8 RGB [3, H, W] as uint8 [H', W', 3]: `resize_crop` on the image's device."""
    height, width = preprocess.crop
    new_height, new_width = resized_size(image.shape[1], image.shape[2], preprocess)
    # One side, then the other, each rounded, in Pillow's order: a network sees the difference.
    first = (
        (new_height, image.shape[2])
        if is_height_first(image.shape[1], image.shape[2], new_height, new_width)
        else (image.shape[1], new_width)
    )
    between = _rounded(_resized(image, first, preprocess))
    resized = _rounded(_resized(between, (new_height, new_width), preprocess))
    seen_height, seen_width = min(height, new_height), min(width, new_width)
    top, left = round((new_height - seen_height) / 2.0), round((new_width - seen_width) / 2.0)
    seen = resized[:, top : top + seen_height, left : left + seen_width].permute(1, 2, 0)
    if (seen_height, seen_width) == preprocess.crop:
        return seen
    padded = seen.new_zeros((height, width, 3))
    top, left = (height - seen_height) // 2, (width - seen_width) // 2
    padded[top : top + seen_height, left : left + seen_width] = seen
    return padded


def _resized(image: Tensor, size: tuple[int, int], preprocess: Preprocess) -> Tensor:
    return interpolate(image[None].float(), size, mode=preprocess.interpolation, antialias=True)[0]


def _rounded(values: Tensor) -> Tensor:
    """As uint8: bicubic overshoots, and Pillow rounds halves up."""
    return (values + 0.5).clamp_(0, 255).to(torch.uint8)
