"""What is done, pending or changed: from listings of the input and the output, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline import words
from pipeline.errors import OutputError, ShardError
from pipeline.parts import EMBEDDINGS, ERRORS, PartName, read_facts, version_tag
from pipeline.samples import Pending
from pipeline.schema import END_BROKEN, END_LAST, END_NONE
from pipeline.shards import Shard
from pipeline.storage import FileInfo, describe, join, list_files, locate, without_gc

_COUNTERS = 32
# A part's number and end as one integer: number * 3 + position of the end here.
_ENDS = (END_NONE, END_LAST, END_BROKEN)
_LAST = _ENDS.index(END_LAST)


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    `stale` are, by shard, the stored files that must go: parts of an older version, what contradicts other parts, and
    the broken end of an earlier run where what it has is stored whole. Until then that end stays, as the shard may
    never again be read as far. `elsewhere` counts stored shards that the input does not name; they are left alone.
    """

    pending: list[Pending]
    num_done: int
    changed: list[str]
    retried: list[str]
    stale: dict[str, list[str]]
    elsewhere: int

    @property
    def pending_bytes(self) -> int:
        """Bytes of the pending shards."""
        return sum(shard.num_bytes for shard in self.pending)


def list_parts(output: str, folder: str) -> Iterator[tuple[PartName, FileInfo]]:
    """The parts stored below `output`/`folder` with their files, in no set order.

    Raises:
        OutputError: the output cannot be listed.
    """
    fs, base = locate(join(output, folder))
    start = len(base) + 1
    try:
        for info in list_files(fs, base):
            name = PartName.parse(info.path[start:])
            if name is not None:
                yield name, info
    except (OSError, ShardError) as error:
        raise OutputError(f"cannot list {join(output, folder)}: {describe(error)}") from error


@without_gc()
def make_plan(shards: list[Shard], output: str) -> Plan:
    """Compare the shards with what is stored.

    A shard is done when its parts 0 to k of its present version are there and k is marked last.
    """
    # By shard, in small numbers and not in names: this holds a million shards.
    tags = {shard.name: version_tag(shard.num_bytes, shard.version) for shard in shards}
    stored: dict[str, list[int]] = {}
    # Parts of an older version; there are few.
    older: dict[str, list[PartName]] = defaultdict(list)
    unnamed: set[str] = set()
    for part, _ in list_parts(output, EMBEDDINGS):
        tag = tags.get(part.shard)
        if tag is None:
            unnamed.add(part.shard)
        elif tag != part.tag:
            older[part.shard].append(part)
        else:
            stored.setdefault(part.shard, []).append(part.part * len(_ENDS) + _ENDS.index(part.end))
    errors: dict[str, list[PartName]] = defaultdict(list)
    for part, _ in list_parts(output, ERRORS):
        if part.shard in tags:
            errors[part.shard].append(part)
    pending: list[Pending] = []
    changed: list[str] = []
    retried: list[str] = []
    stale: dict[str, list[str]] = {}
    for shard in shards:
        codes = sorted(stored.get(shard.name, ()))
        if _is_whole(codes) and shard.name not in older and shard.name not in errors:
            continue
        tag = tags[shard.name]
        parts = [PartName(shard.name, tag, code // len(_ENDS), _ENDS[code % len(_ENDS)]) for code in codes]
        good = _usable(parts)
        if len(good) < len(parts) or shard.name in older or shard.name in errors:
            names = {*good, *_broken_end(parts, good)}
            old = [f"{EMBEDDINGS}/{part}" for part in (*parts, *older.get(shard.name, ())) if part not in names]
            old += [f"{ERRORS}/{part}" for part in errors.get(shard.name, ()) if part not in names]
            if old:
                stale[shard.name] = sorted(old)
        if good and good[-1].end == END_LAST:
            continue
        if shard.name in older:
            changed.append(shard.name)
        elif any(part.end == END_BROKEN for part in parts):
            retried.append(shard.name)
        pending.append(Pending(*shard, tuple(part.part for part in good)))
    return Plan(
        pending=pending,
        num_done=len(shards) - len(pending),
        changed=changed,
        retried=retried,
        stale=stale,
        elsewhere=len(unnamed),
    )


def _broken_end(parts: list[PartName], good: list[PartName]) -> list[PartName]:
    """The broken end that goes on from the good parts, if there is one: only its part will be made again as such."""
    broken = [part for part in parts if part.end == END_BROKEN and part.part >= len(good)]
    return broken if [part.part for part in (*good, *broken)] == list(range(len(good) + 1)) else []


def _is_whole(codes: list[int]) -> bool:
    """Whether sorted codes are parts 0 to k, once each, of which k and no other ends the shard as last."""
    last = len(codes) - 1
    return last >= 0 and codes == [*range(0, last * len(_ENDS), len(_ENDS)), last * len(_ENDS) + _LAST]


def _usable(parts: list[PartName]) -> list[PartName]:
    """Stored parts of one version that need not be made again, in order.

    A last part is among them only when all before it are there and none after it, so that its presence
    goes on to mean that the shard is done. Where it is not, it is made again, with what contradicts it.
    """
    whole = sorted({part for part in parts if part.end != END_BROKEN}, key=lambda part: part.part)
    lasts = [part.part for part in whole if part.end == END_LAST]
    if len(lasts) == 1 and [part.part for part in whole] == list(range(lasts[0] + 1)):
        return whole
    return [part for part in whole if not lasts or part.part < lasts[0]]


@dataclass
class Counts:
    """Samples counted from what is stored, and every disagreement found on the way."""

    num_samples: int = 0
    num_embedded: int = 0
    num_errors: int = 0
    # Taken on by the run, and gone from the input before its end.
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

    Each part must hold as many rows as samples, follow on the part before, be made with the settings of `digest`
    where that is given, and end in a last part, or in a broken one with its fault. There must be no errors without
    their part, and no part of an older version.

    Raises:
        OutputError: the output cannot be listed.
    """
    tags = {shard.name: version_tag(shard.num_bytes, shard.version) for shard in shards}
    counts = Counts()
    stored: dict[str, list[tuple[PartName, int]]] = defaultdict(list)
    errors: dict[PartName, int] = {}
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
            counts.faults.extend(f"{shard}: {fault}" for fault in result.faults)
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
                raise OutputError(f"part {min(number, name.part)} {problem}")
            if name.end != END_NONE and number + 1 < len(parts):
                raise OutputError(f"{name} ends the shard, and part {number + 1} is there")
            facts = read_facts(output, f"{EMBEDDINGS}/{name}", num_bytes)
            if digest is not None and facts.metadata.get("fingerprint") != digest:
                raise OutputError(f"{name} was made with other settings than {digest}: its metadata tells which")
            num_errors = read_facts(output, f"{ERRORS}/{name}", errors[name]).num_rows if name in errors else 0
            num_samples = facts.number("num_samples")
            if facts.number("first_index") != counts.num_samples:
                raise OutputError(f"{name} begins at sample {facts.number('first_index')}, not {counts.num_samples}")
            # The fault of a broken shard is a row of its own, and no sample.
            num_faults = 1 if name.end == END_BROKEN else 0
            if facts.num_rows + num_errors != num_samples + num_faults:
                raise OutputError(
                    f"{name} has {words.count(facts.num_rows, 'embedding')} and {words.count(num_errors, 'error')} "
                    f"for {words.count(num_samples, 'sample')}"
                )
            counts.num_samples += num_samples
            counts.num_embedded += facts.num_rows
            counts.num_errors += num_errors - num_faults
    except OutputError as error:
        counts.faults.append(str(error))
    return counts
