"""The tables between the stages."""

from __future__ import annotations

import pyarrow as pa
import pytest

from shard_embedder.pipeline.core.schema import (
    ENCODED,
    ERRORS_SCHEMA,
    IMAGE,
    KEEP_TYPES,
    RESERVED_COLUMNS,
    embedding_field,
    embeddings_schema,
    encoded_field,
    image_field,
    kept_fields,
    part_row,
    part_rows,
    pixels_field,
    sample_type,
    with_payload,
)
from tests.part_values import part_values


def values(part: int) -> dict[str, object]:
    return part_values(part=part)


def samples(*ids: str) -> pa.StructArray:
    kind = sample_type(image_field(), (("cls", "int64"),))
    rows = [
        {"sample_index": i, "image_id": name, "keep:cls": i * 10, "image": b"x" * i} for i, name in enumerate(ids)
    ]
    return pa.array(rows, kind)


def test_parts_come_out_of_a_block_as_they_went_in_however_it_was_cut() -> None:
    groups = [("a", "b", "c"), (), ("d",), ("e", "f")]
    block = pa.concat_tables([part_row(values(i), samples(*group)) for i, group in enumerate(groups)])
    for table in (block, block.combine_chunks(), pa.concat_tables([block.slice(2), block.slice(0, 2)])):
        found = {row["part"]: nested.field("image_id").to_pylist() for row, nested in part_rows(table)}
        assert found == {i: list(group) for i, group in enumerate(groups)}
    (only,) = part_rows(block.combine_chunks().slice(3, 1))
    assert only[1].field("keep:cls").to_pylist() == [0, 10]
    assert only[1].field(IMAGE).to_pylist() == [b"", b"x"]


def test_a_payload_is_replaced_and_the_rest_kept() -> None:
    before = samples("a", "b", "c").slice(1)
    pixels = pa.FixedSizeListArray.from_arrays(pa.array(range(24), pa.uint8()), type=pixels_field(2, 2).type)
    after = with_payload(before, pixels_field(2, 2), pixels=pixels, reason=pa.array([None, "broken: x"]))
    assert after.field("image_id").to_pylist() == ["b", "c"]
    assert after.field("reason").to_pylist() == [None, "broken: x"]
    assert after.field("keep:cls").to_pylist() == [10, 20]
    assert after.field("pixels").to_pylist() == [list(range(12)), list(range(12, 24))]
    assert IMAGE not in [after.type.field(i).name for i in range(after.type.num_fields)]


@pytest.mark.parametrize(("dtype", "value"), [("float32", pa.float32()), ("float16", pa.float16())])
def test_an_embedding_is_a_fixed_size_list_of_values_that_are_never_null(dtype: str, value: pa.DataType) -> None:
    kind = embedding_field((5,), dtype).type
    assert kind.list_size == 5
    assert kind.value_type == value
    assert not kind.value_field.nullable


def test_a_feature_map_is_a_tensor_of_its_shape() -> None:
    kind = embedding_field((3, 2, 4), "float32").type
    assert isinstance(kind, pa.FixedShapeTensorType)
    assert list(kind.shape) == [3, 2, 4]


def test_a_part_has_the_documented_columns() -> None:
    keep = (("caption", "string"), ("cls", "int64"))
    schema = embeddings_schema((4,), "float32", keep)
    assert schema.names == ["image_id", "shard", "sample_index", "embedding", "caption", "cls"]
    assert [field.nullable for field in schema] == [False, False, False, False, True, True]
    assert ERRORS_SCHEMA.names == ["image_id", "shard", "sample_index", "member", "stage", "reason"]
    assert set(ERRORS_SCHEMA.names) | {"embedding"} == RESERVED_COLUMNS


def test_every_kept_type_has_a_field() -> None:
    fields = kept_fields(tuple((kind, kind) for kind in KEEP_TYPES), "keep:")
    assert [field.name for field in fields] == [f"keep:{kind}" for kind in KEEP_TYPES]
    assert all(field.nullable for field in fields)


def test_what_a_device_is_to_decode_is_null_where_a_sample_has_a_reason() -> None:
    payload = encoded_field()
    value = {"data": b"jpeg", "height": 80, "width": 96, "orientation": 6}
    after = with_payload(samples("a", "b"), payload, encoded=pa.array([value, None], payload.type))
    assert after.type.field(after.type.num_fields - 1) == payload
    assert after.field(ENCODED).to_pylist() == [value, None]
    ((_, nested),) = part_rows(part_row(values(0), after))
    assert nested.field(ENCODED)[0].as_py() == value
