"""What is done, pending or changed: from listings of the input and the output, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.errors import OutputError
from pipeline.parts import EMBEDDINGS, ERRORS, PartName, read_facts, version_tag
from pipeline.samples import Pending
from pipeline.schema import END_BROKEN, END_LAST
from pipeline.shards import Shard
from pipeline.storage import list_files, locate

_COUNTERS = 32


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    `stale` are, by shard, the stored files that must go before it is embedded: parts of an older version,
    and the broken end that an earlier run left. `elsewhere` counts stored shards that the input does
    not name; they are left alone.
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


def list_parts(output: str, folder: str) -> Iterable[PartName]:
    """The parts stored below `output`/`folder`, in no set order."""
    fs, base = locate(f"{output.rstrip('/')}/{folder}")
    for info in list_files(fs, base):
        name = PartName.parse(info.path[len(base) :].lstrip("/"))
        if name is not None:
            yield name


def make_plan(shards: list[Shard], output: str) -> Plan:
    """Compare the shards with what is stored.

    A shard is done when its parts 0 to k of its present version are there and k is marked last.
    """
    stored: dict[str, list[PartName]] = defaultdict(list)
    for name in list_parts(output, EMBEDDINGS):
        stored[name.shard].append(name)
    errors: dict[str, list[PartName]] = defaultdict(list)
    for name in list_parts(output, ERRORS):
        errors[name.shard].append(name)
    pending: list[Pending] = []
    changed: list[str] = []
    retried: list[str] = []
    stale: dict[str, list[str]] = {}
    for shard in shards:
        tag = version_tag(shard.num_bytes, shard.version)
        parts = stored.get(shard.name, [])
        good = _usable(parts, tag)
        if len(good) < len(parts) or shard.name in errors:
            names = {*good}
            old = [f"{EMBEDDINGS}/{part}" for part in parts if part not in names]
            old += [f"{ERRORS}/{part}" for part in errors.get(shard.name, []) if part not in names]
            if old:
                stale[shard.name] = old
        if good and good[-1].end == END_LAST:
            continue
        if any(part.tag != tag for part in parts):
            changed.append(shard.name)
        elif any(part.end == END_BROKEN for part in parts):
            retried.append(shard.name)
        pending.append(Pending(*shard, tuple(part.part for part in good)))
    named = {shard.name for shard in shards}
    return Plan(
        pending=pending,
        num_done=len(shards) - len(pending),
        changed=changed,
        retried=retried,
        stale=stale,
        elsewhere=sum(name not in named for name in stored),
    )


def _usable(parts: list[PartName], tag: str) -> list[PartName]:
    """Stored parts of the present version that need not be made again; the last only when all are there."""
    whole = sorted({part for part in parts if part.tag == tag and part.end != END_BROKEN}, key=lambda p: p.part)
    lasts = [part for part in whole if part.end == END_LAST]
    if len(lasts) == 1 and [part.part for part in whole] == list(range(lasts[0].part + 1)):
        return whole
    # A hole: the last part is made again, so that its presence goes on to mean that all are there.
    return [part for part in whole if part.end != END_LAST]


@dataclass
class Counts:
    """Samples counted from what is stored, and every disagreement found on the way."""

    num_samples: int = 0
    num_embedded: int = 0
    num_errors: int = 0
    broken: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def balanced(self) -> bool:
        """Whether every sample of every shard is one stored row."""
        return not self.missing and not self.faults


def count(shards: list[Shard], output: str) -> Counts:
    """Count the samples of `shards` from the footers of their stored parts.

    Each part must hold as many rows as samples, follow on the part before, and end in a last part, or in
    a broken one with its fault.
    """
    stored: dict[str, list[PartName]] = defaultdict(list)
    wanted = {shard.name: version_tag(shard.num_bytes, shard.version) for shard in shards}
    for name in list_parts(output, EMBEDDINGS):
        if wanted.get(name.shard) == name.tag:
            stored[name.shard].append(name)
    with_errors = {name for name in list_parts(output, ERRORS) if wanted.get(name.shard) == name.tag}
    counts = Counts()
    names = sorted(stored)
    with ThreadPoolExecutor(_COUNTERS, thread_name_prefix="count") as pool:
        results = pool.map(lambda name: _count_shard(output, stored[name], with_errors), names)
        for shard, result in zip(names, results, strict=True):
            counts.num_samples += result.num_samples
            counts.num_embedded += result.num_embedded
            counts.num_errors += result.num_errors
            counts.faults.extend(f"{shard}: {fault}" for fault in result.faults)
    for shard in wanted:
        ends = {part.end for part in stored.get(shard, [])}
        if END_BROKEN in ends:
            counts.broken.append(shard)
        elif END_LAST not in ends:
            counts.missing.append(shard)
    return counts


def _count_shard(output: str, parts: list[PartName], with_errors: set[PartName]) -> Counts:
    counts = Counts()
    try:
        for number, name in enumerate(sorted(parts, key=lambda part: part.part)):
            facts = read_facts(output, f"{EMBEDDINGS}/{name}")
            num_errors = read_facts(output, f"{ERRORS}/{name}").num_rows if name in with_errors else 0
            num_samples = facts.number("num_samples")
            if name.part != number:
                raise OutputError(f"part {number} is missing")
            if facts.number("first_index") != counts.num_samples:
                raise OutputError(f"{name} begins at sample {facts.number('first_index')}, not {counts.num_samples}")
            # The fault of a broken shard is a row of its own, and no sample.
            num_faults = 1 if name.end == END_BROKEN else 0
            if facts.num_rows + num_errors != num_samples + num_faults:
                raise OutputError(
                    f"{name} has {facts.num_rows} embeddings and {num_errors} errors for {num_samples} samples"
                )
            counts.num_samples += num_samples
            counts.num_embedded += facts.num_rows
            counts.num_errors += num_errors - num_faults
    except OutputError as error:
        counts.faults.append(str(error))
    return counts
