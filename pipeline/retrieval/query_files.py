"""The image files that a search is given: told before torch is loaded to embed them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shard_embedder.pipeline.core.errors import InputError
from shard_embedder.pipeline.shards.keys import IMAGE_EXTENSIONS


def find_images(paths: Sequence[str]) -> list[Path]:
    """The image files that `paths` name: files as they are, folders by the extensions of their files.

    Raises:
        InputError: a path is empty or not there, or a folder has no image.
    """
    found: list[Path] = []
    if "" in paths:
        # To Path this would be the current folder.
        raise InputError("a path to an image must not be empty, got ''")
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                Path(folder, name)
                for folder, _, names in os.walk(path)
                for name in names
                if name.lower().rpartition(".")[2] in IMAGE_EXTENSIONS and not name.startswith(".")
            )
            if not inside:
                raise InputError(f"no image in {path}: looked for {', '.join(IMAGE_EXTENSIONS[:9])} and rarer ones")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"image {path} not found")
    return found
