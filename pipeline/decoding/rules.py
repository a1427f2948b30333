"""How images are decoded: one frozen value, which every decoder is made of."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.config import Config
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

    @classmethod
    def of(cls, config: Config, preprocess: Preprocess) -> DecodingRules:
        """The rules of a job."""
        return cls(
            preprocess=preprocess,
            max_pixels=config.max_pixels,
            ignore_orientation=config.ignore_orientation,
            accept_damaged=config.accept_damaged,
        )
