"""Settings: each rule with its message, and each way to write a value."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_embedder.pipeline.core.config import Config, Field, device_share, parse, parse_pair
from shard_embedder.pipeline.core.errors import SettingsError

GIVEN = {"input": ["s3://bkt/in"], "output": "s3://bkt/out"}


def test_what_is_not_given_has_its_default() -> None:
    config = parse({**GIVEN, "batch_size": None})
    assert config == Config(input=("s3://bkt/in",), output="s3://bkt/out")
    assert config.kept_columns == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.output = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("input", [], "input must name at least one shard, folder, glob or list, got ()"),
        ("input", [""], "input must name at least one shard, folder, glob or list, got ''"),
        ("input", ["a.tar", " "], "input must name at least one shard, folder, glob or list, got ' '"),
        ("input", [1], "input must be a list of texts, got [1]"),
        ("output", "", "output must be a folder or an s3:// prefix, got ''"),
        ("output", " ", "output must be a folder or an s3:// prefix, got ' '"),
        ("output", "s3://", "output must be a folder or an s3:// prefix, got 's3://'"),
        ("output", 5, "output must be text, got 5"),
        ("output", "https://host/out", "output must be a folder or an s3:// prefix, got 'https://host/out'"),
        ("features", "flat", "features must be one of pooled, map, got 'flat'"),
        ("dtype", "float64", "dtype must be one of float32, float16, got 'float64'"),
        ("device", "tpu", "device must be one of auto, cuda, cpu, got 'tpu'"),
        ("precision", "int8", "precision must be one of auto, fp32, bf16, fp16, got 'int8'"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("key", "dot", "key must be one of first-dot, last-dot, got 'dot'"),
        ("decode", "tpu", "decode must be one of cpu, scaled, gpu, gpu:SHARE (hundredths, 0.01 to 0.99), got 'tpu'"),
        *(
            (
                "decode",
                text,
                f"decode must be one of cpu, scaled, gpu, gpu:SHARE (hundredths, 0.01 to 0.99), got {text!r}",
            )
            for text in ("gpu:", "gpu:0", "gpu:0.0", "gpu:1", "gpu:1.5", "gpu:-0.5", "gpu:.5", "gpu:0.125", "gpu:nan")
        ),
        ("batch_size", "many", "batch_size must be a number, got 'many'"),
        ("batch_size", 1.5, "batch_size must be a whole number, got 1.5"),
        ("batch_size", float("inf"), "batch_size must be a whole number, got inf"),
        ("batch_size", True, "batch_size must be a number, got True"),
        ("part_rows", -1, "part_rows must be at least 1, got -1"),
        ("part_rows", 1_000_001, "part_rows must be at most 1000000, got 1000001"),
        ("limit", "0", "limit must be at least 1, got 0"),
        ("max_passes", 0, "max_passes must be at least 1, got 0"),
        ("max_pixels", 0, "max_pixels must be at least 1, got 0"),
        ("max_image_bytes", 0, "max_image_bytes must be at least 1, got 0"),
        ("price_per_hour", -1, "price_per_hour must be at least 0, got -1.0"),
        ("price_per_hour", "inf", "price_per_hour must be at least 0, got inf"),
        ("max_error_fraction", 1.1, "max_error_fraction must be between 0 and 1, got 1.1"),
        ("max_error_fraction", "nan", "max_error_fraction must be between 0 and 1, got nan"),
        ("actors", "0:2", "actors must be MIN:MAX with 1 <= MIN <= MAX, got '0:2'"),
        ("actors", "3:2", "actors must be MIN:MAX with 1 <= MIN <= MAX, got '3:2'"),
        ("actors", "1:2:3", "actors must be N or MIN:MAX, got '1:2:3'"),
        ("image_size", "big", "image_size must be N or HEIGHTxWIDTH, got 'big'"),
        ("image_size", "4", "image_size must have sides of 8 to 4096 pixels, got '4x4'"),
        ("image_size", "224x5000", "image_size must have sides of 8 to 4096 pixels, got '224x5000'"),
        ("normalize", "maybe", "normalize must be true or false, got 'maybe'"),
        ("id", "json:id=int64", "id must be a field without a type, got 'json:id=int64'"),
        ("image_member", ".jpg", "image_member must be an extension without its dot, such as jpg, got '.jpg'"),
        ("image_member", "", "image_member must be an extension without its dot, such as jpg, got ''"),
        ("keep", ["cls", "cls"], "keep must name each column once, got 'cls'"),
        ("keep", ["json:embedding"], "keep must not name a column of the output, got 'embedding'"),
        (
            "keep",
            ["json:Shard"],
            "keep must not name a column of the output, got 'Shard'; name it, as in Shard_2=json:S",
        ),
        ("keep", ["shard=cls=int64"], "keep must not name a column of the output, got 'shard'"),
        (
            "keep",
            ["json:Width", "json:width"],
            "keep must name each column once, got 'Width'; name it, as in Width_2=",
        ),
        ("keep", ["json:a.b", "json:a_b"], "keep must name each column once, got 'a_b'"),
        ("keep", ["X=json:a", "x=json:b"], "keep must name each column once, got 'X'"),
    ],
)
def test_a_broken_rule_names_field_rule_and_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=f"^{re.escape(message)}"):
        parse({**GIVEN, name: value})


def test_normalizing_a_feature_map_is_refused() -> None:
    with pytest.raises(SettingsError, match="normalize must be off for feature maps"):
        parse({**GIVEN, "normalize": True, "features": "map"})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("input", "a.tar b.tar", ("a.tar", "b.tar")),
        ("input", ["with space.tar"], ("with space.tar",)),
        ("batch_size", "64", 64),
        ("batch_size", 64.0, 64),
        ("actors", 4, (4, 4)),
        ("actors", "2:8", (2, 8)),
        ("image_size", 244, (244, 244)),
        ("image_size", "320x256", (320, 256)),
        ("image_size", "320X256", (320, 256)),
        ("normalize", "true", True),
        ("normalize", "0", False),
        ("normalize", False, False),
        ("max_error_fraction", "0.01", 0.01),
        ("max_error_fraction", 0, 0.0),
        ("id", "key", None),
        ("id", "json:id", Field("json", ("id",))),
        ("id", "cls", Field("cls", type="int64")),
        ("keep", "cls txt", (Field("cls", type="int64"), Field("txt"))),
        ("keep", ["json:a.b=float64"], (Field("json", ("a", "b"), "float64"),)),
    ],
)
def test_a_value_may_be_text_or_what_toml_gives(name: str, value: Any, expected: Any) -> None:
    assert getattr(parse({**GIVEN, name: value}), name) == expected


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"unknown setting 'batchsize'; .*actors, backbone, batch_size"):
        parse({**GIVEN, "batchsize": 1})


@pytest.mark.parametrize(
    ("values", "missing"), [({}, "input and output"), ({"input": "a"}, "output"), ({"output": "a"}, "input")]
)
def test_what_must_be_given_is_named(values: dict[str, Any], missing: str) -> None:
    with pytest.raises(SettingsError, match=f"^{missing} must be given: --NAME"):
        parse(values)


@pytest.mark.parametrize(
    ("spec", "field", "column"),
    [
        ("cls", Field("cls", (), "int64"), "cls"),
        ("txt", Field("txt", (), "string"), "txt"),
        ("json", Field("json", (), "json"), "json"),
        ("json:id", Field("json", ("id",), "string"), "id"),
        ("json:user.name=string", Field("json", ("user", "name"), "string"), "user_name"),
        ("author=json:user.name", Field("json", ("user", "name"), "string", "author"), "author"),
        ("author=json:user.name=json", Field("json", ("user", "name"), "json", "author"), "author"),
        ("caption=txt=string", Field("txt", (), "string", "caption"), "caption"),
        ("int64=cls=int64", Field("cls", (), "int64", "int64"), "int64"),
        ("json:1st-try", Field("json", ("1st-try",), "string"), "_1st_try"),
        ("meta.txt", Field("meta.txt", (), "string"), "meta_txt"),
        ("cls=string", Field("cls", (), "string"), "cls"),
        ("meta.json:a=bool", Field("meta.json", ("a",), "bool"), "a"),
    ],
)
def test_a_field_is_written_as_member_path_and_type(spec: str, field: Field, column: str) -> None:
    assert Field.parse(spec) == field
    assert Field.parse(field.spec) == field
    assert field.column == column


@pytest.mark.parametrize(
    "spec", ["a b=json:x", "1=json:x", "=json:x", "a.b=json:x=int64", "a-b=cls=int64", "=cls=int64"]
)
def test_a_column_is_named_by_an_identifier(spec: str) -> None:
    with pytest.raises(SettingsError, match="must be letters, digits and _, got"):
        Field.parse(spec)


@given(st.from_regex(r"[^:=\s.][^:=\s]{0,8}(:[^:=\s]{1,12})?", fullmatch=True))
def test_a_column_that_nobody_named_is_an_identifier(spec: str) -> None:
    assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", Field.parse(spec).column)


@pytest.mark.parametrize(
    "spec", ["", ":a", "json:", "json:a=", "a=b=c=d", "a=json:b=", "a b", "json:a:b", "=string", ".cls"]
)
def test_a_field_of_another_form_is_refused(spec: str) -> None:
    with pytest.raises(SettingsError, match=f"a field must look like EXT, .*, got {re.escape(repr(spec))}"):
        Field.parse(spec)


def test_an_unknown_type_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="must be one of string, int64, float64, bool, json, got 'int'"):
        Field.parse("cls=int")


def test_a_pair_is_one_or_two_integers() -> None:
    assert parse_pair("x", "3", ":", "N or A:B") == (3, 3)
    assert parse_pair("x", "3:4", ":", "N or A:B") == (3, 4)
    for text in ("", ":", "3:", "a:b", "1.5"):
        with pytest.raises(SettingsError, match="x must be N or A:B"):
            parse_pair("x", text, ":", "N or A:B")


def test_a_batch_size_is_a_number_or_auto() -> None:
    assert [parse({**GIVEN, "batch_size": value}).batch_size for value in ("auto", "64", 64)] == ["auto", 64, 64]
    with pytest.raises(SettingsError, match="batch_size must be a number or auto, got 'many'"):
        Config(input=("in",), output="out", batch_size="many")


def test_compiling_for_a_gpu_needs_one() -> None:
    assert [parse({**GIVEN, "compile": value}).compile for value in (True, "true", "0")] == [True, True, False]
    with pytest.raises(SettingsError, match="compile needs device cuda: device must be auto or cuda with it"):
        parse({**GIVEN, "compile": True, "device": "cpu"})


def test_a_share_of_the_samples_for_the_gpu_is_written_in_one_way() -> None:
    given = ("gpu:0.5", "gpu:0.50", "gpu:0.07", "gpu:0.99", "gpu", "cpu")
    configs = [parse({**GIVEN, "decode": text}).decode for text in given]
    assert configs == ["gpu:0.5", "gpu:0.5", "gpu:0.07", "gpu:0.99", "gpu", "cpu"]
    assert [device_share(text) for text in configs] == [0.5, 0.5, 0.07, 0.99, 1.0, 0.0]
    with pytest.raises(
        SettingsError, match=r"decode gpu:0\.5 needs device cuda: device must be auto or cuda with it"
    ):
        parse({**GIVEN, "decode": "gpu:0.50", "device": "cpu"})


def test_decoding_on_a_gpu_needs_one() -> None:
    assert [parse({**GIVEN, "decode": "gpu", "device": device}).decode for device in ("auto", "cuda")] == ["gpu"] * 2
    with pytest.raises(SettingsError, match="decode gpu needs device cuda: device must be auto or cuda with it"):
        parse({**GIVEN, "decode": "gpu", "device": "cpu"})


def test_what_is_not_the_default_is_told_as_it_may_be_given() -> None:
    assert parse({"input": "in", "output": "out", "part_rows": 1024}).not_default() == {}
    given = {
        "id": "json:uid", "keep": "author=json:user.name=string cls=int64", "image_size": "224x96",
        "actors": "1:4", "normalize": "true", "max_error_fraction": "0.1", "batch_size": "auto", "key": "last-dot",
    }  # fmt: skip
    config = parse({"input": "in", "output": "out", **given})
    assert config.not_default() == given
    assert parse({"input": "in", "output": "out", **config.not_default()}) == config
