"""What a run warns of at its end: what may not be meant, with an example and what to do."""

from __future__ import annotations

from pipeline.core.config import KEYS, Config
from pipeline.core.formatting import format_count
from pipeline.output.ledger import Counts


def make_warnings(config: Config, counts: Counts) -> list[str]:
    """The warnings, each a sentence or more."""
    return _unused_images(config, counts)


def _unused_images(config: Config, counts: Counts) -> list[str]:
    if not counts.unused_images:
        return []
    number = format_count(counts.unused_images, "image member")
    said = [f"{number} got no row, since a sample gives one embedding; for example {counts.unused_example}."]
    if config.key == KEYS[0]:
        said.append("--key last-dot, with a new --output, separates names that differ before their last dot.")
    if config.image_member is None:
        said.append("--image-member EXT says which members are the images.")
    return [" ".join(said)]
