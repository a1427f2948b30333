"""What is done, pending or changed: from listings of the input and the output, and nothing else."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from shard_embedder.pipeline.core.errors import StoredDataError, StoreError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.schema import END_BROKEN, END_LAST, END_NONE
from shard_embedder.pipeline.core.storage import FileInfo, join, list_files, locate, without_gc
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, PartName, version_tag
from shard_embedder.pipeline.output.parts import read_facts
from shard_embedder.pipeline.shards.find import Shard

MAX_WORST = 10
_COUNTERS = 32


def list_parts(output: str, folder: str, limits: StoreLimits = LIMITS) -> Iterator[tuple[PartName, FileInfo]]:
    """The parts stored below `output`/`folder` with their files, in no set order.

    Raises:
        StoreError: the output cannot be listed.
    """
    fs, base = locate(join(output, folder), limits)
    start = len(base) + 1
    try:
        for info in list_files(fs, base, limits=limits):
            name = PartName.parse(info.path[start:])
            if name is not None:
                yield name, info
    except OSError as error:
        raise StoreError(f"cannot list {join(output, folder)}: {describe(error)}") from error


@dataclass
class Counts:
    """Samples as the stored parts count them, and every disagreement between parts."""

    num_samples: int = 0
    num_embedded: int = 0
    num_errors: int = 0
    # The `MAX_WORST` shards with the most errors, worst first: (errors, samples).
    errors_by_shard: dict[str, tuple[int, int]] = field(default_factory=dict)
    # The shard with the largest share of errors, and the same numbers.
    worst_share: tuple[str, int, int] | None = None
    # Image members that no row stands for, and one of them.
    unused_images: int = 0
    unused_example: str | None = None
    # Shards that disappeared from the input during the run.
    vanished: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        """Whether every sample of every shard is one stored row."""
        return not self.missing and not self.faults


@without_gc()
def count(shards: list[Shard], output: str, digest: str | None = None) -> Counts:
    """Count the samples of `shards` from the footers of their stored parts.

    Each part must hold as many rows as samples, continue the part before, and have the fingerprint `digest`, if that
    is given. Each shard must end in a last part, or in a broken one with its fault. No errors may be without their
    part, and no part may be of an older version.

    Raises:
        StoreError: the output cannot be listed.
    """
    tags = {shard.name: version_tag(shard.num_bytes, shard.version) for shard in shards}
    counts = Counts()
    stored: dict[str, list[tuple[PartName, int]]] = defaultdict(list)
    errors: dict[PartName, int] = {}
    failed: list[tuple[int, int, str]] = []
    for part, info in list_parts(output, EMBEDDINGS):
        if tags.get(part.shard) == part.tag:
            stored[part.shard].append((part, info.num_bytes))
        elif part.shard in tags:
            counts.faults.append(f"{part.shard}: {part} is of an older version")
    for part, info in list_parts(output, ERRORS):
        if part.shard in tags:
            errors[part] = info.num_bytes
    with ThreadPoolExecutor(_COUNTERS, thread_name_prefix="count") as pool:
        results = pool.map(lambda parts: _count_shard(output, parts, errors, digest), stored.values())
        for shard, result in zip(stored, results, strict=True):
            counts.num_samples += result.num_samples
            counts.num_embedded += result.num_embedded
            counts.num_errors += result.num_errors
            counts.unused_images += result.unused_images
            # The same in every run, whatever the order of the listing.
            examples = filter(None, (counts.unused_example, result.unused_example))
            counts.unused_example = min(examples, default=None)
            counts.faults.extend(f"{shard}: {fault}" for fault in result.faults)
            if result.num_errors:
                failed.append((-result.num_errors, result.num_samples, shard))
    counts.errors_by_shard = {
        shard: (-num_errors, num_samples) for num_errors, num_samples, shard in heapq.nsmallest(MAX_WORST, failed)
    }
    worst = min(failed, key=lambda one: (one[0] / one[1], one[2]), default=None)
    counts.worst_share = None if worst is None else (worst[2], -worst[0], worst[1])
    for parts in stored.values():
        for part, _ in parts:
            errors.pop(part, None)
    counts.faults.extend(f"{part.shard}: {part} has errors and no embeddings" for part in errors)
    for shard in tags:
        ends = {part.end for part, _ in stored.get(shard, ())}
        if END_BROKEN in ends:
            counts.broken.append(shard)
        elif END_LAST not in ends:
            counts.missing.append(shard)
    counts.faults.sort()
    return counts


def _count_shard(
    output: str, parts: list[tuple[PartName, int]], errors: dict[PartName, int], digest: str | None
) -> Counts:
    counts = Counts()
    parts.sort()
    try:
        for number, (name, num_bytes) in enumerate(parts):
            if name.part != number:
                problem = "is missing" if name.part > number else "is there twice"
                raise StoredDataError(f"part {min(number, name.part)} {problem}")
            if name.end != END_NONE and number + 1 < len(parts):
                raise StoredDataError(f"{name} ends the shard, and part {number + 1} is there")
            facts = read_facts(output, f"{EMBEDDINGS}/{name}", num_bytes)
            if digest is not None and facts.metadata.get("fingerprint") != digest:
                raise StoredDataError(f"{name} was made with other settings than {digest}: its metadata tells which")
            num_errors = read_facts(output, f"{ERRORS}/{name}", errors[name]).num_rows if name in errors else 0
            num_samples = facts.number("num_samples")
            if facts.number("first_index") != counts.num_samples:
                raise StoredDataError(
                    f"{name} begins at sample {facts.number('first_index')}, not {counts.num_samples}"
                )
            # The fault of a broken shard is a row of its own, and no sample.
            num_faults = 1 if name.end == END_BROKEN else 0
            if facts.num_rows + num_errors != num_samples + num_faults:
                raise StoredDataError(
                    f"{name} has {format_count(facts.num_rows, 'embedding')} and {format_count(num_errors, 'error')} "
                    f"for {format_count(num_samples, 'sample')}"
                )
            counts.num_samples += num_samples
            counts.num_embedded += facts.num_rows
            counts.num_errors += num_errors - num_faults
            counts.unused_images += facts.number("unused_images")
            example = facts.metadata.get("unused_example")
            if example is not None and counts.unused_example is None:
                counts.unused_example = f"{name.shard}: {example}"
    except (StoredDataError, StoreError) as error:
        counts.faults.append(str(error))
    return counts
