"""Which shards are done, pending or changed: from listings of the input and the output, and nothing else."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from shard_embedder.pipeline.core.errors import InputError
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.schema import END_BROKEN, END_LAST, END_NONE
from shard_embedder.pipeline.core.storage import without_gc
from shard_embedder.pipeline.output.ledger import list_parts
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, PartName, version_tag
from shard_embedder.pipeline.planning.job import Job
from shard_embedder.pipeline.shards.find import Pending, Shard

# A part's number and end as one integer: number * 3 + position of the end here.
_ENDS = (END_NONE, END_LAST, END_BROKEN)
_LAST = _ENDS.index(END_LAST)
_RENAMED_AT_MOST = 4


@dataclass(frozen=True)
class Plan:
    """What a run has to do.

    `stale` are, by shard, the stored files to delete: parts of an older version, parts that contradict others, and
    the broken end of an earlier run once its samples are stored whole. Until then that end stays: the shard may never
    again be read as far. `elsewhere` counts stored shards that the input does not name; they are left alone.
    """

    pending: list[Pending]
    num_done: int
    changed: list[str]
    retried: list[str]
    stale: dict[str, list[str]]
    elsewhere: int
    # The first pending shards that are stored under another name: (name, stored name).
    renamed: list[tuple[str, str]]

    @property
    def pending_bytes(self) -> int:
        """Bytes of the pending shards."""
        return sum(shard.num_bytes for shard in self.pending)


@without_gc()
def make_plan(shards: list[Shard], output: str, limits: StoreLimits = LIMITS) -> Plan:
    """Compare the shards with what is stored.

    A shard is done when its parts 0 to k of its present version are there and k is marked last.
    """
    # Small numbers instead of names: this holds a million shards.
    tags = {shard.name: version_tag(shard.num_bytes, shard.version) for shard in shards}
    stored: dict[str, list[int]] = {}
    # Parts of an older version; there are few.
    older: dict[str, list[PartName]] = defaultdict(list)
    unnamed: dict[str, str] = {}
    for part, _ in list_parts(output, EMBEDDINGS, limits):
        tag = tags.get(part.shard)
        if tag is None:
            unnamed[part.shard] = part.tag
        elif tag != part.tag:
            older[part.shard].append(part)
        else:
            stored.setdefault(part.shard, []).append(part.part * len(_ENDS) + _ENDS.index(part.end))
    errors: dict[str, list[PartName]] = defaultdict(list)
    for part, _ in list_parts(output, ERRORS, limits):
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
        renamed=_renamed(pending, tags, unnamed) if unnamed else [],
    )


def _renamed(pending: list[Pending], tags: dict[str, str], unnamed: dict[str, str]) -> list[tuple[str, str]]:
    """Pending shards with the last part of the name, size and version of stored ones that the input does not name."""
    stored = {(name.rpartition("/")[2], tag): name for name, tag in unnamed.items()}
    found = ((shard.name, stored.get((shard.name.rpartition("/")[2], tags[shard.name]))) for shard in pending)
    return [(name, other) for name, other in found if other is not None][:_RENAMED_AT_MOST]


def check_names(job: Job, plan: Plan) -> None:
    """Refuse an input whose shards would be embedded a second time, under other names.

    An output and its input may be moved. But names are paths below the input's fixed folder: where that is another
    one than before, the same shards may have other names.

    Raises:
        InputError: shards of the input are stored under other names.
    """
    if job.moved_from is not None and plan.renamed:
        name, stored = plan.renamed[0]
        raise InputError(
            f"input must name shards as the output does: {name!r} is stored as {stored!r}. The output was made from "
            f"{job.moved_from!r}, this input lies in {job.fingerprint.input_prefix!r}: name the same folder"
        )


def _broken_end(parts: list[PartName], good: list[PartName]) -> list[PartName]:
    """The broken end that follows the good parts, if there is one: it stays until its part is stored whole."""
    broken = [part for part in parts if part.end == END_BROKEN and part.part >= len(good)]
    return broken if [part.part for part in (*good, *broken)] == list(range(len(good) + 1)) else []


def _is_whole(codes: list[int]) -> bool:
    """Whether sorted codes are parts 0 to k, once each, of which k and no other ends the shard as last."""
    last = len(codes) - 1
    return last >= 0 and codes == [*range(0, last * len(_ENDS), len(_ENDS)), last * len(_ENDS) + _LAST]


def _usable(parts: list[PartName]) -> list[PartName]:
    """Stored parts of one version that can be kept, in order.

    A last part is kept only if all parts before it are there and none after it: its presence must mean that the shard
    is done. Otherwise it is made again, with what contradicts it.
    """
    whole = sorted({part for part in parts if part.end != END_BROKEN}, key=lambda part: part.part)
    lasts = [part.part for part in whole if part.end == END_LAST]
    if len(lasts) == 1 and [part.part for part in whole] == list(range(lasts[0] + 1)):
        return whole
    return [part for part in whole if not lasts or part.part < lasts[0]]
