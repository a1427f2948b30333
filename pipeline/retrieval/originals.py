"""The image files that the rows of an output were made of, as far as they are on this machine."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.core.config import Field
from shard_embedder.pipeline.core.errors import PipelineError
from shard_embedder.pipeline.core.schema import SAMPLE_INDEX
from shard_embedder.pipeline.core.storage import join, locate
from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.names import EMBEDDINGS, Place
from shard_embedder.pipeline.output.stored import StoredPart, list_stored, open_output
from shard_embedder.pipeline.retrieval.index import Index, read_parts
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.photos import PATH, find_shards_or_images


class Input(NamedTuple):
    """What --input names: shards, none for those that the output was made of; or a folder of images."""

    shards: Sequence[Shard]
    folder: Path | None


def find_input(inputs: Sequence[str]) -> Input:
    """The shards, or the folder of images, told apart as the job does.

    Raises:
        InputError: the inputs name neither.
    """
    if not inputs:
        return Input((), None)
    found = find_shards_or_images(inputs)
    return Input((), found) if isinstance(found, Path) else Input(found.shards, None)


class Original(NamedTuple):
    """The path that a row names, and the file below the folder of images that has it, if one has."""

    path: str
    file: Path | None


class Originals:
    """Finds the original of a row by the `json:path` that is its id or a kept field.

    `folder` is the folder of images; None for the one that the output was made of. `parts` lists those of the output.
    """

    def __init__(
        self, output: str, made: Fingerprint, parts: Callable[[], Sequence[StoredPart]], folder: Path | None = None
    ) -> None:
        named = folder or (Path(made.photos_folder) if made.photos_folder else None)
        self._folder = None if named is None else named.resolve()
        self._output = output
        self._parts = functools.cache(parts)
        settings = made.settings
        self._is_id = settings.id is not None and _is_path(settings.id)
        self._column = next((field.column for field in settings.keep if _is_path(field)), None)

    @classmethod
    def of_index(cls, index: Index, folder: Path | None = None) -> Originals:
        """Of the rows of an index."""
        return cls(index.facts.output, index.facts.made, lambda: read_parts(index.folder), folder)

    @classmethod
    def of_output(cls, url: str, folder: Path | None = None) -> Originals:
        """Of the rows of an output. Raises `OutputError` as `open_output` does."""
        output = open_output(url)
        return cls(url, output.made, lambda: list_stored(output), folder)

    def find(self, rows: Iterable[tuple[str, Place]]) -> dict[Place, Original]:
        """The originals of rows, given by image_id and place. A row that names no path has none."""
        if self._is_id:
            paths = {place: image_id for image_id, place in rows}
        elif self._column is not None:
            paths = self._kept_paths(self._column, {place for _, place in rows})
        else:
            return {}
        return {place: Original(path, self._file(path)) for place, path in paths.items()}

    def files(self, rows: Iterable[tuple[str, Place]]) -> dict[Place, Path]:
        """The files of rows, given as for `find`. Nothing is read where no folder of images is known."""
        if self._folder is None:
            return {}
        return {place: one.file for place, one in self.find(rows).items() if one.file is not None}

    def _kept_paths(self, column: str, places: Iterable[Place]) -> dict[Place, str]:
        """The paths that are stored; none of an output that is no longer where it was."""
        wanted: dict[str, set[int]] = defaultdict(set)
        for shard, row in places:
            wanted[shard].add(row)
        found: dict[Place, str] = {}
        try:
            for part in self._parts():
                rows = wanted.get(part.shard)
                if not rows:
                    continue
                fs, path = locate(join(self._output, f"{EMBEDDINGS}/{part.name}"))
                table = pq.read_table(path, filesystem=fs, columns=[SAMPLE_INDEX, column])
                for row, value in zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True):
                    if row in rows and value is not None:
                        found[part.shard, row] = value
        except (OSError, PipelineError, pa.ArrowException, ValueError):
            return found
        return found

    def _file(self, path: str) -> Path | None:
        """The file of a path. A path is data of a shard: what leads out of the folder is no file of it."""
        if self._folder is None:
            return None
        try:
            file = (self._folder / path).resolve()
            return file if file.is_relative_to(self._folder) and file.is_file() else None
        # What Python raises for a NUL, or a name that is too long.
        except (OSError, ValueError):
            return None


def _is_path(field: Field) -> bool:
    return (field.member, field.path, field.type) == (PATH.member, PATH.path, PATH.type)
