"""The settings of an output: what decides what its vectors mean, and which samples its rows are."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from shard_embedder.pipeline.core.config import DECODES, DTYPES, FEATURES, KEYS, PRECISIONS, Config, Field, is_decode
from shard_embedder.pipeline.core.errors import SettingsError, StoredDataError
from shard_embedder.pipeline.decoding.preprocess import Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.output.typed import check_types
from shard_embedder.pipeline.shards.keys import Naming

FORMAT = 2


class Difference(NamedTuple):
    """A setting that two outputs do not share, with both values as JSON."""

    name: str
    own: str
    other: str


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Two runs may share an output if these are equal. The place of the input is not among them."""

    backbone: str
    weights_sha256: str
    preprocess: Preprocess
    features: str
    embedding_shape: tuple[int, ...]
    normalize: bool
    dtype: str
    precision: str  # `auto` until the device is known
    decode: str
    key: str
    id: Field | None
    keep: tuple[Field, ...]
    image_member: str | None
    ignore_orientation: bool
    accept_damaged: bool
    max_pixels: int
    max_image_bytes: int
    part_rows: int

    @classmethod
    def of(
        cls,
        config: Config,
        *,
        backbone: str,
        weights_sha256: str,
        preprocess: Preprocess,
        embedding_shape: tuple[int, ...],
    ) -> OutputSettings:
        """The settings of a job, whose names in `config` have been looked up."""
        return cls(
            backbone=backbone,
            weights_sha256=weights_sha256,
            preprocess=preprocess,
            embedding_shape=embedding_shape,
            **{name: getattr(config, name) for name in _OF_CONFIG},
        )

    @property
    def rules(self) -> DecodingRules:
        """How its images are decoded."""
        return DecodingRules(
            preprocess=self.preprocess,
            max_pixels=self.max_pixels,
            ignore_orientation=self.ignore_orientation,
            accept_damaged=self.accept_damaged,
            scaled=self.decode == "scaled",
        )

    @property
    def naming(self) -> Naming:
        """How the names of members make its samples."""
        return Naming(self.key, self.image_member)

    def to_json(self) -> dict[str, Any]:
        """As run.json and every part have them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            **values,
            "preprocess": self.preprocess.to_json(),
            "embedding_shape": list(self.embedding_shape),
            "id": "key" if self.id is None else self.id.spec,
            "keep": [field.spec for field in self.keep],
        }

    @classmethod
    def from_json(cls, values: Any) -> OutputSettings:
        """The inverse of `to_json`.

        Raises:
            StoredDataError: not settings of this version; what is wrong is named.
        """
        try:
            given = dict(values)
            if given.pop("format") != FORMAT:
                raise ValueError(f"format must be {FORMAT}, got {values['format']!r}")
            names = {field.name for field in dataclasses.fields(cls)}
            if given.keys() != names:
                raise ValueError(f"unknown or missing: {', '.join(sorted(given.keys() ^ names))}")
            given["preprocess"] = Preprocess.from_json(given["preprocess"])
            given["embedding_shape"] = tuple(given["embedding_shape"])
            given["id"] = None if given["id"] == "key" else Field.parse(given["id"])
            given["keep"] = tuple(Field.parse(spec) for spec in given["keep"])
            settings = cls(**given)
            settings._check()
        except (KeyError, TypeError, ValueError, AttributeError, SettingsError) as error:
            raise StoredDataError(f"the settings are not of this version: {error}") from error
        return settings

    def _check(self) -> None:
        """Raise `ValueError` for a value that no run could have written."""
        check_types(self)
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not is_decode(self.decode):
            raise ValueError(f"decode must be one of {', '.join(DECODES)}, got {self.decode!r}")
        sizes = [*self.embedding_shape, *self.preprocess.crop, self.part_rows, self.max_pixels, self.max_image_bytes]
        has_sizes = all(isinstance(size, int) and 0 < size < 2**63 for size in sizes)
        if not has_sizes or len(self.embedding_shape) not in (1, 3):
            raise ValueError(f"the sizes must be positive whole numbers, got {sizes}")

    def differences(self, other: OutputSettings) -> list[Difference]:
        """What differs, by name."""
        own, others = self.to_json(), other.to_json()
        return [
            Difference(name, canonical_json(own[name]), canonical_json(others[name]))
            for name in sorted(own)
            if own[name] != others[name]
        ]


_OF_CONFIG = (
    "features", "normalize", "dtype", "precision", "decode", "key", "id", "keep", "image_member",
    "ignore_orientation", "accept_damaged", "max_pixels", "max_image_bytes", "part_rows",
)  # fmt: skip
_KNOWN = {"features": FEATURES, "dtype": DTYPES, "precision": PRECISIONS, "key": KEYS}


def canonical_json(value: Any) -> str:
    """The same text for equal values: a fingerprint is its hash."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
