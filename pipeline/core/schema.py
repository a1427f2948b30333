"""Column names, and the Arrow schemas that stand between the stages.

A row between the stages is one *part*: up to `part_rows` consecutive samples of one shard, nested in
the column `samples`. Ray Data splits and merges blocks only between rows, so a part stays whole on its
way; a shard without samples still has a row that says so; and small parts travel many to a block.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

# Columns of the parts in OUTPUT.
IMAGE_ID = "image_id"
SHARD = "shard"
SAMPLE_INDEX = "sample_index"
EMBEDDING = "embedding"
MEMBER = "member"
STAGE = "stage"
REASON = "reason"
# Classes of reasons that others ask for.
SHARD_FAULT = "shard fault"  # of no sample
NO_IMAGE = "no image"
MEMBERS_APART = "members apart"
RESERVED_COLUMNS = frozenset({IMAGE_ID, SHARD, SAMPLE_INDEX, EMBEDDING, MEMBER, STAGE, REASON})

# Columns of the rows between stages.
SAMPLES = "samples"
IMAGE = "image"
PIXELS = "pixels"
ENCODED = "encoded"
KEPT_PREFIX = "keep:"

# How a part ends its shard.
END_NONE = ""
END_LAST = "last"
END_BROKEN = "broken"

# `first_index` of an empty part that tells a fault met before the end of what an earlier run stored.
UNKNOWN_INDEX = -1

STAGE_READ = "read"
STAGE_DECODE = "decode"
STAGE_EMBED = "embed"
STAGE_WRITE = "write"
STAGES = (STAGE_READ, STAGE_DECODE, STAGE_EMBED, STAGE_WRITE)

KEEP_TYPES: dict[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "json": pa.string(),
}

SHARD_SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("version", pa.string(), nullable=False),
        pa.field("stored_parts", pa.list_(pa.int32()), nullable=False),
    ]
)

KEPT_COUNTS = pa.struct(
    [
        pa.field("values", pa.int64(), nullable=False),
        pa.field("lost", pa.int64(), nullable=False),
        pa.field("example", pa.string()),
    ]
)

PART_FIELDS: tuple[pa.Field, ...] = (
    pa.field("name", pa.string(), nullable=False),
    pa.field("url", pa.string(), nullable=False),
    pa.field("num_bytes", pa.int64(), nullable=False),
    pa.field("version", pa.string(), nullable=False),
    pa.field("part", pa.int32(), nullable=False),
    pa.field("first_index", pa.int32(), nullable=False),
    pa.field("num_samples", pa.int32(), nullable=False),
    pa.field("end", pa.string(), nullable=False),
    pa.field("fault", pa.string()),
    pa.field("fault_transient", pa.bool_(), nullable=False),
    pa.field("ignored_members", pa.int64(), nullable=False),
    # Image members that no row stands for, and one of them.
    pa.field("unused_images", pa.int64(), nullable=False),
    pa.field("unused_example", pa.string()),
    # Keys whose image and other members do not stand side by side.
    pa.field("apart_samples", pa.int64(), nullable=False),
    pa.field("kept_nulls", pa.int64(), nullable=False),
    # Of each field of `keep`, in its order: rows with a value, values that were lost, and one of these.
    pa.field("kept", pa.list_(KEPT_COUNTS), nullable=False),
    pa.field("read_bytes", pa.int64(), nullable=False),
    pa.field("batch_size", pa.int32(), nullable=False),  # images a batch, of the runner; 0 before it is embedded
    # Images that the device's decoder refused and the CPU decoded instead, and what the device said of the first.
    pa.field("device_refused", pa.int32(), nullable=False),
    pa.field("device_refusal", pa.string()),
    *(pa.field(f"{stage}_s", pa.float64(), nullable=False) for stage in STAGES),
)

_SAMPLE_FIELDS = (
    pa.field(SAMPLE_INDEX, pa.int32(), nullable=False),
    pa.field(IMAGE_ID, pa.string()),
    pa.field(MEMBER, pa.string()),
    pa.field(STAGE, pa.string()),
    pa.field(REASON, pa.string()),
)


def kept_fields(keep: tuple[tuple[str, str], ...], prefix: str = "") -> list[pa.Field]:
    """Fields of the kept columns: `keep` is (column, type name) pairs."""
    return [pa.field(prefix + column, KEEP_TYPES[kind]) for column, kind in keep]


def sample_type(payload: pa.Field, keep: tuple[tuple[str, str], ...]) -> pa.StructType:
    """One sample between two stages: who it is, what became of it, its kept fields and `payload`."""
    return pa.struct([*_SAMPLE_FIELDS, *kept_fields(keep, KEPT_PREFIX), payload])


def with_payload(samples: pa.StructArray, payload: pa.Field, **columns: pa.Array) -> pa.StructArray:
    """`samples` with its payload (the last field) replaced, and the named `columns` too."""
    old = samples.type
    fields = [*(old.field(i) for i in range(old.num_fields - 1)), payload]
    arrays = [columns[field.name] if field.name in columns else samples.field(field.name) for field in fields]
    return pa.StructArray.from_arrays(arrays, fields=fields)


def image_field() -> pa.Field:
    """Encoded image bytes, null where the sample already has a reason."""
    return pa.field(IMAGE, pa.large_binary())


def pixels_field(height: int, width: int) -> pa.Field:
    """uint8 RGB of shape [H, W, 3] as one flat list, null where the sample has a reason."""
    return pa.field(PIXELS, pa.list_(pa.field("element", pa.uint8(), nullable=False), height * width * 3))


def encoded_field() -> pa.Field:
    """What an actor that decodes on its device gets, null where the sample has a reason.

    A plain JPEG without its metadata in `data`, with its height and width as stored and the `orientation` (1 to 8)
    that it has to be turned by; or uint8 RGB [height, width, 3], decoded, turned and cropped already, where
    `orientation` is 0.
    """
    return pa.field(
        ENCODED,
        pa.struct(
            [
                pa.field("data", pa.large_binary(), nullable=False),
                pa.field("height", pa.int32(), nullable=False),
                pa.field("width", pa.int32(), nullable=False),
                pa.field("orientation", pa.int8(), nullable=False),
            ]
        ),
    )


def embedding_field(shape: tuple[int, ...], dtype: str) -> pa.Field:
    """What is stored: fixed_size_list<dtype>[C], or a fixed shape tensor [C, H, W]."""
    value = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    if len(shape) == 1:
        return pa.field(EMBEDDING, pa.list_(pa.field("element", value, nullable=False), shape[0]))
    return pa.field(EMBEDDING, pa.fixed_shape_tensor(value, shape))


def embeddings_schema(shape: tuple[int, ...], dtype: str, keep: tuple[tuple[str, str], ...]) -> pa.Schema:
    """Schema of a part under `embeddings/`."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.string(), nullable=False),
            pa.field(SHARD, pa.string(), nullable=False),
            pa.field(SAMPLE_INDEX, pa.int32(), nullable=False),
            embedding_field(shape, dtype).with_nullable(False),
            *kept_fields(keep),
        ]
    )


ERRORS_SCHEMA = pa.schema(
    [
        pa.field(IMAGE_ID, pa.string()),
        pa.field(SHARD, pa.string(), nullable=False),
        pa.field(SAMPLE_INDEX, pa.int32()),
        pa.field(MEMBER, pa.string()),
        pa.field(STAGE, pa.string(), nullable=False),
        pa.field(REASON, pa.string(), nullable=False),
    ]
)

RECEIPT_SCHEMA = pa.schema(
    [
        *PART_FIELDS,
        pa.field("num_embedded", pa.int32(), nullable=False),
        pa.field("reasons", pa.list_(pa.string()), nullable=False),
        pa.field("error_ids", pa.list_(pa.string()), nullable=False),  # whose reasons these are; null for a shard's
        pa.field("written_bytes", pa.int64(), nullable=False),
        pa.field("store_fault", pa.string()),  # why the part is not stored, where the store refuses its name
    ]
)


def part_row(values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
    """A table of one row, the part `values` with its nested `samples`."""
    nested = pa.LargeListArray.from_arrays(pa.array([0, len(samples)], pa.int64()), samples)
    columns = [pa.array([values[field.name]], field.type) for field in PART_FIELDS]
    schema = pa.schema([*PART_FIELDS, pa.field(SAMPLES, nested.type, nullable=False)])
    return pa.Table.from_arrays([*columns, nested], schema=schema)


def part_rows(table: pa.Table) -> list[tuple[dict[str, Any], pa.StructArray]]:
    """The parts of a block, each as its values and its samples; no copy of the samples."""
    values = table.select([field.name for field in PART_FIELDS]).to_pylist()
    samples = [scalar.values for chunk in table.column(SAMPLES).chunks for scalar in chunk]
    return list(zip(values, samples, strict=True))
