"""How everything stored in an output is called."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from pipeline.core.schema import END_BROKEN, END_LAST, END_NONE

RUN_FILE = "run.json"

LEASE_FOLDER = ".lease"

EMBEDDINGS = "embeddings"
ERRORS = "errors"
METADATA_PREFIX = "embed."
_SUFFIX = {END_NONE: "", END_LAST: "-last", END_BROKEN: "-broken"}
_NAME = re.compile(
    r"(?P<shard>.+)\.(?P<tag>[0-9a-f]{12})-(?P<part>\d{5,})(?P<end>-last|-broken)?\.parquet", re.DOTALL
)


class PartName(NamedTuple):
    """What a part's path below `embeddings/` or `errors/` says."""

    shard: str
    tag: str
    part: int
    end: str

    def __str__(self) -> str:
        return f"{self.shard}.{self.tag}-{self.part:05d}{_SUFFIX[self.end]}.parquet"

    @classmethod
    def parse(cls, path: str) -> PartName | None:
        """The inverse of `str`; None for a path that is no part's."""
        match = _NAME.fullmatch(path)
        if match is None:
            return None
        end = (match["end"] or "").removeprefix("-")
        return cls(match["shard"], match["tag"], int(match["part"]), end)


def version_tag(num_bytes: int, version: str) -> str:
    """Short name of one version of a shard.

    It stands in the part names, so that a listing alone tells which parts belong to the shard as it is
    now, and parts of two versions are never taken for one shard.
    """
    return hashlib.sha256(f"{num_bytes}:{version}".encode()).hexdigest()[:12]


Place = tuple[str, int]  # shard and sample_index

REPORT_FILE = "report.json"
UNCOUNTED_FILE = ".uncounted"

PAGE_FILE = "report.html"
