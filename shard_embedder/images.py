"""Images to embeddings in this process: what the job does to an image, without shards, Ray or files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import PIL.Image

from shard_embedder.pipeline.backbones import library_of, load_weights
from shard_embedder.pipeline.backbones.base import check_features
from shard_embedder.pipeline.backbones.transform import ImageLike, decode_image
from shard_embedder.pipeline.core.config import AUTO, PRECISIONS, Config
from shard_embedder.pipeline.core.errors import InputError, SettingsError
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.embedding.embedder import Runner
from shard_embedder.pipeline.embedding.network import Network, Placement
from shard_embedder.pipeline.embedding.recipe import recipe_of
from shard_embedder.pipeline.embedding.torch_runner import SharedWeights, device_here
from shard_embedder.pipeline.output.fingerprint import Fingerprint

Vectors = np.ndarray[Any, np.dtype[np.float32]]
_PRECISIONS = tuple(precision for precision in PRECISIONS if precision != AUTO)
# Images in memory at once.
_BATCH = 64


class Images:
    """Embeds images with one network, loaded once."""

    def __init__(self, runner: Runner, rules: DecodingRules) -> None:
        self._runner = runner
        self._decoder = Decoder(rules)

    @classmethod
    def as_made(cls, made: Fingerprint, weights: str | None = None) -> Images:
        """As the images of an output were embedded.

        Raises:
            WeightsError: its weights cannot be had.
        """
        recipe = recipe_of(made, weights)
        placement = Placement(device=device_here("auto"), precision=recipe.settings.precision)
        return cls(SharedWeights.of(recipe.weights).runner(recipe.network, placement), recipe.settings.rules)

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> tuple[list[str], Vectors]:
        """Ids, and embeddings float32 [N, C]; of one image, [1, C]."""
        several = [images] if isinstance(images, (str, os.PathLike, bytes, PIL.Image.Image)) else list(images)
        if isinstance(images, np.ndarray) and images.ndim == 3:
            several = [images]
        ids = [str(one) if isinstance(one, (str, os.PathLike)) else str(i) for i, one in enumerate(several)]
        vectors = [self._embedded(several[start : start + _BATCH]) for start in range(0, len(several), _BATCH)]
        if not vectors:
            raise InputError("images must be at least one, got none")
        return ids, np.concatenate(vectors)

    def _embedded(self, images: Iterable[ImageLike]) -> Vectors:
        pixels = np.stack([decode_image(image, self._decoder) for image in images])
        return self._runner.embed(pixels, np.arange(len(pixels)))


def embed_images(
    images: ImageLike | Sequence[ImageLike],
    backbone: str = "resnet50",
    *,
    weights: str = "DEFAULT",
    preprocess: str = "DEFAULT",
    image_size: tuple[int, int] | None = None,
    features: str = "pooled",
    normalize: bool = False,
    device: str = "auto",
    precision: str = "fp32",
) -> tuple[list[str], Vectors]:
    """Embed images in this process, as the job would.

    Args:
        images: paths, encoded bytes, PIL images or uint8 arrays [H, W, 3]; or one of these.
        backbone: torchvision's name of a classifier, `resnet50_stride1`, or `timm/NAME`.
        weights: `DEFAULT`, a name, a path, a URL, or `random:SEED`.
        preprocess: whose preprocessing to use for weights from a file or random.
        image_size: (height, width) that the backbone sees; None for that of its weights.
        features: `pooled` for [N, C], `map` for [N, C, H, W]. `build_backbone` gives the maps of several layers.
        normalize: scale each embedding to L2 length 1.
        device: `cpu`, `cuda`, or `auto`.
        precision: `fp32`, `bf16` or `fp16`.

    Returns:
        The ids (the path of a file, else the position) and float32 embeddings.

    Raises:
        BackboneError, WeightsError: unknown, or cannot be had.
        SettingsError: device or precision is none of these, or the device is cuda where there is none.
        InputError: an image is not found, or an array is not uint8 [H, W, 3].
        SampleError: an image cannot be decoded.
    """
    check_features(features)
    if precision not in _PRECISIONS:
        raise SettingsError(f"precision must be one of {', '.join(_PRECISIONS)}, got {precision!r}")
    library = library_of(backbone)
    name = library.find(backbone)
    prepared: Preprocess = library.preprocess_for(name, weights, preprocess)
    if image_size is not None:
        prepared = prepared.with_size(image_size)
    network = Network(backbone=name, preprocess=prepared, features=features, normalize=normalize)
    source = SharedWeights.of(load_weights(name, weights))
    runner = source.runner(network, Placement(device=device_here(device), precision=precision))
    rules = DecodingRules(preprocess=prepared, max_pixels=Config.max_pixels)
    return Images(runner, rules)(images)
