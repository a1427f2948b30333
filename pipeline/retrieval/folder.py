"""The folder that an index is built in. One build holds it at a time, and removes nothing that it did not write."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from shard_embedder.pipeline.core.errors import OutputBusyError, OutputError, SettingsError
from shard_embedder.pipeline.core.writing import TEMPORARY_FOLDER, clear_temporary
from shard_embedder.pipeline.retrieval.index import (
    INDEX_FILE,
    LISTS_FILE,
    PARTS_FILE,
    ROWS_FILE,
    VECTORS_FILE,
    IndexFacts,
    data_number,
)

# A part of an ivf index, while the index is written.
PIECE_FILE = "piece-{:05d}.faiss"
PIECE_NAME = re.compile(r"piece-[0-9]+\.faiss")
_LOCK_FILE = ".lock"
_LOCK_TEXT = "jobs/index.py makes an index in this folder\n"


def local_folder(index: str | Path) -> Path:
    """The absolute path of an index. Raises `SettingsError` if that is no local folder."""
    if "://" in str(index):
        raise SettingsError(f"the index must be a local folder, got {index}")
    folder = Path(index).absolute()
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"the index must be a folder, {folder} is a file")
    return folder


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder while the block runs.

    Raises:
        OutputError: it is neither new, nor empty, nor that of an index.
        OutputBusyError: another build holds it.
    """
    names = sorted(os.listdir(folder)) if folder.exists() else []
    if INDEX_FILE not in names:
        ours = (_LOCK_FILE, TEMPORARY_FOLDER, *(name for name in names if data_number(name) is not None))
        # The lock shows that a first build began here and died. Without it, nothing in the folder is ours.
        has_begun = _LOCK_FILE in names and (folder / _LOCK_FILE).read_text(errors="replace") == _LOCK_TEXT
        others = [name for name in names if name not in (ours if has_begun else (_LOCK_FILE,))]
        if others:
            raise OutputError(f"{folder} is not empty and no index: it has {others[0]!r}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK_FILE, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputBusyError(f"another build is at work in {folder}") from error
        if not file.tell():
            file.write(_LOCK_TEXT)
            file.flush()
        for path in sorted(folder.iterdir()):
            if data_number(path.name) is not None and not _is_ours(path):
                raise OutputError(f"{path} has the name of an index's own, and is none: name another folder")
        yield


def remove_old_data(folder: Path, facts: IndexFacts | None) -> None:
    """Remove the data folders that index.json does not name: of a build that died, or of the index before."""
    clear_temporary(str(folder))
    for path in folder.iterdir():
        if data_number(path.name) is not None and (facts is None or path.name != facts.data) and _is_ours(path):
            shutil.rmtree(path)


def _is_ours(path: Path) -> bool:
    """Whether a data folder has only files that a build writes."""
    ours = (VECTORS_FILE, LISTS_FILE, ROWS_FILE, PARTS_FILE)
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(name in ours or PIECE_NAME.fullmatch(name) for name in os.listdir(path))
    )
