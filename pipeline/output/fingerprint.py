"""What made an output: the settings that decide what its vectors mean, kept in `run.json` and every part."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from importlib.metadata import version
from typing import Any

import numpy
import PIL
import pyarrow

from pipeline.core.config import DECODES, Config, Field
from pipeline.core.errors import OtherSettingsError, StoredDataError, StoreError
from pipeline.core.redact import describe
from pipeline.core.storage import create, join, read_bytes
from pipeline.decoding.preprocess import Preprocess
from pipeline.output.names import RUN_FILE

FORMAT = 1
# Before the kind of device, among the versions: in batches of how many images it computed, where that was chosen.
BATCH_SIZE = "batch_size_"


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """`settings` must be equal for two runs to share an output; `versions` are only told."""

    settings: dict[str, Any]
    versions: dict[str, str]

    @property
    def digest(self) -> str:
        """sha256 of the settings."""
        return hashlib.sha256(_json(self.settings).encode()).hexdigest()


def make_fingerprint(
    config: Config,
    *,
    backbone: str,
    weights_name: str,
    weights_sha256: str,
    preprocess: Preprocess,
    embedding_shape: tuple[int, ...],
    precision: str,
    input_prefix: str,
    versions: dict[str, str],
) -> Fingerprint:
    """The fingerprint of a run. `precision` may be `auto` where it is not known before Ray starts."""
    settings = {
        "format": FORMAT,
        "backbone": backbone,
        "weights_sha256": weights_sha256,
        "preprocess": preprocess.settings(),
        "features": config.features,
        "embedding_shape": list(embedding_shape),
        "normalize": config.normalize,
        "dtype": config.dtype,
        "precision": precision,
        "id": _spec(config.id) if config.id else "key",
        "keep": [_spec(field) for field in config.keep],
        "image_member": config.image_member,
        "ignore_orientation": config.ignore_orientation,
        "max_pixels": config.max_pixels,
        "max_image_bytes": config.max_image_bytes,
        "part_rows": config.part_rows,
        "input_prefix": input_prefix,
    }
    if config.decode != DECODES[0]:
        # As before there was another: outputs of that time go on.
        settings["decode"] = config.decode
    base = {
        "weights": weights_name,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
        "cykooz_resizer": version("cykooz_resizer"),
        "pyarrow": pyarrow.__version__,
    }
    return Fingerprint(json.loads(_json(settings)), base | versions)


def _spec(field: Field) -> str:
    return f"{field.member}{':' if field.path else ''}{'.'.join(field.path)}={field.type}"


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def read_fingerprint(output: str) -> Fingerprint | None:
    """What made `output`, or None where nothing has.

    Raises:
        StoreError: `run.json` cannot be read.
        StoredDataError: it is broken, or was changed by hand.
    """
    url = join(output, RUN_FILE)
    try:
        run = json.loads(read_bytes(url))
        if not isinstance(run["settings"], dict) or not isinstance(run["versions"], dict):
            raise TypeError("settings and versions must be objects")
        fingerprint = Fingerprint(run["settings"], run["versions"])
        stated = run["fingerprint"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{url} cannot be read: {describe(error)}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoredDataError(f"{url} is not a run.json of this pipeline: {error!r}") from error
    if stated != fingerprint.digest:
        raise StoredDataError(f"{url} was changed by hand: its settings do not have the fingerprint {stated}")
    return fingerprint


def follow(asked: Fingerprint, made: Fingerprint | None) -> Fingerprint:
    """`asked`, with a precision of `auto` and the chosen batch sizes as the output was `made`.

    Raises:
        OtherSettingsError: the output was made with another setting; each difference is named.
    """
    if made is None:
        return asked
    settings = dict(asked.settings)
    if settings["precision"] == "auto":
        settings["precision"] = made.settings.get("precision", "auto")
    differences = [
        f"{name}: output {_json(made.settings.get(name))}, this run {_json(settings.get(name))}"
        for name in sorted(settings.keys() | made.settings.keys())
        if made.settings.get(name) != settings.get(name)
    ]
    if differences:
        raise OtherSettingsError(
            "the output was made with other settings; choose another --output, or run with the same:\n  "
            + "\n  ".join(differences)
        )
    chosen = {name: told for name, told in made.versions.items() if name.startswith(BATCH_SIZE)}
    return Fingerprint(settings, chosen | asked.versions)


def write_fingerprint(output: str, fingerprint: Fingerprint) -> None:
    """Write `run.json` of a new output; what another run wrote meanwhile stays.

    Raises:
        OtherSettingsError: that was made with another setting.
    """
    run = {
        "fingerprint": fingerprint.digest,
        "settings": fingerprint.settings,
        "versions": fingerprint.versions,
    }
    if not create(output, RUN_FILE, (json.dumps(run, indent=2, ensure_ascii=False) + "\n").encode()):
        made = read_fingerprint(output)
        if made is not None and made.digest != fingerprint.digest:
            follow(fingerprint, made)
