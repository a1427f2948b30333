"""The settings of a job: one frozen class, checked when it is built."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.formatting import did_you_mean
from shard_embedder.pipeline.core.redact import REFUSAL, has_secret
from shard_embedder.pipeline.core.schema import KEEP_TYPES, RESERVED_COLUMNS

FEATURES = ("pooled", "map")
DTYPES = ("float32", "float16")
DEVICES = ("auto", "cuda", "cpu")
DECODES = ("cpu", "scaled", "gpu", "gpu:SHARE")
# Where the key of a member ends in its basename; the first is WebDataset's rule.
KEYS = ("first-dot", "last-dot")
AUTO = "auto"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LOG_FORMATS = ("text", "json")
# The type of a kept field where the user names none, by the member's extension.
_DEFAULT_KEEP_TYPES = {"cls": "int64"}


@dataclass(frozen=True)
class Field:
    """A field of a sample: a member (`cls`, `txt`) or a path into its JSON (`json:a.b`)."""

    member: str
    path: tuple[str, ...] = ()
    type: str = "string"
    name: str = ""  # of the column; empty: the default one

    @property
    def column(self) -> str:
        """Name of the output column: as given, else the JSON path or the member's extension as an identifier."""
        return self.name or re.sub(r"^(?=\d)|[^A-Za-z0-9_]", "_", "_".join(self.path) or self.member)

    @property
    def spec(self) -> str:
        """The inverse of `parse`, with its type."""
        name = f"{self.name}=" if self.name else ""
        return f"{name}{self.member}{':' if self.path else ''}{'.'.join(self.path)}={self.type}"

    @classmethod
    def parse(cls, spec: str) -> Field:
        """`EXT` or `EXT:PATH`, after `NAME=` and before `=TYPE`, e.g. `author=json:user.name=string`.

        No type has a colon, so `NAME=EXT:PATH` needs none; in `A=B` without a colon B is the type, never a member.

        Raises:
            SettingsError: not of that form, a name that is no identifier, or an unknown type.
        """
        first, *others = spec.split("=")
        name: str | None = None
        kind: str | None = None
        field = first
        if len(others) == 2:
            name, field, kind = first, others[0], others[1]
        elif len(others) == 1 and ":" in others[0]:
            name, field = first, others[0]
        elif len(others) == 1:
            kind = others[0]
        match = re.fullmatch(r"([^:=\s.][^:=\s]*)(?::([^:=\s]+))?", field)
        if not match or len(others) > 2 or kind == "":
            raise SettingsError(
                f"a field must look like EXT, EXT:PATH, EXT:PATH=TYPE or NAME=EXT:PATH=TYPE, EXT without its dot, "
                f"got {spec!r}"
            )
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SettingsError(f"the name of field {spec!r} must be letters, digits and _, got {name!r}")
        member, path = match.groups()
        if kind is None:
            kind = _DEFAULT_KEEP_TYPES.get(member, "json" if member == "json" and not path else "string")
        if kind not in KEEP_TYPES:
            raise SettingsError(f"the type of field {spec!r} must be one of {', '.join(KEEP_TYPES)}, got {kind!r}")
        return cls(member, tuple(path.split(".")) if path else (), kind, name or "")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one job. Raises `SettingsError` where a value breaks its rule."""

    input: tuple[str, ...]
    output: str
    backbone: str = "resnet50"
    weights: str = "DEFAULT"
    preprocess: str = "DEFAULT"
    image_size: tuple[int, int] | None = None  # (height, width)
    features: str = "pooled"
    normalize: bool = False
    dtype: str = "float32"
    precision: str = "auto"
    device: str = "auto"
    batch_size: int | str | None = None  # images; auto: by measuring; None: by device
    # scaled: large JPEGs at a fraction of their size; gpu: plain JPEGs on the backbone's device, gpu:SHARE those of
    # so many of the samples
    decode: str = "cpu"
    compile: bool = False  # the backbone, for the GPU
    actors: tuple[int, int] | None = None  # (min, max); None: all the devices there are
    actor_resource: str | None = None  # Ray resource of the nodes that backbones may run on; None: any node
    node_wait_s: int | None = None  # for nodes that are missing; None: 0 at the start, 1800 once it runs
    part_rows: int = 1024
    key: str = KEYS[0]
    id: Field | None = None  # None: the WebDataset key
    keep: tuple[Field, ...] = ()
    image_member: str | None = None  # extension; None: by the documented order
    ignore_orientation: bool = False
    accept_damaged: bool = False  # images that can be decoded though a part of the picture is missing
    max_pixels: int = 67_108_864
    max_image_bytes: int = 256 * 2**20
    limit: int | None = None  # shards
    max_passes: int = 3
    max_error_fraction: float = 1.0
    max_shard_error_fraction: float = 1.0
    price_per_hour: float | None = None  # money a device-hour, for the report
    log_format: str = "text"

    def __post_init__(self) -> None:
        _check(bool(self.input), "input", "name at least one shard, folder, glob or list", self.input)
        # Before anything that shows a value: these may be URLs.
        for name in ("input", "output", "weights"):
            value = getattr(self, name)
            if has_secret(value if isinstance(value, str) else " ".join(value)):
                raise SettingsError(f"{name} {REFUSAL}")
        for item in self.input:
            _check(bool(item.strip()), "input", "name at least one shard, folder, glob or list", item)
        is_place = bool(self.output.strip()) and not re.match(r"https?://|.*:/*$", self.output, re.IGNORECASE)
        _check(is_place, "output", "be a folder or an s3:// prefix", self.output)
        _check(self.features in FEATURES, "features", f"be one of {', '.join(FEATURES)}", self.features)
        _check(self.dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", self.dtype)
        _check(self.device in DEVICES, "device", f"be one of {', '.join(DEVICES)}", self.device)
        _check(self.key in KEYS, "key", f"be one of {', '.join(KEYS)}", self.key)
        rule = f"be one of {', '.join(DECODES)} (hundredths, 0.01 to 0.99)"
        _check(is_decode(self.decode), "decode", rule, self.decode)
        if self.needs_gpu and self.device == "cpu":
            raise SettingsError(f"{self.needs_gpu} needs device cuda: device must be auto or cuda with it, got 'cpu'")
        _check(self.precision in PRECISIONS, "precision", f"be one of {', '.join(PRECISIONS)}", self.precision)
        _check(
            not (self.normalize and self.features == "map"),
            "normalize",
            "be off for feature maps: L2 length is of an embedding [C]",
            self.normalize,
        )
        _check(self.log_format in LOG_FORMATS, "log_format", f"be one of {', '.join(LOG_FORMATS)}", self.log_format)
        if isinstance(self.batch_size, str):
            _check(self.batch_size == AUTO, "batch_size", "be a number or auto", self.batch_size)
        else:
            _check(self.batch_size is None or self.batch_size >= 1, "batch_size", "be at least 1", self.batch_size)
        for name in ("part_rows", "limit", "max_passes", "max_pixels", "max_image_bytes"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "be at least 1", value)
        _check(self.part_rows <= 1_000_000, "part_rows", "be at most 1000000", self.part_rows)
        for name in ("max_error_fraction", "max_shard_error_fraction"):
            _check(0.0 <= getattr(self, name) <= 1.0, name, "be between 0 and 1", getattr(self, name))
        price = self.price_per_hour
        _check(price is None or 0.0 <= price < math.inf, "price_per_hour", "be at least 0", price)
        if self.actors is not None:
            low, high = self.actors
            _check(1 <= low <= high, "actors", "be MIN:MAX with 1 <= MIN <= MAX", f"{low}:{high}")
        resource = self.actor_resource
        _check(
            resource is None or (bool(resource.strip()) and resource not in ("CPU", "GPU", "memory")),
            "actor_resource",
            "name a resource of nodes other than CPU, GPU and memory, such as accelerator_type:H100",
            resource,
        )
        wait_s = self.node_wait_s
        _check(wait_s is None or wait_s >= 0, "node_wait_s", "be at least 0", wait_s)
        if self.image_size is not None:
            _check(
                all(8 <= side <= 4096 for side in self.image_size),
                "image_size",
                "have sides of 8 to 4096 pixels",
                "x".join(map(str, self.image_size)),
            )
        member = self.image_member
        _check(
            member is None or re.fullmatch(r"[^.\s/][^\s/]*", member) is not None,
            "image_member",
            "be an extension without its dot, such as jpg",
            member,
        )
        # Engines such as DuckDB and Spark take two names that differ only in their case for one.
        columns = [field.column.casefold() for field in self.keep]
        for field, column in zip(self.keep, columns, strict=True):
            remedy = f"; name it, as in {field.column}_2={replace(field, name='').spec}"
            if column in RESERVED_COLUMNS:
                raise SettingsError(f"keep must not name a column of the output, got {field.column!r}{remedy}")
            if columns.count(column) > 1:
                raise SettingsError(f"keep must name each column once, got {field.column!r}{remedy}")

    @property
    def needs_gpu(self) -> str | None:
        """What of these settings only a GPU does, or None."""
        return f"decode {self.decode}" if device_share(self.decode) else "compile" if self.compile else None

    def not_default(self) -> dict[str, str]:
        """The settings that are not their default, each as a flag or a variable has it; but for input and output."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.default is not dataclasses.MISSING and getattr(self, field.name) != field.default
        }
        return {name: _as_text(name, value) for name, value in values.items()}

    @property
    def kept_columns(self) -> tuple[tuple[str, str], ...]:
        """The kept columns as (name, type name) pairs, in the order asked for."""
        return tuple((field.column, field.type) for field in self.keep)


def _as_text(name: str, value: Any) -> str:
    """The inverse of `_coerce`."""
    if isinstance(value, Field):
        return value.spec.removesuffix(f"={value.type}") if name == "id" else value.spec
    if isinstance(value, tuple):
        between = {"image_size": "x", "actors": ":"}.get(name, " ")
        return between.join(_as_text(name, item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check(holds: bool, field: str, rule: str, value: Any) -> None:
    if not holds:
        raise SettingsError(f"{field} must {rule}, got {value!r}")


def is_decode(decode: str) -> bool:
    """Whether it is a value of `decode`."""
    return decode in ("cpu", "scaled") or device_share(decode) > 0


def device_share(decode: str) -> float:
    """The share of the samples whose JPEGs the backbone's device decodes: 0 with cpu and scaled, 1 with gpu."""
    # One way to write each, as two outputs with the same share have the same settings.
    match = re.fullmatch(r"gpu(?::(0\.(?:[0-9]?[1-9])))?", decode)
    return 0.0 if match is None else float(match[1] or 1)


def parse_pair(field: str, text: str, separator: str, form: str) -> tuple[int, int]:
    """`A<separator>B` as two integers; a single integer stands for both.

    Raises:
        SettingsError: the text is not of that form, as which `form` tells.
    """
    pieces = text.lower().split(separator)
    try:
        numbers = [int(piece) for piece in pieces]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise SettingsError(f"{field} must be {form}, got {text!r}")
    return numbers[0], numbers[-1]


def parse(values: dict[str, Any]) -> Config:
    """Build a `Config` from loose values: text, numbers, booleans and lists as TOML or a shell gives them.

    Raises:
        SettingsError: an unknown name (the known ones are listed), a wrong type, a broken rule.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            hint = did_you_mean(name, fields) or ";"
            raise SettingsError(f"unknown setting {name!r}{hint} the known ones are {', '.join(sorted(fields))}")
        if value is not None:
            parsed[name] = _coerce(name, str(fields[name].type), value)
    missing = {"input", "output"} - set(parsed)
    if missing:
        names = " and ".join(sorted(missing))
        raise SettingsError(
            f"{names} must be given: --NAME, the variable EMBED_NAME, or name = ... in the --config file"
        )
    return Config(**parsed)


def _coerce(name: str, kind: str, value: Any) -> Any:
    if name == "input":
        items = value.split() if isinstance(value, str) else value
        return tuple(_texts(name, items))
    if name == "keep":
        items = value.split() if isinstance(value, str) else value
        return tuple(Field.parse(item) for item in _texts(name, items))
    if name == "id":
        text = _text(name, value)
        if "=" in text:
            raise SettingsError(f"id must be a field without a type, got {text!r}")
        return None if text == "key" else Field.parse(text)
    if name == "actors":
        return parse_pair(name, str(value), ":", "N or MIN:MAX")
    if name == "image_size":
        return parse_pair(name, str(value), "x", "N or HEIGHTxWIDTH")
    if name == "decode":
        return re.sub(r"(\.\d*[1-9])0+$", r"\1", _text(name, value))
    if name == "batch_size" and value == AUTO:
        return value
    if kind.startswith("bool"):
        return _bool(name, value)
    if kind.startswith("int") or kind.startswith("float"):
        number = int if kind.startswith("int") else float
        if isinstance(value, bool):
            raise SettingsError(f"{name} must be a number, got {value!r}")
        if number is int and isinstance(value, float) and not value.is_integer():
            raise SettingsError(f"{name} must be a whole number, got {value!r}")
        try:
            return number(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise SettingsError(f"{name} must be a number, got {value!r}") from error
    return _text(name, value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"{name} must be text, got {value!r}")
    return value


def _texts(name: str, items: Any) -> list[str]:
    if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
        raise SettingsError(f"{name} must be a list of texts, got {items!r}")
    return list(items)


def _bool(name: str, value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise SettingsError(f"{name} must be true or false, got {value!r}")
    return known[str(value).lower()]
