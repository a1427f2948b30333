"""What the weights ask of an image: size, crop, interpolation, mean and std."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

CENTER, SQUASH = "center", "squash"


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing of one weights: what `weights.transforms()` does to a PIL image.

    `crop` is (height, width); `mean` and `std` are for RGB in 0 to 1. With the mode `center`, `resize` is the
    length of the shorter side in pixels; with `squash` that of the longer side of `crop` before it is cropped:
    the image is stretched to the shape of `crop`, and its own is lost.
    """

    resize: int
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mode: str = CENTER

    def with_size(self, size: tuple[int, int]) -> Preprocess:
        """For another input size: the longer side keeps the ratio of resize to crop."""
        return replace(self, resize=round(max(size) * self.resize / max(self.crop)), crop=size)

    def to_json(self) -> dict[str, Any]:
        """As the settings of an output have it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Preprocess:
        """The inverse of `to_json`."""
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**given)


def resized_size(height: int, width: int, preprocess: Preprocess) -> tuple[int, int]:
    """Height and width of an image before it is cropped."""
    if preprocess.mode == SQUASH:
        longer = max(preprocess.crop)
        new_height, new_width = (side * preprocess.resize // longer for side in preprocess.crop)
        return new_height, new_width
    long = int(preprocess.resize * max(height, width) / min(height, width))
    return (long, preprocess.resize) if width <= height else (preprocess.resize, long)
