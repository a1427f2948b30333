"""The samples of a shard, walked apart from the reader that made the output."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from pipeline.core.config import Field
from pipeline.core.errors import SampleError, ShardError
from pipeline.core.redact import describe
from pipeline.shards.fields import MAX_METADATA_BYTES, literal
from pipeline.shards.find import Shard
from pipeline.shards.grouping import Sample
from pipeline.shards.keys import Naming, printable
from pipeline.shards.peek import Entry, TarReader, open_tar


@dataclass
class Tar:
    """What a shard holds: the key of each sample and, where ids are a field, that field.

    `unused_images` are image members that no row stands for.
    """

    shard: Shard
    keys: list[str] = field(default_factory=list)
    ids: list[str | None] | None = None
    unused_images: int = 0
    fault: str | None = None

    def allowed(self, index: int, *, is_error: bool) -> list[str]:
        """Ids that the sample at `index` may have: an error may be told by its key before its id is known."""
        if index >= len(self.keys):
            return []
        key = self.keys[index]
        if self.ids is None:
            return [key]
        user_id = self.ids[index]
        return ([] if user_id is None else [user_id]) + ([key] if is_error else [])


def walk(shard: Shard, naming: Naming, id_field: Field | None) -> Tar:
    """The samples of a tar to the end of the file, read on after an end of the archive, and after damage."""
    found = Tar(shard, ids=None if id_field is None else [])
    metadata = frozenset() if id_field is None else frozenset({id_field.member.lower()})
    try:
        with open_tar(shard) as tar:
            for sample in tar.samples(naming, metadata):
                # The id first: reading it may fail, and each key has an id.
                if found.ids is not None and id_field is not None:
                    found.ids.append(_user_id(tar, sample, id_field))
                # As rows hold it: bytes that are not UTF-8 are escaped.
                found.keys.append(printable(sample.key))
                found.unused_images += sample.num_unused
            found.unused_images += tar.hidden_images
            found.fault = tar.fault
    except (OSError, ShardError) as error:
        found.fault = describe(error)
    return found


def _user_id(tar: TarReader, sample: Sample[Entry], field: Field) -> str | None:
    """The id that the user's field names, None where the sample has none."""
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
