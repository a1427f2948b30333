"""Fields and ids of a sample's own members: what is kept, by which type, and what is null."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shard_embedder.pipeline.core.schema import IMAGE, REASON
from shard_embedder.pipeline.shards import samples as samples_module
from shard_embedder.pipeline.shards.fields import kept_value
from tests.conftest import write_tar
from tests.shards.reading import PHOTO, parts, rows

JSON_DEPTHS = (100_000, 5_000, *range(100, 1100, 50))


# Fields


def field(data: bytes | None, spec: str, tmp_path: Path, member: str = "json") -> tuple[Any, int]:
    """What `--keep SPEC` makes of a member's bytes, and how many values were lost."""
    members = [("a.jpg", PHOTO), *([] if data is None else [(f"a.{member}", data)])]
    ((values, samples),) = parts(write_tar(tmp_path / "s.tar", members), keep=[spec])
    (row,) = samples.to_pylist()
    assert row[REASON] is None
    (column,) = [name for name in row if name.startswith("keep:")]
    return row[column], values["kept_nulls"]


DOCUMENT = json.dumps({
    "text": "hé", "int": 7, "float": 0.5, "yes": True, "null": None, "list": [1, "é"], "a": {"b": {"c": "deep"}},
    "": "unnamed", "number": "12",
}).encode()  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("json:text", ("hé", 0)),
        ("json:text=int64", (None, 1)),
        ("json:int=int64", (7, 0)),
        ("json:int=float64", (7.0, 0)),
        ("json:int", (None, 1)),
        ("json:int=bool", (None, 1)),
        ("json:float=float64", (0.5, 0)),
        ("json:float=int64", (None, 1)),
        ("json:yes=bool", (True, 0)),
        ("json:yes=int64", (None, 1)),
        ("json:yes=float64", (None, 1)),
        ("json:null", (None, 0)),
        ("json:absent", (None, 0)),
        ("json:text.absent", (None, 0)),
        ("json:a.b.c", ("deep", 0)),
        ("json:a.b", (None, 1)),
        ("json:a.b=json", ('{"c": "deep"}', 0)),
        ("json:list=json", ('[1, "é"]', 0)),
        ("json:number=int64", (None, 1)),
    ],
)
def test_a_json_field_has_its_declared_type_or_is_null_and_counted(
    spec: str, expected: tuple[Any, int], tmp_path: Path
) -> None:
    assert field(DOCUMENT, spec, tmp_path) == expected


@pytest.mark.parametrize(
    ("member", "spec", "data", "expected"),
    [
        ("cls", "cls", b"3", (3, 0)),
        ("cls", "cls", b" -12\n", (-12, 0)),
        ("cls", "cls", b"cat", (None, 1)),
        ("cls", "cls", b"1_0", (None, 1)),
        ("cls", "cls", "\uff11\uff12".encode(), (None, 1)),
        ("cls", "cls", b"", (None, 1)),
        ("cls", "cls", b"99999999999999999999", (None, 1)),
        ("cls", "cls", b"9" * 100_000, (None, 1)),
        ("cls", "cls=string", b"cat\n", ("cat", 0)),
        ("cls", "cls=float64", b"1e3", (1000.0, 0)),
        ("cls", "cls=bool", b"true", (True, 0)),
        ("CLS", "cls", b"3", (3, 0)),
        ("txt", "txt", "a café\r\n".encode(), ("a café", 0)),
        ("txt", "txt", "a café".encode("latin-1"), (None, 1)),
        ("txt", "txt", b"", ("", 0)),
        ("txt", "txt", "\ufeffa \ufeffcaf\u00e9".encode(), ("a \ufeffcaf\u00e9", 0)),
        ("cls", "cls", b"\xef\xbb\xbf3", (3, 0)),
        ("txt", "txt", b"a\0b", ("a\0b", 0)),
        ("txt", "txt", None, (None, 0)),
        ("meta.json", "meta.json:x=int64", b'{"x": 1}', (1, 0)),
    ],
)
def test_members_of_text_and_numbers_are_kept_by_their_type(
    member: str, spec: str, data: bytes | None, expected: tuple[Any, int], tmp_path: Path
) -> None:
    assert field(data, spec, tmp_path, member) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe\xfd",
        b'{"x": 1}trailing',
        b'{"x": ' + b"9" * 5000 + b"}",
        b'{"x": "' + b"y" * (16 * 2**20) + b'"}',
        pickle.dumps({"x": 1}),
        *(b'{"x": ' + b"[" * depth for depth in JSON_DEPTHS[:2]),
        b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=range(11),
)
def test_json_that_cannot_be_read_costs_the_field_and_not_the_image(data: bytes, tmp_path: Path) -> None:
    assert field(data, "json:x=json", tmp_path) == (None, 1)


@pytest.mark.parametrize("depth", JSON_DEPTHS)
def test_json_of_any_depth_is_kept_or_null(depth: int, tmp_path: Path) -> None:
    text = "[" * depth + "]" * depth
    value, lost = field(b'{"x": ' + text.encode() + b"}", "json:x=json", tmp_path)
    assert (value, lost) in ((text, 0), (None, 1))


@pytest.mark.parametrize(
    ("data", "spec", "expected"),
    [
        (b'{"x": NaN}', "json:x=json", (None, 1)),
        (b'{"x": [1, Infinity]}', "json:x=json", (None, 1)),
        (b'{"x": -Infinity}', "json:x=float64", (float("-inf"), 0)),
        (b'{"x": 1e999}', "json:x=float64", (float("inf"), 0)),
        (b'{"x": 9223372036854775807}', "json:x=int64", (2**63 - 1, 0)),
        (b'{"x": 9223372036854775808}', "json:x=int64", (None, 1)),
        (b'{"x": ' + b"9" * 400 + b"}", "json:x=float64", (None, 1)),
        (b'{"x": ' + b"9" * 400 + b"}", "json:x=json", ("9" * 400, 0)),
        (rb'{"x": "\ud800"}', "json:x", (None, 1)),
        (rb'{"x": "\ud83d\ude00"}', "json:x", ("\U0001f600", 0)),
        (rb'{"x": ["\ud800"]}', "json:x=json", (None, 1)),
        (b'{"x": "\xed\xa0\x80"}', "json:x", (None, 1)),
        (b'\xef\xbb\xbf{"x": 1}', "json:x=int64", (1, 0)),
        ('{"x": "é"}'.encode("utf-16"), "json:x", ("é", 0)),
        (b'{"x": 1, "x": 2}', "json:x=int64", (2, 0)),
        (b'["x"]', "json:x", (None, 0)),
        (b'"x"', "json", ('"x"', 0)),
        (b"null", "json", (None, 0)),
    ],
)
def test_odd_values_of_json_are_kept_or_null_and_counted(
    data: bytes, spec: str, expected: tuple[Any, int], tmp_path: Path
) -> None:
    assert field(data, spec, tmp_path) == expected


def test_a_field_whose_member_is_above_the_limit_is_null_and_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"x" * 10), ("a.json", b'{"x": "' + b"y" * 100 + b'"}')])
    ((values, samples),) = parts(path, keep=["json:x"], max_image_bytes=50)
    assert (samples.field("keep:x").to_pylist(), values["kept_nulls"]) == ([None], 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300)
@given(json_values, st.sampled_from(["string", "int64", "float64", "bool", "json"]))
def test_any_value_becomes_one_that_arrow_takes_or_null(value: Any, kind: str) -> None:
    types = {
        "string": pa.string(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "json": pa.string(),
    }
    kept, lost = kept_value(value, kind)
    assert pa.array([kept], types[kind]).to_pylist() == pytest.approx([kept], nan_ok=True)
    assert lost == (kept is None and value is not None)
    if kind == "json" and kept is not None:
        assert json.loads(kept) == value


def test_a_part_ends_early_where_its_texts_would_take_too_much_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [
        (f"{i}.{kind}", data) for i in range(6) for kind, data in (("jpg", PHOTO), ("txt", "ü".encode() * 5000))
    ]
    path = write_tar(tmp_path / "s.tar", members)
    monkeypatch.setattr(samples_module, "MAX_PART_BYTES", 20_000)
    assert [values["num_samples"] for values, _ in parts(path)] == [6]
    assert [values["num_samples"] for values, _ in parts(path, keep=["txt"])] == [2, 2, 2]


# Ids of the user


def test_a_key_that_stands_in_for_a_missing_id_is_nobodys_id(tmp_path: Path) -> None:
    documents = [b"{}", b'{"id": 1}', b'{"id": "4"}', b"broken", b'{"id": 4}']
    members = [
        member
        for key, document in enumerate(documents, 1)
        for member in ((f"{key}.jpg", PHOTO), (f"{key}.json", document))
    ]
    shard = write_tar(tmp_path / "s.tar", members)
    found = [(row["image_id"], row[REASON] and row[REASON].partition(":")[0]) for row in rows(shard, id="json:id")]
    assert found == [("1", "no id"), ("1", None), ("4", None), ("4", "broken json"), ("4", "repeated id")]


def ids(data: bytes | None, tmp_path: Path) -> tuple[str, str | None]:
    members = [("a.jpg", PHOTO), *([] if data is None else [("a.json", data)])]
    (row,) = rows(write_tar(tmp_path / "s.tar", members), id="json:id")
    assert (row[IMAGE] is None) == (row[REASON] is not None)
    return row["image_id"], row[REASON] and row[REASON].partition(":")[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"id": "photo-1"}', ("photo-1", None)),
        (b'{"id": 17}', ("17", None)),
        (b'{"id": 123456789012345678901234567890}', ("123456789012345678901234567890", None)),
        (b'{"id": "../x; $(id)"}', ("../x; $(id)", None)),
        (b'{"id": ""}', ("a", "no id")),
        (b'{"id": null}', ("a", "no id")),
        (b'{"id": true}', ("a", "no id")),
        (b'{"id": 1.5}', ("a", "no id")),
        (b'{"id": [1]}', ("a", "no id")),
        (rb'{"id": "\ud800"}', ("a", "no id")),
        (b"{}", ("a", "no id")),
        (b"[", ("a", "broken json")),
        (b"[" * 100_000, ("a", "broken json")),
        (None, ("a", "no id")),
    ],
)
def test_an_id_is_the_users_or_the_sample_is_an_error(
    data: bytes | None, expected: tuple[str, str | None], tmp_path: Path
) -> None:
    assert ids(data, tmp_path) == expected


def test_an_id_that_is_too_large_to_read_is_an_error(tmp_path: Path) -> None:
    assert ids(b'{"id": "' + b"y" * (16 * 2**20) + b'"}', tmp_path) == ("a", "metadata too large")


class Canary:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_pickles_of_every_extension_are_never_loaded(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(Canary(canary))
    extensions = ["pyd", "pickle", "pkl", "pth", "pt", "npy", "npz", "ten", "tb", "json", "cls", "txt", "mp", "cbor"]
    members = [(f"a.{extension}", data) for extension in extensions]
    keep = [f"{extension}=json" for extension in extensions if extension != "json"]
    path = write_tar(tmp_path / "s.tar", [("a.jpg", PHOTO), *members, ("b.pkl.jpg", data)])
    found = rows(path, keep=[*keep, "json"], id="json:id")
    assert [row["image_id"] for row in found] == ["a", "b"]
    assert not canary.exists()
    pickle.load(io.BytesIO(data)).close()
    assert canary.exists()
