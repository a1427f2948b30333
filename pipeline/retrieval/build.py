"""Builds an index of an output, or adds to it what is new."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import OtherSettingsError, OutputError, SettingsError
from pipeline.core.formatting import format_count
from pipeline.core.storage import TEMPORARY_FOLDER, clear_temporary, write_bytes
from pipeline.output.stored import Output, StoredPart, list_stored, open_output, stream, unfinished, with_facts
from pipeline.retrieval.index import (
    DATA_NAME,
    INDEX_FILE,
    LISTS_FILE,
    PARTS_FILE,
    PARTS_SCHEMA,
    ROW,
    ROWS_FILE,
    ROWS_SCHEMA,
    VECTORS_FILE,
    Facts,
    damage,
    data_number,
    read_facts,
    read_parts,
    sha256_of,
)
from pipeline.retrieval.kinds import (
    IVF_TRAIN_ROWS,
    KINDS,
    METRICS,
    Vectors,
    add_rows,
    choose_kind,
    emptied,
    load_faiss,
    merge_on_disk,
    new_index,
    num_lists,
    prepared,
    read_index,
    write_index,
)
from pipeline.retrieval.recall import measure

DEFAULT_MEMORY_BYTES = 4 * 2**30
_LOCK_FILE = ".lock"
_LOCK_TEXT = "jobs/index.py makes an index in this folder\n"
_PIECE_FILE = "piece-{:05d}.faiss"
_PIECE_NAME = re.compile(r"piece-[0-9]+\.faiss")
# An ivf index is laid out anew when it has this many times the rows that its lists were made for.
_GROWTH = 4
# Parts that the rows to train lists are drawn from: enough of them to see all of a sorted output.
_TRAIN_PARTS = 256
_ROW_GROUP_ROWS = 8192

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How to build. None is as the index is, else cosine, and the kind by the rule of `index_kinds`.

    `memory_bytes` is what the embeddings in memory may take, as far as the kind is not given.
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
    """What was done. `rebuilt` says why an index that was there was made anew, empty where it was not."""

    facts: Facts
    num_added: int
    rebuilt: str = ""
    notes: list[str] = field(default_factory=list)


def build(
    output: str,
    index: str | Path,
    options: Options | None = None,
    on_progress: Progress = lambda what, done, total: None,
) -> Built:
    """Make the index of an output in the local folder `index`, or add to it the parts that are new.

    Where a part that is in the index has gone from the output, or changed, or a file of the index is damaged, all
    is built anew: sizes are looked at always, contents where something is to be added. Memory holds
    the index if it is flat or hnsw, of an ivf one at most `memory_bytes`, and the files of a few parts.

    Raises:
        OutputError: no output, or a damaged one; an index of other settings; a folder that is no index.
        SettingsError: FAISS is not installed, or another metric than that of the index.
        OSError: the disk is full, or the like; the index is as it was before.
    """
    options = options or Options()
    load_faiss()
    source = open_output(output)
    folder = _local(index)
    with _locked(folder):
        old = read_facts(folder)
        _clear(folder, old)
        if old is not None:
            _check_same(folder, old, source, options)
        stored = list_stored(source)
        notes = _notes(stored)
        # Without the parts that it has, there is nothing to compare with.
        fault = "" if old is None else damage(folder / old.data, old, [PARTS_FILE])
        kept, new, reason = _compare(source, folder, None if fault else old, stored)
        reason = fault or reason
        num_rows = sum(part.num_rows for part in (*kept, *new))
        if not num_rows:
            raise OutputError(f"{output} has no embeddings: there is nothing to index")
        facts = _plan(source, old, num_rows, options)
        reason = reason or _other_layout(old, facts)
        if old is not None and not reason and not new:
            return Built(old, 0, notes=notes)
        if old is not None and not reason:
            # All of it is read to add to it: what is copied is what was written.
            reason = damage(folder / old.data, old, old.files)
        if reason:
            kept, new = [], [*kept, *new]
            facts = replace(facts, laid_out_rows=num_rows, lists=_lists(facts, options))
        before = folder / old.data if old is not None and not reason else None
        try:
            facts = _write(source, folder, facts, before, (kept, new), options.memory_bytes, on_progress)
        except OSError as error:
            raise OSError(f"the index {folder} cannot be written: {error}") from error
        finally:
            # What does not count now: that of the index before, or what was written before a fault.
            _clear(folder, read_facts(folder))
        return Built(facts, sum(part.num_rows for part in new), reason if old is not None else "", notes)


def _local(index: str | Path) -> Path:
    if "://" in str(index):
        raise SettingsError(f"the index must be a local folder, got {index}")
    folder = Path(index).absolute()
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"the index must be a folder, {folder} is a file")
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which must be new, empty, or that of an index; nothing else is touched."""
    names = sorted(os.listdir(folder)) if folder.exists() else []
    if INDEX_FILE not in names:
        ours = (_LOCK_FILE, TEMPORARY_FOLDER, *(name for name in names if data_number(name) is not None))
        # A run that died before its first index was whole left its lock, and only then what lies beside it is ours.
        begun = _LOCK_FILE in names and (folder / _LOCK_FILE).read_text(errors="replace") == _LOCK_TEXT
        others = [name for name in names if name not in (ours if begun else (_LOCK_FILE,))]
        if others:
            raise OutputError(f"{folder} is not empty and no index: it has {others[0]!r}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(f"another index.py is at work in {folder}") from error
        if not file.tell():
            file.write(_LOCK_TEXT)
            file.flush()
        for path in sorted(folder.iterdir()):
            if data_number(path.name) is not None and not _is_ours(path):
                raise OutputError(f"{path} has the name of an index's own, and is none: name another folder")
        yield


def _is_ours(path: Path) -> bool:
    """Whether a data folder has nothing but what is written here."""
    ours = (VECTORS_FILE, LISTS_FILE, ROWS_FILE, PARTS_FILE)
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(name in ours or _PIECE_NAME.fullmatch(name) for name in os.listdir(path))
    )


def _clear(folder: Path, facts: Facts | None) -> None:
    """Remove the data folders that do not count: of a run that died, or of the index before."""
    clear_temporary(str(folder))
    for path in folder.iterdir():
        if data_number(path.name) is not None and (facts is None or path.name != facts.data) and _is_ours(path):
            shutil.rmtree(path)


def _check_same(folder: Path, old: Facts, source: Output, options: Options) -> None:
    """Raise where the index is of other settings than the output, or of another metric than asked for."""
    differences = old.made.settings.differences(source.made.settings)
    if differences:
        raise OtherSettingsError(
            f"the index {folder} was made from embeddings of other settings; name another folder:\n  "
            + "\n  ".join(f"{name}: index {own}, output {other}" for name, own, other in differences)
        )
    if options.metric is not None and options.metric != old.metric:
        raise SettingsError(
            f"the index {folder} has metric {old.metric}, asked for {options.metric}: name another folder"
        )


def _notes(stored: list[StoredPart]) -> list[str]:
    shards = unfinished(stored)
    if not shards:
        return []
    return [
        f"{format_count(len(shards), 'shard')} not whole yet, such as {shards[0]!r}: what is stored there is indexed"
    ]


def _compare(
    source: Output, folder: Path, old: Facts | None, stored: list[StoredPart]
) -> tuple[list[StoredPart], list[StoredPart], str]:
    """The parts in the index, in its order; those to add; and why all of it has to be built anew, if so."""
    if old is None:
        return [], with_facts(source, stored), "new"
    before = read_parts(folder / old.data)
    now = {part.name: part for part in stored}
    gone = [part.name for part in before if part.name not in now]
    # Copied or touched files have other times and the same content: their footers tell.
    suspects = [
        part
        for part in before
        if part.name in now and (part.num_bytes, part.version) != (now[part.name].num_bytes, now[part.name].version)
    ]
    asked = {part.name: part for part in with_facts(source, [now[part.name] for part in suspects])}
    changed = [part.name for part in suspects if asked[part.name].sha256 != part.sha256]
    known = {part.name for part in before}
    new = with_facts(source, [part for part in stored if part.name not in known])
    if gone or changed:
        kinds = [f"{len(names)} have {what}" for names, what in ((gone, "gone"), (changed, "changed")) if names]
        reason = f"of the parts in the index, {' and '.join(kinds)}, such as {(gone + changed)[0]}"
        left = [asked.get(part.name, part) for part in before if part.name in now]
        return sorted(left), new, reason
    return [asked.get(part.name, part) for part in before], new, ""


def _plan(source: Output, old: Facts | None, num_rows: int, options: Options) -> Facts:
    given = options.kind or (old.kind if old is not None and old.kind_given else None)
    kind = given or choose_kind(num_rows, source.num_features, options.memory_bytes)
    return Facts(
        output=source.url,
        made=source.made,
        metric=options.metric or (old.metric if old is not None else METRICS[0]),
        kind=kind,
        kind_given=given is not None,
        num_rows=num_rows,
        num_features=source.num_features,
        lists=old.lists if old is not None else 0,
        laid_out_rows=old.laid_out_rows if old is not None else 0,
        width=0,
        recall=0.0,
        recall_queries=0,
        data=_next_data(old),
        files={},
        made_with={
            "faiss": load_faiss().__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "python": platform.python_version(),
        },
    )


def _next_data(old: Facts | None) -> str:
    before = data_number(old.data) if old is not None else None
    return DATA_NAME.format(0 if before is None else before + 1)


def _other_layout(old: Facts | None, facts: Facts) -> str:
    if old is None:
        return ""
    if old.kind != facts.kind:
        return f"it was {old.kind}, and is {facts.kind} for {facts.num_rows} rows"
    if facts.kind == "ivf" and facts.num_rows > _GROWTH * old.laid_out_rows:
        return f"its lists were laid out for {old.laid_out_rows} rows, and it has {facts.num_rows} now"
    return ""


def _lists(facts: Facts, options: Options) -> int:
    return num_lists(facts.num_rows, facts.num_features, options.memory_bytes) if facts.kind == "ivf" else 0


def _write(
    source: Output,
    folder: Path,
    facts: Facts,
    before: Path | None,
    parts: tuple[list[StoredPart], list[StoredPart]],
    memory_bytes: int,
    on_progress: Progress,
) -> Facts:
    """Write the data folder, and then index.json, which makes it count.

    `parts` are those that the data folder `before` has, and those to add to it.
    """
    kept, new = parts
    data = folder / facts.data
    data.mkdir()
    with _Rows(data / ROWS_FILE, None if before is None else before / ROWS_FILE) as rows:
        if facts.kind == "ivf":
            index = _write_ivf(source, data, before, facts, new, memory_bytes, rows, on_progress)
        else:
            index = (
                new_index(facts.kind, facts.num_features, facts.metric, 0)
                if before is None
                else read_index(before / VECTORS_FILE)
            )
            for values in _each(source, facts, new, rows, on_progress):
                add_rows(index, values, index.ntotal)
            write_index(index, data / VECTORS_FILE)
    assert index.ntotal == facts.num_rows
    listed = pa.Table.from_pylist([part._asdict() for part in (*kept, *new)], schema=PARTS_SCHEMA)
    pq.write_table(listed, data / PARTS_FILE)
    on_progress("recall measured", 0, 1)
    found = measure(index)
    on_progress("recall measured", 1, 1)
    facts = replace(
        facts,
        width=found.width,
        recall=round(found.recall, 4),
        recall_queries=found.num_queries,
        files={path.name: (path.stat().st_size, sha256_of(path)) for path in sorted(data.iterdir())},
    )
    for path in (*data.iterdir(), data, folder):
        _settle(path)
    write_bytes(str(folder), INDEX_FILE, facts.as_json())
    return facts


def _each(
    source: Output, facts: Facts, parts: Sequence[StoredPart], rows: _Rows, on_progress: Progress
) -> Iterator[Vectors]:
    """The embeddings of `parts` as the index holds them; whose they are goes to `rows`."""
    total, done = sum(part.num_rows for part in parts), 0
    for piece in stream(source, parts):
        rows.add(piece.ids)
        yield prepared(piece.vectors, facts.metric)
        done += len(piece.vectors)
        on_progress("rows indexed", done, total)


def _write_ivf(
    source: Output,
    data: Path,
    before: Path | None,
    facts: Facts,
    new: Sequence[StoredPart],
    memory_bytes: int,
    rows: _Rows,
    on_progress: Progress,
) -> Any:
    """Pieces that fit the memory, each an index of its own, merged into lists on disk."""
    pieces: list[Any] = []
    if before is None:
        trained = new_index("ivf", facts.num_features, facts.metric, facts.lists)
        trained.train(_training_rows(source, facts, new, on_progress))
    else:
        pieces.append(read_index(before / VECTORS_FILE))
        trained = emptied(pieces[0])
    piece, row = emptied(trained), rows.num_rows
    most = max(1, memory_bytes // (2 * 4 * facts.num_features))

    def finish() -> None:
        path = data / _PIECE_FILE.format(len(pieces))
        write_index(piece, path)
        pieces.append(read_index(path, is_piece=True))

    for values in _each(source, facts, new, rows, on_progress):
        add_rows(piece, values, row)
        row += len(values)
        if piece.ntotal >= most:
            finish()
            piece = emptied(trained)
    if piece.ntotal:
        finish()
    merged = merge_on_disk(trained, pieces, data / LISTS_FILE)
    write_index(merged, data / VECTORS_FILE)
    for path in data.iterdir():
        if _PIECE_NAME.fullmatch(path.name):
            path.unlink()
    return merged


def _training_rows(source: Output, facts: Facts, parts: Sequence[StoredPart], on_progress: Progress) -> Vectors:
    """Rows to lay out the lists by, drawn at random from parts drawn at random: [N, C]."""
    wanted = min(facts.num_rows, IVF_TRAIN_ROWS * facts.lists)
    drawn: list[StoredPart] = []
    available = 0
    for part in random.Random(0).sample(list(parts), len(parts)):
        if len(drawn) >= _TRAIN_PARTS and available >= wanted:
            break
        drawn.append(part)
        available += part.num_rows
    rng = np.random.default_rng(0)
    found: list[Vectors] = []
    count = 0
    for piece in stream(source, drawn):
        some = -(-len(piece.vectors) * wanted // available)
        found.append(prepared(rng.permutation(piece.vectors)[:some], facts.metric))
        count += some
        on_progress("rows to train with", count, wanted)
    return np.concatenate(found)


class _Rows:
    """Writes whose the rows are, after those of an index before, in row groups of one size."""

    def __init__(self, path: Path, before: Path | None) -> None:
        self.num_rows = 0
        self._writer = pq.ParquetWriter(path, ROWS_SCHEMA, compression="zstd")
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0
        if before is not None:
            for batch in pq.ParquetFile(before).iter_batches(_ROW_GROUP_ROWS):
                self.add(pa.Table.from_batches([batch]).drop_columns(ROW))

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        if self._num_waiting:
            self._flush(self._num_waiting)
        self._writer.close()

    def add(self, ids: pa.Table) -> None:
        """The next rows."""
        numbers = pa.array(np.arange(self.num_rows, self.num_rows + len(ids)), pa.int64())
        self._waiting.append(pa.Table.from_arrays([numbers, *ids.columns], schema=ROWS_SCHEMA))
        self._num_waiting += len(ids)
        self.num_rows += len(ids)
        if self._num_waiting >= _ROW_GROUP_ROWS:
            self._flush(self._num_waiting // _ROW_GROUP_ROWS * _ROW_GROUP_ROWS)

    def _flush(self, count: int) -> None:
        table = pa.concat_tables(self._waiting)
        self._writer.write_table(table.slice(0, count), row_group_size=_ROW_GROUP_ROWS)
        self._waiting = [table.slice(count)]
        self._num_waiting -= count


def _settle(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk for good."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
