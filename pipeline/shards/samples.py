"""A shard's tar stream as samples, and the samples as parts.

The key rule is WebDataset's: the member's path up to the first dot of its basename; with `--key last-dot`
up to the last. A sample is a run of consecutive members of one key. What `webdataset` drops or refuses
becomes a row with a reason: a repeated key, a repeated member, a member without an extension, a sample cut
short, one without an image. An image beside the one that its sample's row stands for is counted.

Where the members of a key do not stand side by side, its image is still embedded: what has no image does
not take the key. The other members are rows with a reason, and their fields null.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from shard_embedder.pipeline.core.config import Config, Field
from shard_embedder.pipeline.core.errors import SampleError, ShardChangedError, ShardError
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.schema import (
    END_BROKEN,
    END_LAST,
    END_NONE,
    MEMBERS_APART,
    NO_IMAGE,
    STAGE_READ,
    STAGES,
    UNKNOWN_INDEX,
    image_field,
    part_row,
    sample_type,
)
from shard_embedder.pipeline.shards.fields import find_user_id, kept_field, why_lost
from shard_embedder.pipeline.shards.find import Pending
from shard_embedder.pipeline.shards.grouping import Ignored, Sample, brief, iter_samples
from shard_embedder.pipeline.shards.keys import Naming, image_rank, printable, split_key
from shard_embedder.pipeline.shards.stream import ShardStream
from shard_embedder.pipeline.shards.tars import Member, iter_members

# A part ends early, by content alone, where its images and texts would take more memory than this.
MAX_PART_BYTES = 512 * 2**20
# Nor has it more rows than fit into so many bytes of decoded pixels.
MAX_PART_PIXEL_BYTES = 512 * 2**20
_SIDE_BY_SIDE = "members of a sample must stand side by side, as `tar --sort=name` puts them"
_KEY, _ID = "key", "id"


class SampleReader:
    """Reads shards by the rules of one job's `config`."""

    def __init__(self, config: Config, limits: StoreLimits = LIMITS) -> None:
        self._config = config
        self._limits = limits
        self._naming = Naming(config.key, config.image_member)
        fields = [*config.keep, *([config.id] if config.id else [])]
        self._metadata = {item.member.lower() for item in fields}
        self._type = sample_type(image_field(), config.kept_columns)

    def _wanted(self, name: str) -> bool:
        split = split_key(name, self._naming.key)
        if split is None:
            return False
        return split[1].lower() in self._metadata or image_rank(split[1], self._naming.image_member) is not None

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Shards (`SHARD_SCHEMA`) in, their parts out, as soon as each is read."""
        for row in table.to_pylist():
            yield from self.parts(Pending(**{**row, "stored_parts": tuple(row["stored_parts"])}))

    def parts(self, shard: Pending) -> Iterator[pa.Table]:
        """Yield the shard's parts that are not stored yet, each a table of one row.

        The last one says how the shard ended: proven (`last`), or `broken` with the fault. All
        samples that can be read are in some part, whatever happens after them.
        """
        builder = _PartBuilder(shard, self._type, self._config.keep)
        fault: ShardError | None = None
        ignored = 0
        with ShardStream(shard.url, shard.num_bytes, shard.version, self._limits) as stream:
            try:
                members = iter_members(stream, self._wanted, self._config.max_image_bytes)
                for sample in iter_samples(members, self._naming, self._metadata):
                    if isinstance(sample, Ignored):
                        ignored += sample.num_members
                        if self._naming.is_hidden_image(sample.name):
                            builder.add_unused(1, f"{brief(sample.name)}, which is hidden")
                        continue
                    if builder.is_full(self._config.part_rows):
                        stream.check_unchanged()
                        yield from builder.finish(END_NONE, stream.position)
                    if sample.num_unused:
                        image = sample.image
                        beside = "" if image is None else f", beside {brief(image.name)}"
                        builder.add_unused(sample.num_unused, brief(sample.other_image) + beside)
                    row, own_id = self._row(sample)
                    builder.add(row, sample, own_id)
                stream.check_unchanged()
            except ShardError as error:
                fault = _confirmed(error, stream)
                if isinstance(fault, ShardChangedError):
                    builder.discard()
            if fault is not None and builder.stored_reach_further:
                builder.go_after_stored()
            yield from builder.finish(END_LAST if fault is None else END_BROKEN, stream.position, fault, ignored)

    def _row(self, sample: Sample[Member]) -> tuple[dict[str, Any], str | None]:
        """The sample's row, and its id where that is of its own. Its image is None where it has a reason."""
        key, own_id = sample.key, None
        row: dict[str, Any] = {"image_id": printable(key), "member": None, "image": None, "lost": []}
        row["kept"] = [None] * len(self._config.keep)
        image = sample.image
        row["member"] = printable(image.name if image is not None else sample.first_name)
        try:
            if printable(key) != key:
                raise SampleError("key is not UTF-8: its bytes are shown escaped")
            if sample.problem is not None:
                raise SampleError(sample.problem)
            if self._config.id is not None:
                row["image_id"] = own_id = self._user_id(sample, self._config.id)
            if image is None:
                extensions = sorted(brief(name[len(key) + 1 :]) or "none" for name in sample.names)
                raise SampleError(
                    f"{NO_IMAGE}: its members have the extensions {', '.join(extensions[:8])}; {_SIDE_BY_SIDE}"
                )
            if image.problem is not None:
                raise SampleError(f"unreadable member: {image.problem}")
            for position, item in enumerate(self._config.keep):
                value, lost = kept_field(sample, item)
                row["kept"][position] = value
                if lost:
                    row["lost"].append(position)
            row["image"] = image.data
        except SampleError as error:
            row["reason"] = str(error)
        return row, own_id

    @staticmethod
    def _user_id(sample: Sample[Member], item: Field) -> str:
        try:
            return find_user_id(sample, item)
        except SampleError as error:
            if item.member.lower() in sample.metadata:
                raise
            raise SampleError(f"{error}; it has no {item.member} beside it: {_SIDE_BY_SIDE}") from error


def bound_part_rows(part_rows: int, crop: tuple[int, int]) -> int:
    """At most `part_rows`, and no more than a part's decoded pixels have room for, of images of `crop` (H, W)."""
    height, width = crop
    return max(1, min(part_rows, MAX_PART_PIXEL_BYTES // (height * width * 3)))


class _PartBuilder:
    """Collects rows, and cuts them into parts."""

    def __init__(self, shard: Pending, sample_struct: pa.StructType, keep: tuple[Field, ...]) -> None:
        self._shard = shard
        self._type = sample_struct
        self._keep = keep
        self._stored = set(shard.stored_parts)
        # Keys of samples with an image, and ids.
        self._seen: set[int] = set()
        # Keys of members without an image.
        self._bare: set[int] = set()
        self._part = 0
        self._index = 0
        self._since = time.perf_counter()
        self._read_to = 0
        self._clear()

    def _clear(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0
        self._kept: list[dict[str, Any]] = [{"values": 0, "lost": 0, "example": None} for _ in self._keep]
        self._apart = 0
        self._unused = 0
        self._unused_example: str | None = None

    def discard(self) -> None:
        """Drop the part collected so far."""
        self._clear()

    @property
    def stored_reach_further(self) -> bool:
        """Whether a part is stored that comes after the one collected, or is it."""
        return self._part <= max(self._stored, default=-1)

    def go_after_stored(self) -> None:
        """Drop what is collected, and go on after the last stored part: at which sample that is, is not known."""
        self._clear()
        self._part = max(self._stored) + 1
        self._index = UNKNOWN_INDEX

    def is_full(self, part_rows: int) -> bool:
        return len(self._rows) >= part_rows or self._bytes >= MAX_PART_BYTES

    def add(self, row: dict[str, Any], sample: Sample[Member], own_id: str | None) -> None:
        """Add one sample. A key, or an id of its own, seen before in this shard makes it a row with a reason.

        Without an image it takes neither.
        """
        of_key = hash((_KEY, sample.key))
        if sample.image is None:
            if of_key in self._seen:
                self._apart += of_key not in self._bare
                row["reason"] = f"{MEMBERS_APART}: the image of their key stands before them; {_SIDE_BY_SIDE}"
            self._bare.add(of_key)
        else:
            self._apart += of_key in self._bare and of_key not in self._seen
            for kind, name in ((_KEY, sample.key), (_ID, own_id)):
                if name is None:
                    continue
                fingerprint = hash((kind, name))
                if fingerprint in self._seen:
                    reason = f"repeated {kind}: an earlier sample of this shard has it"
                    row |= {"image": None, "reason": reason}
                    break
                self._seen.add(fingerprint)
        texts = [row["image_id"], row["member"], *row["kept"]]
        self._bytes += len(row["image"] or b"") + sum(len(text.encode()) for text in texts if isinstance(text, str))
        if self._keep and row.get("reason") is None:
            self._count_kept(row, sample)
        self._rows.append(row)

    def _count_kept(self, row: dict[str, Any], sample: Sample[Member]) -> None:
        for counts, value in zip(self._kept, row["kept"], strict=True):
            counts["values"] += value is not None
        for position in row["lost"]:
            counts = self._kept[position]
            counts["lost"] += 1
            if counts["example"] is None:
                counts["example"] = f"{brief(sample.key)}: {why_lost(sample, self._keep[position])}"

    def add_unused(self, count: int, example: str) -> None:
        """Count image members that no row stands for, of which `example` is one."""
        self._unused += count
        if self._unused_example is None:
            self._unused_example = example

    def finish(
        self, end: str, position: int, fault: ShardError | None = None, ignored: int = 0
    ) -> Iterator[pa.Table]:
        """Yield the part collected so far, unless it is stored already, and begin the next."""
        first = self._index
        values = {
            "name": self._shard.name,
            "url": self._shard.url,
            "num_bytes": self._shard.num_bytes,
            "version": self._shard.version,
            "part": self._part,
            "first_index": first,
            "num_samples": len(self._rows),
            "end": end,
            "fault": None if fault is None else str(fault),
            "fault_transient": fault is not None and fault.transient,
            "ignored_members": ignored,
            "unused_images": self._unused,
            "unused_example": self._unused_example,
            "apart_samples": self._apart,
            "kept_nulls": sum(counts["lost"] for counts in self._kept),
            "kept": self._kept,
            "read_bytes": position - self._read_to,
            "batch_size": 0,
            "device_refused": 0,
            "device_refusal": None,
            **{f"{stage}_s": 0.0 for stage in STAGES},
        }
        self._index += len(self._rows)
        self._part += 1
        self._read_to = position
        if values["part"] not in self._stored:
            samples = _samples_array(self._rows, first, self._type)
            self._clear()
            now = time.perf_counter()
            values[f"{STAGE_READ}_s"] = now - self._since
            yield part_row(values, samples)
        self._clear()
        self._since = time.perf_counter()


def _samples_array(rows: list[dict[str, Any]], first: int, kind: pa.StructType) -> pa.StructArray:
    count = len(rows)
    fields = [kind.field(i) for i in range(kind.num_fields)]
    reasons = [row.get("reason") for row in rows]
    kept = zip(*(row["kept"] for row in rows), strict=True) if rows else [[]] * (len(fields) - 6)
    columns = [
        list(range(first, first + count)),
        [row["image_id"] for row in rows],
        [row["member"] for row in rows],
        [None if reason is None else STAGE_READ for reason in reasons],
        reasons,
        *kept,
    ]
    arrays = [pa.array(column, item.type) for column, item in zip(columns, fields[:-1], strict=True)]
    arrays.append(_large_binary([row["image"] for row in rows]))
    return pa.StructArray.from_arrays(arrays, fields=fields)


def _large_binary(values: list[bytes | None]) -> pa.LargeBinaryArray:
    """The same as `pa.array(values, pa.large_binary())`, which copies its data again whenever it needs more room.

    The data goes into a NumPy array because NumPy requests huge pages. In a bytes object of this size, page faults
    take as long as the copy.
    """
    offsets = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    data = np.empty(offsets[-1], np.uint8)
    room = data.data
    for value, start, end in zip(values, offsets, offsets[1:], strict=False):
        if value is not None:
            room[start:end] = value
    valid = pa.array([value is not None for value in values], pa.bool_())
    return pa.Array.from_buffers(
        pa.large_binary(),
        len(values),
        [valid.buffers()[1], pa.py_buffer(offsets), pa.py_buffer(data)],
        null_count=values.count(None),
    )


def _confirmed(error: ShardError, stream: ShardStream) -> ShardError:
    """`error`, unless the shard is no longer the planned one: then what was read is void."""
    if isinstance(error, ShardChangedError):
        return error
    try:
        stream.check_unchanged()
    except ShardChangedError as changed:
        return changed
    return error
