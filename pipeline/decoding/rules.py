"""How images are decoded: one frozen value, which every decoder is made of."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.decoding.preprocess import Preprocess


@dataclass(frozen=True, kw_only=True)
class DecodingRules:
    """What becomes of an image: the shape that the weights ask for, and what is refused."""

    preprocess: Preprocess
    max_pixels: int
    ignore_orientation: bool = False
    # Whether a picture of which a part is missing, or garbled, is as good as a whole one.
    accept_damaged: bool = False
    # Processor time: how busy a machine is decides nothing.
    image_timeout_s: float = 30.0
