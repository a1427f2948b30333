"""What a run warns of at its end: what may not be meant, with an example and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.schema import MEMBERS_APART, NO_IMAGE
from shard_embedder.pipeline.decoding.pillow import NEEDS_HEIF
from shard_embedder.pipeline.decoding.versions import INSTALL_HEIF
from shard_embedder.pipeline.output.ledger import Counts
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.run.tally import Tally
from shard_embedder.pipeline.shards.keys import FIRST_DOT
from shard_embedder.pipeline.shards.left_out import archives_among, format_left_out, how_to_read


def make_warnings(job: Job, counts: Counts, tally: Tally) -> list[str]:
    """The warnings, each a sentence or more."""
    return [
        *_archives(job.left_out),
        *_unused_images(job.config, counts),
        *([job.warning] if job.warning else []),
        *_heif(tally),
        *_device_refusals(tally),
        *_members_apart(tally),
        *_kept_fields(job.config, tally),
    ]


def _archives(left_out: Mapping[str, int]) -> list[str]:
    archives = archives_among(left_out)
    if not archives:
        return []
    number = format_count(sum(archives.values()), "file")
    return [
        f"{number} of the input may be shards and were not read: {format_left_out(archives)}. "
        f"Only plain .tar is read: {how_to_read(archives)}; then run the same command again."
    ]


def _unused_images(config: Config, counts: Counts) -> list[str]:
    if not counts.unused_images:
        return []
    number = format_count(counts.unused_images, "image member")
    said = [f"{number} got no row, since a sample gives one embedding; for example {counts.unused_example}."]
    if config.key == FIRST_DOT:
        said.append("--key last-dot, with a new --output, separates names that differ before their last dot.")
    if config.image_member is None:
        said.append("--image-member EXT says which members are the images.")
    return [" ".join(said)]


def _heif(tally: Tally) -> list[str]:
    if not tally.reasons[NEEDS_HEIF]:
        return []
    number = format_count(tally.reasons[NEEDS_HEIF], "image")
    return [
        f"{number} of this run are HEIC and stored as errors: pillow-heif, which decodes them, is missing where "
        f"the job started. Install it there and on every node ({INSTALL_HEIF}), and embed them into a new --output."
    ]


def _device_refusals(tally: Tally) -> list[str]:
    if not tally.device_refused:
        return []
    number = format_count(tally.device_refused, "image")
    return [
        f"{number} of this run were decoded on the CPU, because the device's decoder refused them; "
        f"for example {tally.device_refusal}."
    ]


def _members_apart(tally: Tally) -> list[str]:
    num_images = tally.num_samples - tally.reasons[NO_IMAGE] - tally.reasons[MEMBERS_APART]
    if not tally.apart_samples or 2 * tally.apart_samples < num_images:
        return []
    return [
        f"{tally.apart_samples:,} of {format_count(num_images, 'image')} stand apart from the other members of their "
        "key, whose fields are lost. Make the shards with `tar --sort=name`, which puts them side by side."
    ]


def _kept_fields(config: Config, tally: Tally) -> list[str]:
    """Fields without a single value, and fields of which values were lost."""
    said = []
    # Nothing is known of fields where this run stored no part.
    for field, kept in zip(config.keep, tally.kept, strict=False):
        if kept.lost:
            said.append(
                f"--keep {field.spec} lost {kept.lost:,} of {format_count(kept.lost + kept.values, 'value')}, which "
                f"are null; for example {kept.example}."
            )
        elif not kept.values and tally.num_samples:
            said.append(
                f"--keep {field.spec} kept nothing: it is missing or null in all samples that this run stored."
            )
    return said
