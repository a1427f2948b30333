"""Parts: their names, what is in their Parquet, and that the same samples give the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_embedder.pipeline.core import storage
from shard_embedder.pipeline.core.config import parse
from shard_embedder.pipeline.core.errors import OutputError
from shard_embedder.pipeline.core.schema import UNKNOWN_INDEX, part_row, sample_type
from shard_embedder.pipeline.core.storage import read_bytes
from shard_embedder.pipeline.output import parts
from shard_embedder.pipeline.output.names import EMBEDDINGS, ERRORS, PartName, version_tag
from shard_embedder.pipeline.output.parts import PartWriter, content_sha256, read_facts, vectors
from tests.conftest import ROOT
from tests.faults.odd_store import OddStore, Quirks
from tests.output.test_fingerprint import made
from tests.part_values import part_values

FINGERPRINT = made(versions="2")
TAG = version_tag(1000, "etag")
NAME = f"train/00001.{TAG}-00000-last.parquet"


def embedded(
    ids: list[str], failed: dict[int, str] | None = None, shape: tuple[int, ...] = (4,), dtype: str = "float32",
    keep: dict[str, tuple[str, list[Any]]] | None = None, **changed: Any,
) -> pa.Table:  # fmt: skip
    """One part as the embed stage gives it: sample i is embedded as the numbers from 100 * i."""
    failed, keep = failed or {}, keep or {}
    size = int(np.prod(shape))
    numbers = np.concatenate([np.arange(size) + 100 * i for i in range(len(ids))] or [[]]).astype(dtype)
    kind = pa.list_(pa.field("element", pa.from_numpy_dtype(dtype), nullable=False), size)
    mask = pa.array([i in failed for i in range(len(ids))], pa.bool_()) if ids else None
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(numbers), type=kind, mask=mask)
    struct = sample_type(pa.field("embedding", kind), tuple((name, kind) for name, (kind, _) in keep.items()))
    reasons = [failed.get(i) for i in range(len(ids))]
    columns = [
        range(len(ids)), ids, [f"{name}.jpg" for name in ids], ["decode" if reason else None for reason in reasons],
        reasons, *(column for _, column in keep.values()),
    ]  # fmt: skip
    fields = [struct.field(i) for i in range(struct.num_fields)]
    arrays = [pa.array(list(column), field.type) for column, field in zip(columns, fields, strict=False)]
    samples = pa.StructArray.from_arrays([*arrays, embeddings], fields=fields)
    values = part_values()
    values |= {"name": "train/00001", "url": "s3://bkt/train/00001.tar", "num_bytes": 1000, "version": "etag"}
    values |= {"num_samples": len(ids), "end": "last", "fault": None, **changed}
    return part_row(values, samples)


def writer(output: Path | str, shape: tuple[int, ...] = (4,), **settings: Any) -> PartWriter:
    config = parse({"input": ["in"], "output": str(output), **settings})
    return PartWriter(config, FINGERPRINT, shape)


@pytest.mark.parametrize(
    "shard",
    [
        "00001",
        "train/00001",
        "a.b.tar",
        "ünï/코드",
        "a-00001-last",
        "a.0123456789ab-00001",
        "-",
        "a b/c#d?e%f",
        "a\nb",
    ],
)
@pytest.mark.parametrize("part", [0, 7, 99999, 123456])
@pytest.mark.parametrize("end", ["", "last", "broken"])
def test_a_name_is_read_as_it_was_written(shard: str, part: int, end: str) -> None:
    name = PartName(shard, "0123456789ab", part, end)
    assert PartName.parse(str(name)) == name


@pytest.mark.parametrize(
    "path",
    [
        "", "a.parquet", "a-00000.parquet", "a.0123456789ab-00000-lost.parquet", "a.0123456789ab-0000.parquet",
        "a.0123456789AB-00000.parquet", ".0123456789ab-00000.parquet", "a.0123456789ab-00000.parquet.tmp",
    ],
)  # fmt: skip
def test_other_files_have_no_part_name(path: str) -> None:
    assert PartName.parse(path) is None


def test_a_version_is_its_size_and_its_tag() -> None:
    assert len({version_tag(1, "a"), version_tag(2, "a"), version_tag(1, "b"), version_tag(11, "")}) == 4
    assert version_tag(1000, "etag") == hashlib.sha256(b"1000:etag").hexdigest()[:12]


def test_a_part_holds_the_rows_in_order_and_says_what_made_them(tmp_path: Path) -> None:
    counts = {"first_index": 20, "ignored_members": 2, "unused_images": 1, "unused_example": "d.png, beside d.jpg"}
    counts |= {"device_refused": 2, "device_refusal": "RuntimeError: nvjpegDecode failed: 6"}
    (receipt,) = writer(tmp_path)(embedded(["a", "b", "c"], **counts)).to_pylist()
    table = pq.read_table(tmp_path / "embeddings" / NAME)
    assert table.column_names == ["image_id", "shard", "sample_index", "embedding"]
    assert table.column("image_id").to_pylist() == ["a", "b", "c"]
    assert table.column("shard").to_pylist() == ["train/00001"] * 3
    assert vectors(table).tolist() == [[0, 1, 2, 3], [100, 101, 102, 103], [200, 201, 202, 203]]
    facts = read_facts(str(tmp_path), f"embeddings/{NAME}")
    assert facts.num_rows == 3
    assert facts.metadata.pop("content_sha256") == content_sha256([table])
    assert json.loads(facts.metadata.pop("settings")) == FINGERPRINT.settings.to_json()
    assert json.loads(facts.metadata.pop("batch_size")) == {}
    assert json.loads(facts.metadata.pop("versions")) == FINGERPRINT.versions
    assert facts.metadata == {
        "fingerprint": FINGERPRINT.digest,
        "shard_url": "s3://bkt/train/00001.tar",
        "shard_bytes": "1000",
        "shard_version": "etag",
        "part": "0",
        "end": "last",
        "first_index": "20",
        "num_samples": "3",
        "num_embedded": "3",
        "num_errors": "0",
        "ignored_members": "2",
        "unused_images": "1",
        "unused_example": "d.png, beside d.jpg",
        "device_refused": "2",
    }
    assert (receipt["device_refused"], receipt["device_refusal"]) == (2, "RuntimeError: nvjpegDecode failed: 6")
    assert (receipt["num_embedded"], receipt["reasons"]) == (3, [])
    assert receipt["written_bytes"] == (tmp_path / "embeddings" / NAME).stat().st_size
    assert not (tmp_path / "errors").exists()


def test_the_parquet_layout_is_the_documented_one(tmp_path: Path) -> None:
    writer(tmp_path)(embedded([f"{i:05d}" for i in range(2500)]))
    file = pq.ParquetFile(tmp_path / "embeddings" / NAME)
    kind = file.schema_arrow.field("embedding").type
    assert pa.types.is_fixed_size_list(kind)
    assert kind.list_size == 4
    assert not kind.value_field.nullable
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [1024, 1024, 452]
    for group in groups:
        columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
        assert {column.compression for column in columns.values()} == {"ZSTD"}
        assert [name for name, column in columns.items() if column.is_stats_set] == ["image_id"]
        # Encodings that every reader knows.
        assert set(columns["embedding.list.element"].encodings) == {"PLAIN", "RLE"}


def test_values_of_half_precision_are_stored_with_a_dictionary(tmp_path: Path) -> None:
    writer(tmp_path)(embedded(["a", "b", "c"]))
    file = pq.ParquetFile(tmp_path / "embeddings" / NAME)
    assert set(file.metadata.row_group(0).column(3).encodings) == {"PLAIN", "RLE", "RLE_DICTIONARY"}
    assert vectors(file.read()).ravel().tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203]


def test_float16_is_stored_as_plain_half_floats(tmp_path: Path) -> None:
    writer(tmp_path, dtype="float16")(embedded(["a", "b"], dtype="float16"))
    file = pq.ParquetFile(tmp_path / "embeddings" / NAME)
    assert file.schema_arrow.field("embedding").type.value_type == pa.float16()
    assert set(file.metadata.row_group(0).column(3).encodings) == {"PLAIN", "RLE"}
    assert vectors(file.read()).dtype == np.float16
    assert vectors(file.read())[1].tolist() == [100, 101, 102, 103]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_feature_map_is_a_tensor_of_its_shape(tmp_path: Path, dtype: str) -> None:
    make = writer(tmp_path, (2, 3, 2), features="map", dtype=dtype)
    make(embedded(["a", "b", "c"], {1: "broken: x"}, (2, 3, 2), dtype))
    table = pq.read_table(tmp_path / "embeddings" / NAME)
    assert isinstance(table.schema.field("embedding").type, pa.FixedShapeTensorType)
    assert vectors(table).shape == (2, 2, 3, 2)
    assert vectors(table)[1].ravel().tolist() == list(range(200, 212))


def test_kept_columns_follow_with_their_types_and_nulls(tmp_path: Path) -> None:
    keep = {
        "cls": ("int64", [1, None, 3]),
        "caption": ("string", ["x", "y", None]),
        "ok": ("bool", [True, None, False]),
    }
    make = writer(tmp_path, keep=["cls", "json:caption", "json:ok=bool"])
    make(embedded(["a", "b", "c"], {1: "broken: x"}, keep=keep))
    table = pq.read_table(tmp_path / "embeddings" / NAME)
    assert table.select(["cls", "caption", "ok"]).to_pylist() == [
        {"cls": 1, "caption": "x", "ok": True},
        {"cls": 3, "caption": None, "ok": False},
    ]
    assert table.schema.field("cls").type == pa.int64()


def test_every_sample_is_a_row_of_one_of_the_two(tmp_path: Path) -> None:
    (receipt,) = writer(tmp_path)(embedded(["a", "b", "c"], {0: "broken: x", 2: "bomb: y"})).to_pylist()
    assert pq.read_table(tmp_path / "embeddings" / NAME).column("image_id").to_pylist() == ["b"]
    assert vectors(pq.read_table(tmp_path / "embeddings" / NAME)).tolist() == [[100, 101, 102, 103]]
    assert pq.read_table(tmp_path / "errors" / NAME).to_pylist() == [
        {"image_id": name, "shard": "train/00001", "sample_index": index, "member": f"{name}.jpg", "stage": "decode",
         "reason": reason}
        for name, index, reason in (("a", 0, "broken: x"), ("c", 2, "bomb: y"))
    ]  # fmt: skip
    assert receipt["reasons"] == ["broken: x", "bomb: y"]
    assert len(receipt["error_ids"]) == 2
    assert None not in receipt["error_ids"]


def test_a_broken_shard_has_its_fault_as_a_row_without_an_id(tmp_path: Path) -> None:
    (receipt,) = writer(tmp_path)(embedded(["a"], end="broken", fault="cut: ends inside")).to_pylist()
    name = NAME.replace("last", "broken")
    assert pq.read_table(tmp_path / "errors" / name).to_pylist() == [
        {"image_id": None, "shard": "train/00001", "sample_index": None, "member": None, "stage": "read",
         "reason": "shard fault: cut: ends inside"}
    ]  # fmt: skip
    facts = read_facts(str(tmp_path), f"embeddings/{name}")
    assert (facts.num_rows, facts.number("num_samples"), facts.number("num_errors")) == (1, 1, 1)
    assert receipt["reasons"] == ["shard fault: cut: ends inside"]
    assert receipt["error_ids"] == [None]


@pytest.mark.parametrize("shape", [(4,), (2, 1, 2)])
def test_a_part_without_rows_is_a_part(tmp_path: Path, shape: tuple[int, ...]) -> None:
    make = writer(tmp_path, shape, features="pooled" if len(shape) == 1 else "map")
    make(embedded([], shape=shape))
    make(embedded(["a"], {0: "broken: x"}, shape, part=1))
    for name in (NAME, NAME.replace("00000-", "00001-")):
        table = pq.read_table(tmp_path / "embeddings" / name)
        assert vectors(table).shape == (0, *shape)
        assert read_facts(str(tmp_path), f"embeddings/{name}").num_rows == 0


def test_the_errors_are_stored_before_the_embeddings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    write = parts.write_bytes
    monkeypatch.setattr(
        parts, "write_bytes", lambda root, name, *rest: order.append(name) or write(root, name, *rest)
    )
    writer(tmp_path)(embedded(["a", "b"], {0: "broken: x"}))
    assert order == [f"errors/{NAME}", f"embeddings/{NAME}"]


def test_the_parts_of_a_block_are_written_each_to_its_own_file(tmp_path: Path) -> None:
    block = pa.concat_tables(
        [embedded(["a", "b"], end=""), embedded(["c"], part=1), embedded(["d"], name="val/00001")]
    )
    receipts = writer(tmp_path)(block.combine_chunks()).to_pylist()
    assert [receipt["num_embedded"] for receipt in receipts] == [2, 1, 1]
    stored = sorted(path.relative_to(tmp_path / "embeddings") for path in tmp_path.rglob("*.parquet"))
    assert [str(path) for path in stored] == [
        f"train/00001.{TAG}-00000.parquet",
        f"train/00001.{TAG}-00001-last.parquet",
        f"val/00001.{TAG}-00000-last.parquet",
    ]
    table = pq.read_table(tmp_path / "embeddings" / stored[1])
    assert table.column("image_id").to_pylist() == ["c"]
    assert vectors(table).tolist() == [[0, 1, 2, 3]]


_AGAIN = """
import sys
from pathlib import Path
from tests.output.test_parts import embedded, writer
ids = [f"{i:04d}" for i in range(1500)]
keep = {"cls": ("int64", list(range(1500)))}
writer(Path(sys.argv[1]), keep=["cls"])(embedded(ids, {3: "broken: x"}, keep=keep))
"""


@pytest.mark.slow
def test_written_again_in_another_process_the_bytes_are_the_same(tmp_path: Path, s3_url: str) -> None:
    for number, place in enumerate([tmp_path / "a", tmp_path / "b"]):
        path = str(ROOT)
        subprocess.run(
            [sys.executable, "-c", _AGAIN, str(place)],
            check=True,
            env={"PYTHONPATH": path, "PYTHONHASHSEED": str(number)},
        )
    keep = {"cls": ("int64", list(range(1500)))}
    make = writer(s3_url, keep=["cls"])
    for _ in range(2):
        make(embedded([f"{i:04d}" for i in range(1500)], {3: "broken: x"}, keep=keep))
        for folder in ("embeddings", "errors"):
            stored = {read_bytes(f"{place}/{folder}/{NAME}") for place in (tmp_path / "a", tmp_path / "b", s3_url)}
            assert len(stored) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not whole Parquet"),
        (b"PAR1", "is not whole Parquet"),
        (b"PAR1PAR1", "is not whole Parquet"),
        (b"PAR1" + b"x" * 100 + b"\xff\xff\xff\x7fPAR1", "is not whole Parquet"),
        (b"PAR1" + b"x" * 100 + b"\x20\0\0\0PAR1", "is not whole Parquet"),
        (b"<html>no such object</html>", "is not whole Parquet: its last bytes are b'tml>'"),
        (None, "is missing"),
    ],
)
def test_what_is_no_parquet_is_told(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(OutputError, match=f"x.parquet {message}"):
        read_facts(str(tmp_path), "x.parquet")


@pytest.mark.parametrize("kept", [0.2, 0.7, 0.95, -1])
def test_a_part_that_was_cut_is_told(tmp_path: Path, kept: float) -> None:
    writer(tmp_path)(embedded([f"{i}" for i in range(300)]))
    path = tmp_path / "embeddings" / NAME
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if kept > 0 else -1])
    with pytest.raises(OutputError, match="is not whole Parquet"):
        read_facts(str(tmp_path), f"embeddings/{NAME}")


def test_parquet_of_others_has_rows_and_none_of_our_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 2]}), tmp_path / "x.parquet")
    facts = read_facts(str(tmp_path), "x.parquet")
    assert facts.num_rows == 2
    with pytest.raises(OutputError, match="its metadata has no number 'num_samples'"):
        facts.number("num_samples")


def test_a_footer_is_read_from_the_end_of_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    tail = parts.read_tail
    monkeypatch.setattr(
        parts, "read_tail", lambda url, length, *more: reads.append(length) or tail(url, length, *more)
    )
    writer(tmp_path)(embedded([f"{i}" for i in range(30_000)]))
    path = tmp_path / "embeddings" / NAME
    assert read_facts(str(tmp_path), f"embeddings/{NAME}").num_rows == 30_000
    assert sum(reads) < path.stat().st_size / 4
    reads.clear()
    # A footer longer than the first look is fetched in a second one.
    monkeypatch.setattr(parts, "_FOOTER_BYTES", 100)
    assert read_facts(str(tmp_path), f"embeddings/{NAME}", path.stat().st_size).num_rows == 30_000
    assert len(reads) == 2


def test_a_content_hash_sees_every_edit_and_no_cut_into_pieces(tmp_path: Path) -> None:
    writer(tmp_path)(embedded(["a", "b", "c"]))
    table = pq.read_table(tmp_path / "embeddings" / NAME)
    whole = content_sha256([table])
    assert content_sha256([table.slice(0, 1), table.slice(1)]) == whole
    numbers = vectors(table).copy()
    numbers[1, 2] = np.nextafter(numbers[1, 2], np.float32(1e9))
    kind = table.schema.field("embedding").type
    edited = table.set_column(
        3, table.schema.field("embedding"), pa.FixedSizeListArray.from_arrays(numbers.ravel(), type=kind)
    )
    assert content_sha256([edited]) != whole
    assert content_sha256([table.take([1, 0, 2])]) != whole


def test_a_part_whose_name_the_disk_refuses_is_its_shard_s_error_and_the_others_are_stored(tmp_path: Path) -> None:
    long = "/".join(["d" * 200] * 21)
    in_the_way = PartName("blocked", TAG, 0, "last")
    (tmp_path / EMBEDDINGS / str(in_the_way)).mkdir(parents=True)
    (tmp_path / EMBEDDINGS / "file").write_bytes(b"")
    parts = [
        embedded(["a"], name="good-1"),
        embedded(["b", "c"], failed={0: "bad image"}, name="blocked"),
        embedded(["d"], name=long),
        embedded(["e"], name="n" * 240),
        embedded(["f"], name="file/below"),
        embedded(["g"], name="good-2"),
    ]
    receipts = writer(tmp_path)(pa.concat_tables(parts)).to_pylist()
    assert [receipt["store_fault"] is None for receipt in receipts] == [True, False, False, False, False, True]
    for receipt, told in zip(receipts[1:5], ["Is a directory", "too long", "too long", "File exists"], strict=True):
        assert told in receipt["store_fault"]
        assert receipt["fault"] == f"part 0 cannot be stored: {receipt['store_fault']}"
        assert (receipt["end"], receipt["fault_transient"]) == ("broken", False)
        assert (receipt["num_samples"], receipt["num_embedded"], receipt["reasons"]) == (0, 0, [])
    stored = sorted(path.name for path in tmp_path.rglob("*.parquet") if path.is_file())
    assert stored == [f"good-{number}.{TAG}-00000-last.parquet" for number in (1, 2)], "errors without a part"


@pytest.mark.parametrize("answer", [(400, "KeyTooLongError"), (400, "InvalidArgument")])
def test_a_part_whose_key_the_store_refuses_is_its_shard_s_error(
    answer: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with OddStore() as store:
        store.quirks = Quirks(put_fault=lambda key: answer if "refused" in key else None)
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        storage._filesystem.cache_clear()
        parts = [embedded(["a"], name="refused"), embedded(["b"], name="k" * 1100), embedded(["c"], name="good")]
        receipts = writer("s3://bkt/out")(pa.concat_tables(parts)).to_pylist()
        assert list(store.stored.objects) == [f"out/{EMBEDDINGS}/good.{TAG}-00000-last.parquet"]
    storage._filesystem.cache_clear()
    assert [receipt["store_fault"] is None for receipt in receipts] == [False, False, True]


def test_a_full_disk_is_no_fault_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        writer(tmp_path)(embedded(["a"]))


def test_a_damaged_part_before_the_end_of_a_shard_is_that_shard_s_error(tmp_path: Path) -> None:
    make = writer(tmp_path)
    end = embedded([], name="hurt", part=1, first_index=UNKNOWN_INDEX, end="broken", fault="cut")
    make(pa.concat_tables([embedded(["a"], name="hurt", end=""), end]))
    path = tmp_path / EMBEDDINGS / str(PartName("hurt", TAG, 0, ""))
    path.write_bytes(path.read_bytes()[:-1])
    of_before = tmp_path / ERRORS / str(PartName("hurt", TAG, 1, "broken"))
    before = of_before.read_bytes()
    hurt, good = make(pa.concat_tables([end, embedded(["b"], name="good")])).to_pylist()
    assert f"{path.name} is not whole Parquet" in hurt["store_fault"]
    assert good["store_fault"] is None
    assert of_before.read_bytes() == before, "the part of an earlier run is there, and so is its fault"
