"""What made an output: kept in `run.json` and every part."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy
import PIL
import pyarrow

from shard_embedder.pipeline.core.errors import OtherSettingsError, StoredDataError, StoreError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.retries import LIMITS, StoreLimits
from shard_embedder.pipeline.core.storage import join, read_bytes
from shard_embedder.pipeline.core.writing import create
from shard_embedder.pipeline.decoding.versions import heif_version
from shard_embedder.pipeline.output.names import RUN_FILE
from shard_embedder.pipeline.output.settings import OutputSettings, canonical_json
from shard_embedder.pipeline.output.typed import check_types


@dataclass(frozen=True)
class Fingerprint:
    """What made an output. Two runs may share it if their `settings` are equal.

    `input_prefix` is where the input was, `photos_folder` the folder of images that was packed there, if one was.
    `batch_size` is the images a batch, by kind of device, if it was asked for or measured.
    """

    settings: OutputSettings
    versions: dict[str, str]
    input_prefix: str = ""
    batch_size: dict[str, int] = field(default_factory=dict)
    photos_folder: str = ""

    @cached_property
    def digest(self) -> str:
        """sha256 of the settings."""
        return hashlib.sha256(canonical_json(self.settings.to_json()).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """As run.json has it."""
        return {
            "fingerprint": self.digest,
            "settings": self.settings.to_json(),
            "input_prefix": self.input_prefix,
            "photos_folder": self.photos_folder,
            "batch_size": self.batch_size,
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, values: Any) -> Fingerprint:
        """The inverse of `to_json`. A part has neither `input_prefix` nor `photos_folder`.

        Raises:
            StoredDataError: not of this version, or changed by hand.
        """
        try:
            if not isinstance(values, dict):
                raise TypeError(f"a JSON object is needed, not {type(values).__name__}")
            stated = values["fingerprint"]
            prefix, photos = values.get("input_prefix", ""), values.get("photos_folder", "")
            sizes = values.get("batch_size", {})
            made = cls(OutputSettings.from_json(values["settings"]), values["versions"], prefix, sizes, photos)
            check_types(made)
            if not all(isinstance(told, str) for told in made.versions.values()):
                raise ValueError("versions must be texts")
            if not all(isinstance(size, int) and size > 0 for size in sizes.values()):
                raise ValueError("batch_size must be whole numbers of at least 1")
        except KeyError as error:
            raise StoredDataError(f"it does not say what made the output: {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise StoredDataError(f"it does not say what made the output: {error}") from error
        if made.digest != stated:
            raise StoredDataError(f"it was changed by hand: its settings do not have the fingerprint {stated!r}")
        return made


def make_fingerprint(
    settings: OutputSettings,
    *,
    weights_name: str,
    input_prefix: str,
    versions: dict[str, str],
    photos_folder: str = "",
) -> Fingerprint:
    """The fingerprint of a run. `versions` are those of what computes the features."""
    base = {
        "weights": weights_name,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "cykooz_resizer": version("cykooz_resizer"),
        "pyarrow": pyarrow.__version__,
    }
    heif = heif_version()
    optional = {} if heif is None else {"pillow_heif": heif}
    return Fingerprint(settings, base | optional | versions, input_prefix, photos_folder=photos_folder)


def read_fingerprint(output: str, limits: StoreLimits = LIMITS) -> Fingerprint | None:
    """What made `output`; None if it is new.

    Raises:
        StoreError: `run.json` cannot be read.
        StoredDataError: it is broken, or was changed by hand.
    """
    url = join(output, RUN_FILE)
    try:
        return Fingerprint.from_json(json.loads(read_bytes(url, limits)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{url} cannot be read: {describe(error)}") from error
    except (ValueError, RecursionError) as error:
        raise StoredDataError(f"{url} is not a run.json of this pipeline: {error!r}") from error
    except StoredDataError as error:
        raise StoredDataError(f"{url} cannot be used: {error}") from error


def check_against_output(asked: Fingerprint, made: Fingerprint | None) -> Fingerprint:
    """`asked`, with the output's batch sizes, and with its precision in place of `auto`.

    Raises:
        OtherSettingsError: the output was made with another setting; each difference is named.
    """
    if made is None:
        return asked
    settings = asked.settings
    if settings.precision == "auto":
        settings = replace(settings, precision=made.settings.precision)
    differences = made.settings.differences(settings)
    if differences:
        raise OtherSettingsError(
            "the output was made with other settings; choose another --output, or run with the same:\n  "
            + "\n  ".join(f"{name}: output {own}, this run {other}" for name, own, other in differences)
        )
    return replace(asked, settings=settings, batch_size=made.batch_size)


def write_fingerprint(output: str, fingerprint: Fingerprint) -> None:
    """Write `run.json` of a new output, unless another run wrote it meanwhile.

    Raises:
        OtherSettingsError: the other run has another setting.
    """
    text = json.dumps(fingerprint.to_json(), indent=2, ensure_ascii=False) + "\n"
    if not create(output, RUN_FILE, text.encode()):
        made = read_fingerprint(output)
        if made is not None and made.digest != fingerprint.digest:
            check_against_output(fingerprint, made)
