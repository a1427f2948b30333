"""The folder of the cache: the user's own by convention, or the one that is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from jobs.support.cache_folder import find_cache
from pipeline.core.config import parse
from pipeline.planning.known import make_key


@pytest.mark.parametrize(
    ("setting", "environment", "folder"),
    [
        (None, {"XDG_CACHE_HOME": "/var/x"}, "/var/x/shard-embedder"),
        (None, {}, "~/.cache/shard-embedder"),
        (None, {"XDG_CACHE_HOME": ""}, "~/.cache/shard-embedder"),
        (None, {"XDG_CACHE_HOME": "relative"}, "~/.cache/shard-embedder"),
        ("/data/c", {"XDG_CACHE_HOME": "/var/x"}, "/data/c"),
        ("none", {"XDG_CACHE_HOME": "/var/x"}, None),
    ],
)
def test_the_folder_is_where_users_expect_it(
    setting: str | None, environment: Mapping[str, str], folder: str | None
) -> None:
    cache = find_cache(setting, environment)
    assert (cache and cache.folder) == (folder and Path(folder).expanduser())


def test_where_libraries_look_for_weights_is_part_of_the_key(tmp_path: Path) -> None:
    environment = {"HOME": "/home/a", "TERM": "xterm", "HF_TOKEN": "secret"}

    def key(**changes: str) -> str:
        cache = find_cache(str(tmp_path), environment | changes)
        assert cache is not None
        made = make_key(parse({"input": ["in"], "output": "out"}), cache)
        assert made is not None
        return made

    assert key() == key(TERM="dumb", HF_TOKEN="other", EMBED_INPUT="in")
    assert len({key(), key(TORCH_HOME="/t"), key(HF_HOME="/h"), key(HOME="/home/b")}) == 4
