"""The result of a verification: the rules, the findings that break them, and the verdict."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from shard_embedder.pipeline.core.formatting import one_line

RULES = {
    "no-parts": "an output holds at least one part",
    "stray-file": "embeddings/ and errors/ hold parts and nothing else",
    "part-missing": "a shard's parts are 0 to k, the last marked as such",
    "part-twice": "a part is stored once, and none comes after the last",
    "two-versions": "a shard's parts are of one version of it",
    "old-version": "a shard's parts are of its present version in the input",
    "shard-missing": "every shard of the input is in the output",
    "shard-refused": "every shard of the input has a name that an output can have, and can be read piece by piece",
    "shard-broken": "a shard was read to its proven end",
    "errors-missing": "a part that counts errors has its errors file",
    "errors-alone": "an errors file belongs to a part, which counts errors",
    "unreadable": "a file is Parquet, whole and readable to its last row group",
    "schema": "columns, types and the embedding's shape are as run.json says",
    "fingerprint": "every part was made with the settings of run.json",
    "metadata": "a file's metadata agrees with its name and its rows",
    "checksum": "rows are those that were written",
    "counts": "embeddings and errors of a part are as many as its samples",
    "sample-index": "sample_index counts on, each sample once, in the order of the shard",
    "id-repeated": "image_id is unique within a shard",
    "shard-column": "the shard column names the part's shard",
    "not-finite": "embeddings have no NaN and no infinite value",
    "length": "embeddings have the L2 length 1 where they were normalized",
    "constant": "the values within one embedding are not all the same",
    "all-alike": "the embeddings of a shard are not all the same, where its images are not",
    "tar-unreadable": "a shard of the input can be read",
    "tar-count": "a shard has as many samples as its tar, and as many image members without a row",
    "tar-id": "image_id is that of the tar's sample at sample_index",
    "recompute": "an embedding is that of its image",
}

# A run makes a part with one of these findings again once the part is deleted.
_REMADE = frozenset(
    {"errors-missing", "unreadable", "schema", "fingerprint", "metadata", "checksum", "counts"}
    | {"sample-index", "shard-column", "not-finite", "tar-id", "recompute"}
)
# A run mends these without anything deleted.
_RUN_AGAIN = frozenset(
    {"no-parts", "part-missing", "part-twice", "old-version", "two-versions", "shard-missing", "shard-broken"}
)


class Finding(NamedTuple):
    """One thing that is wrong: in which file, which of `RULES` it breaks, and with what value."""

    file: str
    rule: str
    value: str

    def __str__(self) -> str:
        return f"{one_line(self.file)}: {self.rule}: {one_line(self.value)}"


@dataclass
class Verdict:
    """What was read, and every fault in it. `notes` say what is unusual and no fault."""

    output: str
    fingerprint: str
    shards: int = 0
    broken_shards: int = 0
    parts: int = 0
    samples: int = 0
    embedded: int = 0
    errors: int = 0
    # Image members that no row stands for, and one of them.
    unused_images: int = 0
    unused_example: str | None = None
    num_bytes: int = 0
    tars_compared: int = 0
    recomputed: int = 0
    lowest_cosine: float | None = None
    # Of shards that the input does not name, which no run mends: what to delete, and the files with findings.
    retired: dict[str, list[str]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_finding(self, file: str, rule: str, value: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(file, rule, value))

    def retire(self, parts: str, first: int) -> None:
        """The findings from number `first` on are of a shard that the input does not name: only deleting its `parts`
        mends them, where a run would.
        """
        found = self.findings[first:]
        if any(finding.rule in _REMADE | _RUN_AGAIN for finding in found):
            self.retired[parts] = [finding.file for finding in found]

    @property
    def proven(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def to_delete(self) -> list[str]:
        """Paths below the output to delete: parts that a run then makes again, and errors files without a part."""
        mended = self._mended_in_place()
        spoiled = {finding.file.partition("/")[2] for finding in mended if finding.rule in _REMADE}
        alone = {finding.file for finding in mended if finding.rule == "errors-alone"}
        return sorted({f"embeddings/{name}" for name in spoiled if name.endswith(".parquet")} | alone)

    @property
    def mended_by_a_run(self) -> bool:
        """Whether a run mends something, once `to_delete` is deleted."""
        return any(finding.rule in _REMADE | _RUN_AGAIN for finding in self._mended_in_place())

    def _mended_in_place(self) -> list[Finding]:
        retired = {file for files in self.retired.values() for file in files}
        return [finding for finding in self.findings if finding.file not in retired]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON, with the meaning of each finding's rule."""
        findings = [{**finding._asdict(), "means": RULES[finding.rule]} for finding in self.findings]
        return {"proven": self.proven, **asdict(self), "findings": findings}


def first_few(texts: Iterable[str], most: int = 3, separator: str = ", ") -> str:
    """The first `most` of `texts`, with dots if there are more."""
    shown = list(itertools.islice(texts, most + 1))
    return separator.join(shown[:most]) + (" ..." if len(shown) > most else "")
