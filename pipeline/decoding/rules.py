"""How images are decoded: one frozen value, which every decoder is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.versions import heif_version

# What decoding takes at most for each pixel, which is that of a WebP with alpha: 19.3 bytes were measured. But for
# JPEG 2000, whose decoder has 32 bits for each component: 24.6 bytes.
_BYTES_PER_PIXEL, _JPEG_2000_BYTES = 20, 32
_FIXED_BYTES = 192 * 2**20


def image_memory(max_pixels: int) -> int:
    """Bytes that decoding one image of so many pixels takes at most, its file and the programs aside."""
    return _FIXED_BYTES + _BYTES_PER_PIXEL * max_pixels


@dataclass(frozen=True, kw_only=True)
class DecodingRules:
    """What becomes of an image: the shape that the weights ask for, and what is refused."""

    preprocess: Preprocess
    max_pixels: int
    ignore_orientation: bool = False
    # Whether a picture of which a part is missing, or garbled, is as good as a whole one.
    accept_damaged: bool = False
    # Whether JPEGs are decoded at a fraction of their size, where that is still much larger than the resize makes it.
    scaled: bool = False
    # Processor time: how busy a machine is decides nothing.
    image_timeout_s: float = 30.0
    # Whether HEIC images are decoded. The process that makes the rules decides it by what is installed there: for a
    # job its driver. A node without pillow-heif is an error then, so that no image depends on the node it comes to.
    heif: bool = field(default_factory=lambda: heif_version() is not None)

    @property
    def memory_bytes(self) -> int:
        """What decoding one image takes at most, its file and the programs aside."""
        return image_memory(self.max_pixels)

    @property
    def jpeg_2000_pixels(self) -> int:
        """The pixels of a JPEG 2000 for which that is enough."""
        return (self.memory_bytes - _FIXED_BYTES // 2) // _JPEG_2000_BYTES
