"""Turns images into the input of a backbone, exactly as a job does."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import InputError
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
        """float32 [3, H, W] of one image; of a list or tuple [N, 3, H, W]. Raises as `decode_image` does."""
        several = images if isinstance(images, list | tuple) else [images]
        pixels = np.empty((len(several), *self.preprocess.crop, 3), np.uint8)
        for row, image in enumerate(several):
            pixels[row] = decode_image(image, self._decoder)
        normalized: Tensor = self._normalize(torch.from_numpy(pixels))
        return normalized if several is images else normalized[0]


def decode_image(image: ImageLike, decoder: Decoder) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An image in any form as the decoder gives it: uint8 RGB [H, W, 3], resized and cropped.

    The EXIF orientation of a Pillow image counts as that of a file does. An array is upright.

    Raises:
        InputError: a path that is not there, or an array of another type or shape.
        SampleError: not an image, broken, or larger than a job takes.
    """
    rules = decoder.rules
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        try:
            image = read_bytes(path)
        except FileNotFoundError as error:
            raise InputError(f"image {path} not found") from error
    if isinstance(image, bytes):
        return decoder.decode(image)
    if isinstance(image, Image.Image):
        upright = image if rules.ignore_orientation else ImageOps.exif_transpose(image)
        return resize_crop(to_rgb(upright), rules.preprocess)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        is_array = isinstance(image, np.ndarray)
        got = f"{image.dtype} of shape {list(image.shape)}" if is_array else type(image).__name__
        raise InputError(f"an image array must be uint8 of shape [H, W, 3], got {got}")
    return resize_crop(np.ascontiguousarray(image), rules.preprocess)
