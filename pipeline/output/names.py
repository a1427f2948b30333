"""How everything stored in an output is called."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from shard_embedder.pipeline.core.schema import END_BROKEN, END_LAST, END_NONE

RUN_FILE = "run.json"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
REPORTS_FOLDER = "reports"  # the report of every run that had work to do, by its id
UNCOUNTED_FILE = ".uncounted"
LEASE_FOLDER = ".lease"
EMBEDDINGS = "embeddings"
ERRORS = "errors"
METADATA_PREFIX = "embed."
_SUFFIX = {END_NONE: "", END_LAST: "-last", END_BROKEN: "-broken"}
_NAME = re.compile(
    r"(?P<shard>.+)\.(?P<tag>[0-9a-f]{12})-(?P<part>\d{5,})(?P<end>-last|-broken)?\.parquet", re.DOTALL
)
# Characters that some reader interprets, as a pattern, a URL's query, an escape, a hive partition (`dt=7/`), a scheme
# (`a:b`), or a command of the terminal; and the escape itself.
_SPECIAL = re.compile(
    r"""[~=:*?\[\]{}#%\\"<>|\x00-\x1f\x7f-\x9f\u2028\u2029]"""
    # Spark, Hive and PyArrow skip files and folders whose names begin with these.
    r"""|(?:(?<=/)|^)[_.]"""
    # A folder must not look like a part.
    r"""|\.(?=parquet/)"""
)
_ESCAPED = re.compile(r"(?:~[0-9A-F]{2})+")

Place = tuple[str, int]  # shard and sample_index


def escape(shard: str) -> str:
    """A shard's name as a path that every reader of Parquet takes literally.

    Each byte of UTF-8 of a special character is `~` and two hexadecimal digits: `_new/a:b` is `~5Fnew/a~3Ab`.
    """
    return _SPECIAL.sub(lambda match: "".join(f"~{byte:02X}" for byte in match[0].encode()), shard)


def unescape(path: str) -> str | None:
    """The inverse of `escape`; None for a path that `escape` never returns."""
    if not _SPECIAL.search(path):
        return path
    try:
        shard = _ESCAPED.sub(lambda match: bytes.fromhex(match[0].replace("~", "")).decode(), path)
        return shard if escape(shard) == path else None
    except UnicodeError:
        return None


class PartName(NamedTuple):
    """The path of a part below `embeddings/` or `errors/`, taken apart. `shard` is unescaped."""

    shard: str
    tag: str
    part: int
    end: str

    def __str__(self) -> str:
        return f"{escape(self.shard)}.{self.tag}-{self.part:05d}{_SUFFIX[self.end]}.parquet"

    @classmethod
    def parse(cls, path: str) -> PartName | None:
        """The inverse of `str`; None for a path that is no part's."""
        match = _NAME.fullmatch(path)
        shard = None if match is None else unescape(match["shard"])
        if match is None or shard is None:
            return None
        end = (match["end"] or "").removeprefix("-")
        return cls(shard, match["tag"], int(match["part"]), end)


def version_tag(num_bytes: int, version: str) -> str:
    """Short name of one version of a shard.

    It stands in the part names, so that a listing alone tells which parts belong to the shard as it is
    now, and parts of two versions are never taken for one shard.
    """
    return hashlib.sha256(f"{num_bytes}:{version}".encode()).hexdigest()[:12]
