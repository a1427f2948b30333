"""Checks one version of one shard: its parts together, and its parts against its tar."""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Set
from dataclasses import dataclass

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.schema import END_BROKEN, END_NONE
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, PartName, escape
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.peek import is_one_image
from shard_embedder.pipeline.verify.findings import Verdict, first_few
from shard_embedder.pipeline.verify.parts import CheckedPart
from shard_embedder.pipeline.verify.tars import Tar

# Fewer equal embeddings may well be of one image.
_ALIKE_AT_LEAST = 5


@dataclass(frozen=True)
class ShardVersion:
    """The parts of one version of one shard, in order. `shard` is set if the input has this version."""

    parts: list[PartName]
    with_errors: Set[PartName]
    shard: Shard | None

    @property
    def is_broken(self) -> bool:
        """Whether the shard could not be read to its proven end."""
        return self.parts[-1].end == END_BROKEN

    @property
    def where(self) -> str:
        """The name of all its parts in a finding."""
        return f"{EMBEDDINGS}/{escape(self.parts[0].shard)}.{self.parts[0].tag}-*"


def check_shard_version(version: ShardVersion, parts: list[CheckedPart], naming: Naming, verdict: Verdict) -> None:
    """Check the parts of one shard version together."""
    _check_order(version, parts, verdict)
    if version.is_broken:
        verdict.broken_shards += 1
        fault = parts[-1].fault or "it was not read to its end"
        verdict.add_finding(f"{EMBEDDINGS}/{parts[-1].name}", "shard-broken", fault)
    for part in parts:
        verdict.findings.extend(part.findings)
        verdict.samples += part.num_samples
        verdict.embedded += len(part.embedded.ids)
        verdict.errors += int((part.errors.indices >= 0).sum())
        verdict.unused_images += part.unused_images
        if part.unused_example and verdict.unused_example is None:
            verdict.unused_example = f"{part.name.shard}: {part.unused_example}"
    verdict.parts += len(parts)
    _check_ids(version, parts, verdict)
    _check_alike(version, parts, naming, verdict)


def _check_alike(version: ShardVersion, parts: list[CheckedPart], naming: Naming, verdict: Verdict) -> None:
    """Find embeddings that are all the same, unless the input shows that the images are, too."""
    rows = [index for part in parts for index, _ in part.embedded.samples()]
    alike = {part.alike for part in parts if part.embedded.ids}
    if len(rows) < _ALIKE_AT_LEAST or len(alike) > 1 or None in alike:
        return
    try:
        if version.shard is not None and is_one_image(version.shard, naming, set(rows)):
            return
    except (OSError, ShardError):
        pass  # the comparison of the shard with its tar reports it
    shown = "" if version.shard is not None else "; run with --input to see whether its images are, too"
    verdict.add_finding(version.where, "all-alike", f"its {len(rows)} embeddings are one and the same{shown}")


def _check_order(version: ShardVersion, parts: list[CheckedPart], verdict: Verdict) -> None:
    """Check that the parts are 0 to the last, each once, and that each begins where the one before ends."""
    last = parts[-1].name
    missing = _gaps([part.name.part for part in parts])
    if missing:
        verdict.add_finding(version.where, "part-missing", f"part {', '.join(missing)} of {last.part + 1} is missing")
    if last.end == END_NONE:
        verdict.add_finding(version.where, "part-missing", f"the last part is missing: {last.part} is not the last")
    for part, following in itertools.pairwise(parts):
        name, file = part.name, f"{EMBEDDINGS}/{following.name}"
        if following.name.part == name.part:
            value = f"part {name.part} is stored twice, also as {following.name}"
            verdict.add_finding(f"{EMBEDDINGS}/{name}", "part-twice", value)
        elif name.end != END_NONE:
            verdict.add_finding(file, "part-twice", f"part {following.name.part} comes after the last, {name.part}")
        elif following.name.part == name.part + 1 and part.whole and following.whole:
            begin, end = following.first_index, part.end_index
            if begin != end:
                verdict.add_finding(file, "sample-index", f"begins at sample {begin}, the part before ends at {end}")
    first = parts[0]
    if first.whole and first.name.part == 0 and first.first_index != 0:
        value = f"begins at sample {first.first_index}, the first part begins at 0"
        verdict.add_finding(f"{EMBEDDINGS}/{first.name}", "sample-index", value)


def _gaps(numbers: list[int]) -> list[str]:
    """The numbers missing between 0 and the last of sorted `numbers`, as `N` and `N to M`."""
    around = itertools.pairwise([-1, *numbers])
    return [f"{low + 1}" if high - low == 2 else f"{low + 1} to {high - 1}" for low, high in around if high - low > 1]


def _check_ids(version: ShardVersion, parts: list[CheckedPart], verdict: Verdict) -> None:
    seen: set[str | None] = set()
    repeated: list[str | None] = []
    for image_id in itertools.chain.from_iterable(part.embedded.ids for part in parts):
        if image_id in seen:
            repeated.append(image_id)
        seen.add(image_id)
    if repeated:
        value = f"{len(repeated)} rows have the image_id of an earlier one: {first_few(map(ascii, repeated))}"
        verdict.add_finding(version.where, "id-repeated", value)


def compare_with_tar(version: ShardVersion, parts: list[CheckedPart], tar: Tar, verdict: Verdict) -> None:
    """Compare the rows of a shard with its tar: each sample of a whole shard, the order of a broken one.

    After damage, a tar can be read in more than one way: there the tar must only have no more samples.
    """
    are_whole = all(part.whole and part.name.part == number for number, part in enumerate(parts))
    if version.is_broken:
        verdict.tars_compared += 1
        lost = _lost(parts, tar) if are_whole else []
        if lost:
            names = first_few(map(ascii, lost))
            value = f"its tar has {format_count(len(lost), 'sample')} beyond those stored: {names}"
            verdict.add_finding(version.where, "tar-count", value)
        return
    if tar.fault is not None:
        verdict.add_finding(tar.shard.url, "tar-unreadable", tar.fault)
        return
    verdict.tars_compared += 1
    num_samples = sum(part.num_samples for part in parts)
    if are_whole and num_samples != len(tar.keys):
        value = f"{num_samples} samples are stored, its tar has {len(tar.keys)}"
        verdict.add_finding(version.where, "tar-count", value)
    num_unused = sum(part.unused_images for part in parts)
    if are_whole and num_unused != tar.unused_images:
        value = f"{num_unused} image members without a row are counted, its tar has {tar.unused_images}"
        verdict.add_finding(version.where, "tar-count", value)
    for part in parts:
        for folder, rows in ((EMBEDDINGS, part.embedded), (ERRORS, part.errors)):
            wrong = [
                (index, image_id, allowed)
                for index, image_id in rows.samples()
                if image_id not in (allowed := tar.allowed_ids(index, is_error=folder == ERRORS))
            ]
            if wrong:
                index, image_id, allowed = wrong[0]
                has = " or ".join(map(ascii, allowed)) or "no such sample"
                value = f"{len(wrong)} rows: sample {index} is {image_id!a}, the tar has {has}"
                verdict.add_finding(f"{folder}/{part.name}", "tar-id", value)


def _lost(parts: list[CheckedPart], tar: Tar) -> list[str]:
    """Keys in the tar that no row has, where rows and keys are in the same order."""
    rows = [row for part in parts for rows in (part.embedded, part.errors) for row in rows.samples()]
    places: dict[str | None, list[int]] = defaultdict(list)
    for index, image_id in sorted(rows):
        places[image_id].append(index)
    lost: list[str] = []
    reached = -1
    for number, key in enumerate(tar.keys):
        after = [
            found[at]
            for found in (places.get(name, []) for name in tar.allowed_ids(number, is_error=True))
            if (at := bisect.bisect_right(found, reached)) < len(found)
        ]
        if after:
            reached = min(after)
        else:
            lost.append(key)
    return lost
