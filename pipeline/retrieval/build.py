"""Builds an index of an output, or adds to it what is new in the output."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from shard_embedder.pipeline.core.errors import OtherSettingsError, OutputError, SettingsError
from shard_embedder.pipeline.core.formatting import format_count
from shard_embedder.pipeline.core.progress import Progress, no_progress
from shard_embedder.pipeline.output.stored import Output, StoredPart, list_stored, open_output, unfinished, with_facts
from shard_embedder.pipeline.retrieval.folder import local_folder, lock_folder, remove_old_data
from shard_embedder.pipeline.retrieval.index import (
    DATA_NAME,
    PARTS_FILE,
    IndexFacts,
    data_number,
    find_damage,
    read_index_facts,
    read_parts,
)
from shard_embedder.pipeline.retrieval.kinds import KINDS, METRICS, choose_kind, load_faiss, num_lists
from shard_embedder.pipeline.retrieval.write import write_data

DEFAULT_MEMORY_BYTES = 4 * 2**30
# An ivf index gets new lists when it has this many times the rows that they were made for.
_GROWTH = 4


@dataclass(frozen=True)
class Options:
    """How to build. Without a metric, an index keeps its own, and a new one gets cosine.

    Without a kind, the rule in `pipeline.retrieval.kinds` chooses: the embeddings in memory take at most
    `memory_bytes`.
    """

    metric: str | None = None
    kind: str | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES

    def __post_init__(self) -> None:
        for name, value, known in (("metric", self.metric, METRICS), ("kind", self.kind, KINDS)):
            if value is not None and value not in known:
                raise SettingsError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if self.memory_bytes < 2**20:
            raise SettingsError(f"memory_bytes must be at least {2**20}, got {self.memory_bytes}")


@dataclass(frozen=True)
class Built:
    """What was done. `rebuilt` says why an existing index was built again; it is empty if it was not."""

    facts: IndexFacts
    num_added: int
    rebuilt: str = ""
    notes: list[str] = field(default_factory=list)


def build(
    output: str,
    index: str | Path,
    options: Options | None = None,
    on_progress: Progress = no_progress,
) -> Built:
    """Build the index of an output in the local folder `index`, or add the parts that are new.

    The whole index is built again if an indexed part changed or is gone from the output, or if a file of the index
    is damaged. Sizes are always checked, contents only before something is added. Memory holds a flat or hnsw index,
    at most `memory_bytes` of an ivf index, and the files of a few parts.

    Raises:
        OutputError: no output, or a damaged one; an index of other settings; a folder that is no index.
        OutputBusyError: another build holds the folder.
        SettingsError: FAISS is not installed, or the index has another metric.
        OSError: a disk or store failed; the index is as it was before.
    """
    options = options or Options()
    stored = open_output(output)
    load_faiss()
    folder = local_folder(index)
    with lock_folder(folder):
        old = read_index_facts(folder)
        remove_old_data(folder, old)
        if old is not None:
            _check_settings(folder, old, stored, options)
        parts = list_stored(stored)
        notes = _describe_unfinished(parts)
        # Without its list of parts, there is nothing to compare the output with.
        damage = "" if old is None else find_damage(folder / old.data, old, [PARTS_FILE])
        kept, new, reason = _compare_parts(stored, folder, None if damage else old, parts)
        reason = damage or reason
        num_rows = sum(part.num_rows for part in (*kept, *new))
        if not num_rows:
            raise OutputError(f"{output} has no embeddings: there is nothing to index")
        facts = _plan(stored, old, num_rows, options)
        reason = reason or _why_other_layout(old, facts)
        if old is not None and not reason and not new:
            return Built(old, 0, notes=notes)
        if old is not None and not reason:
            # Adding copies every file of the old index.
            reason = find_damage(folder / old.data, old, old.files)
        if reason:
            kept, new = [], [*kept, *new]
            lists = num_lists(num_rows, facts.num_features, options.memory_bytes) if facts.kind == "ivf" else 0
            facts = replace(facts, laid_out_rows=num_rows, lists=lists)
        before = folder / old.data if old is not None and not reason else None
        try:
            facts = write_data(stored, folder, facts, before, kept, new, options.memory_bytes, on_progress)
        except OSError as error:
            raise OSError(f"the index {folder} cannot be written: {error}") from error
        finally:
            # After success the data of the index before; after a fault what was written until then.
            remove_old_data(folder, read_index_facts(folder))
        return Built(facts, sum(part.num_rows for part in new), reason if old is not None else "", notes)


def _check_settings(folder: Path, old: IndexFacts, stored: Output, options: Options) -> None:
    """Raise if the index has other settings than the output, or another metric than asked for."""
    differences = old.made.settings.differences(stored.made.settings)
    if differences:
        raise OtherSettingsError(
            f"the index {folder} was made from embeddings of other settings; name another folder:\n  "
            + "\n  ".join(f"{name}: index {own}, output {other}" for name, own, other in differences)
        )
    if options.metric is not None and options.metric != old.metric:
        raise SettingsError(
            f"the index {folder} has metric {old.metric}, asked for {options.metric}: name another folder"
        )


def _describe_unfinished(parts: list[StoredPart]) -> list[str]:
    shards = unfinished(parts)
    if not shards:
        return []
    return [
        f"{format_count(len(shards), 'shard')} not whole yet, such as {shards[0]!r}: what is stored there is indexed"
    ]


def _compare_parts(
    stored: Output, folder: Path, old: IndexFacts | None, parts: list[StoredPart]
) -> tuple[list[StoredPart], list[StoredPart], str]:
    """The parts in the index, in its order; those to add; and why all must be built again, or an empty text."""
    if old is None:
        return [], with_facts(stored, parts), "new"
    before = read_parts(folder / old.data)
    now = {part.name: part for part in parts}
    gone = [part.name for part in before if part.name not in now]
    # A copied or touched file has another time and the same content: its footer tells.
    suspects = [
        part
        for part in before
        if part.name in now and (part.num_bytes, part.version) != (now[part.name].num_bytes, now[part.name].version)
    ]
    checked = {part.name: part for part in with_facts(stored, [now[part.name] for part in suspects])}
    changed = [part.name for part in suspects if checked[part.name].sha256 != part.sha256]
    known = {part.name for part in before}
    new = with_facts(stored, [part for part in parts if part.name not in known])
    if gone or changed:
        kinds = [f"{len(names)} have {what}" for names, what in ((gone, "gone"), (changed, "changed")) if names]
        reason = f"of the parts in the index, {' and '.join(kinds)}, such as {(gone + changed)[0]}"
        left = [checked.get(part.name, part) for part in before if part.name in now]
        return sorted(left), new, reason
    return [checked.get(part.name, part) for part in before], new, ""


def _plan(stored: Output, old: IndexFacts | None, num_rows: int, options: Options) -> IndexFacts:
    """The facts of the index to write, as far as they are known before it is written."""
    given = options.kind or (old.kind if old is not None and old.kind_given else None)
    kind = given or choose_kind(num_rows, stored.num_features, options.memory_bytes)
    before = data_number(old.data) if old is not None else None
    return IndexFacts(
        output=stored.url,
        made=stored.made,
        metric=options.metric or (old.metric if old is not None else METRICS[0]),
        kind=kind,
        kind_given=given is not None,
        num_rows=num_rows,
        num_features=stored.num_features,
        lists=old.lists if old is not None else 0,
        laid_out_rows=old.laid_out_rows if old is not None else 0,
        width=0,
        recall=0.0,
        recall_queries=0,
        data=DATA_NAME.format(0 if before is None else before + 1),
        files={},
        made_with={
            "faiss": load_faiss().__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
        },
    )


def _why_other_layout(old: IndexFacts | None, facts: IndexFacts) -> str:
    """Why the index needs another kind or other lists than it has, or an empty text."""
    if old is None:
        return ""
    if old.kind != facts.kind:
        return f"it was {old.kind}, and is {facts.kind} for {facts.num_rows} rows"
    if facts.kind == "ivf" and facts.num_rows > _GROWTH * old.laid_out_rows:
        return f"its lists were laid out for {old.laid_out_rows} rows, and it has {facts.num_rows} now"
    return ""
