"""Reads the samples of a shard, independently of the reader that made the output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from shard_embedder.pipeline.core.config import Field
from shard_embedder.pipeline.core.errors import SampleError, ShardError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.shards.fields import MAX_METADATA_BYTES, literal
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.grouping import Sample
from shard_embedder.pipeline.shards.keys import Naming, printable
from shard_embedder.pipeline.shards.peek import Entry, TarReader, open_tar


@dataclass
class Tar:
    """What a shard holds: the key of each sample and, if ids are a field, that field.

    `unused_images` are image members that no row stands for.
    """

    shard: Shard
    keys: list[str] = field(default_factory=list)
    ids: list[str | None] | None = None
    unused_images: int = 0
    fault: str | None = None

    def allowed_ids(self, index: int, *, is_error: bool) -> list[str]:
        """Ids that the sample at `index` may have. An error may have its key, when its id was not known yet."""
        if index >= len(self.keys):
            return []
        key = self.keys[index]
        if self.ids is None:
            return [key]
        user_id = self.ids[index]
        return ([] if user_id is None else [user_id]) + ([key] if is_error else [])


def read_tar(shard: Shard, naming: Naming, id_field: Field | None) -> Tar:
    """Read a tar to the end of the file, past an end of the archive and past damage."""
    found = Tar(shard, ids=None if id_field is None else [])
    metadata = frozenset() if id_field is None else frozenset({id_field.member.lower()})
    try:
        with open_tar(shard) as tar:
            for sample in tar.samples(naming, metadata):
                # The id before the key: if reading it fails, there must be no key without an id.
                if found.ids is not None and id_field is not None:
                    found.ids.append(_user_id(tar, sample, id_field))
                found.keys.append(printable(sample.key))
                found.unused_images += sample.num_unused
            found.unused_images += tar.hidden_images
            found.fault = tar.fault
    except (OSError, ShardError) as error:
        found.fault = describe(error)
    return found


def _user_id(tar: TarReader, sample: Sample[Entry], field: Field) -> str | None:
    """The id in the user's field, or None if the sample has none."""
    wanted = field.member.lower()
    named = sample.metadata.get(wanted)
    data = tar.read(named) if named is not None and named.num_bytes <= MAX_METADATA_BYTES else None
    if data is None:
        return None
    if not field.path and wanted != "json":
        if field.type == "string":
            return data.decode("utf-8-sig", "backslashreplace").strip("\r\n")
        try:
            value = literal(data)
        except SampleError:
            return None
    else:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            return None
        for name in field.path:
            value = value.get(name) if isinstance(value, dict) else None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
