"""Images to what a backbone takes, exactly as the job makes it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import InputError, SampleError
from shard_embedder.pipeline.core.storage import read_bytes
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.pillow import to_rgb
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.resize import resize_crop
from shard_embedder.pipeline.decoding.rules import DecodingRules

# A path or URL, an encoded image, an image of Pillow, or uint8 RGB of shape [H, W, 3].
ImageLike = str | os.PathLike[str] | bytes | Image.Image | np.ndarray[Any, np.dtype[np.uint8]]


class Normalize(nn.Module):
    """uint8 RGB [N, H, W, 3] to (x / 255 - mean) / std, float32 [N, 3, H, W]."""

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        # As one multiplication and one addition.
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("scale", (1.0 / (255.0 * std))[None, :, None, None])
        self.register_buffer("shift", (-mean / std)[None, :, None, None])
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised images, one for each of `pixels`."""
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.shift


class Transform:
    """Decodes, turns upright, resizes, crops and normalises images as a job does with its default options.

    transform("photo.jpg")                   # [3, H, W]
    transform(["photo.jpg", image, array])   # [N, 3, H, W]
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self.preprocess = preprocess
        self._decoder = Decoder(DecodingRules(preprocess=preprocess, max_pixels=Config.max_pixels))
        self._normalize = Normalize(preprocess)

    def __call__(self, images: ImageLike | list[ImageLike] | tuple[ImageLike, ...]) -> Tensor:
        """float32 [3, H, W] of one image; of a list or tuple [N, 3, H, W].

        An image of Pillow is turned as its EXIF orientation says. An array is taken to be upright.

        Raises:
            InputError: a path that is not there.
            SampleError: not an image, broken, or larger than a job takes.
        """
        several = images if isinstance(images, list | tuple) else [images]
        pixels = np.empty((len(several), *self.preprocess.crop, 3), np.uint8)
        for row, image in enumerate(several):
            pixels[row] = self._pixels(image)
        normalized: Tensor = self._normalize(torch.from_numpy(pixels))
        return normalized if several is images else normalized[0]

    def _pixels(self, image: ImageLike) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 RGB of shape [H, W, 3]."""
        if isinstance(image, bytes):
            return self._decoder.decode(image)
        if isinstance(image, str | os.PathLike):
            try:
                return self._decoder.decode(read_bytes(os.fspath(image)))
            except FileNotFoundError as error:
                raise InputError(f"image {os.fspath(image)} not found") from error
        if isinstance(image, Image.Image):
            return resize_crop(to_rgb(ImageOps.exif_transpose(image)), self.preprocess)
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise SampleError(f"an image array must be uint8 of shape [H, W, 3], got {_told(image)}")
        return resize_crop(image, self.preprocess)


def _told(image: Any) -> str:
    return f"{image.dtype} of shape {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
