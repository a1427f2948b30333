"""Checks the size of a working folder before Ray uploads it: Ray's own answer to one that is too large is just 413.

Ray has no public function for this. Only this module uses Ray's packaging, and a test compares the two.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE, RAY_RUNTIME_ENV_IGNORE_GITIGNORE
from ray._private.runtime_env import packaging

from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import format_size

MAX_BYTES = DASHBOARD_CLIENT_MAX_SIZE
# The headers of a file in a zip have so many bytes, besides its name twice.
_HEADER_BYTES = 76
_SILENT = logging.getLogger(f"{__name__}.silent")
_SILENT.setLevel(logging.CRITICAL)
_NUM_SHOWN = 4


def upload_sizes(folder: str, excludes: Sequence[str]) -> Counter[str]:
    """Bytes that Ray uploads of `folder`, by the first part of each path in it."""
    top = Path(folder).absolute()
    sizes: Counter[str] = Counter()

    def add(path: Path) -> None:
        if path.is_file():
            name = path.relative_to(top)
            sizes[name.parts[0]] += path.stat().st_size + _HEADER_BYTES + 2 * len(os.fsencode(name))

    packaging._dir_travel(
        top,
        [packaging._get_excludes(top, list(excludes))],
        add,
        include_gitignore=os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=_SILENT,
    )
    return sizes


def check_size(folder: str, excludes: Sequence[str], max_bytes: int = MAX_BYTES) -> None:
    """Raise `SettingsError` if Ray would refuse to upload `folder`, and name what is largest in it."""
    sizes = upload_sizes(folder, excludes)
    if sizes.total() <= max_bytes:
        return
    largest = ", ".join(f"{name} ({format_size(size)})" for name, size in sizes.most_common(_NUM_SHOWN))
    raise SettingsError(
        f"--working-dir must have at most {format_size(max_bytes)}, which is all that Ray takes, got "
        f"{format_size(sizes.total())} in {folder!r}, most of it in {largest}; keep data elsewhere, or name it in a "
        ".rayignore file there, which is written as a .gitignore is"
    )
