"""Ids and kept fields: values of a sample's metadata members."""

from __future__ import annotations

import json
from typing import Any

from shard_embedder.pipeline.core.config import Field
from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.shards.grouping import Sample, brief
from shard_embedder.pipeline.shards.tars import Member

MAX_METADATA_BYTES = 16 * 2**20
_INT64 = range(-(2**63), 2**63)


def _lookup(sample: Sample[Member], item: Field) -> Any:
    """The value of a field, or None where the sample has none.

    Raises:
        SampleError: the member that should hold it cannot be read.
    """
    extension = item.member.lower()
    member = sample.metadata.get(extension)
    if member is None:
        return None
    if member.data is None:
        raise SampleError(f"unreadable member: {extension}: {member.problem}")
    if len(member.data) > MAX_METADATA_BYTES:
        raise SampleError(f"metadata too large: {extension} has {len(member.data)} bytes")
    if not item.path and extension != "json":
        return _text(member.data) if item.type == "string" else literal(member.data)
    if extension not in sample.parsed:
        sample.parsed[extension] = _parsed(member.data)
    value = sample.parsed[extension]
    for name in item.path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _parsed(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"broken json: {type(error).__name__}: {str(error)[:200]}") from error


def _text(data: bytes) -> str:
    try:
        # Without a byte order mark.
        return data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise SampleError(f"broken text: not UTF-8: {error.reason}") from error


def literal(data: bytes) -> Any:
    """A member that holds one number or word, such as `.cls`."""
    text = _text(data).strip()
    # Python's numbers may have underscores, and digits of any script.
    if len(text) > 64 or "_" in text or not text.isascii():
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def kept_field(sample: Sample[Member], item: Field) -> tuple[Any, bool]:
    """The value of a kept field, None where there is none, and whether one was lost."""
    try:
        return kept_value(_lookup(sample, item), item.type)
    except SampleError:
        return None, True


def why_lost(sample: Sample[Member], item: Field) -> str:
    """Why `kept_field` lost a value, in a few words."""
    try:
        value = _lookup(sample, item)
    except SampleError as error:
        return str(error)
    if item.type == "json" or (item.type == "string" and isinstance(value, str)):
        return "it holds what JSON text cannot: NaN, infinity, or invalid Unicode"
    shown = f"{_kind(value)} {brief(str(value))}" if isinstance(value, (str, bool, int, float)) else _kind(value)
    return f"{shown} is no {item.type}"


def kept_value(value: Any, kind: str) -> tuple[Any, bool]:
    """`value` as the declared type `kind`, and whether it was lost.

    A value of another type becomes null and counts as lost; so does text that is not valid Unicode. An
    integer is a float64 too, and `json` takes any value that JSON has (not NaN), as its text.
    """
    if value is None:
        return None, False
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        if kind == "json":
            value = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if kind in ("string", "json") and isinstance(value, str):
            value.encode()
            return value, False
        if kind == "float64" and number:
            return float(value), False
    except (ValueError, OverflowError, RecursionError):
        return None, True
    if kind == "int64" and number and isinstance(value, int) and value in _INT64:
        return value, False
    if kind == "bool" and isinstance(value, bool):
        return value, False
    return None, True


def find_user_id(sample: Sample[Member], item: Field) -> str:
    """The id that the user's field names.

    Raises:
        SampleError: the sample has none.
    """
    value = _lookup(sample, item)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise SampleError(f"no id: {item.member}:{'.'.join(item.path)} is {_kind(value)}, not text or an integer")
    if kept_value(value, "string")[1]:
        raise SampleError("no id: it is not valid Unicode")
    return value


def _kind(value: Any) -> str:
    return "missing" if value is None else "empty" if value == "" else type(value).__name__
