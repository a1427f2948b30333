"""How weights are named and pinned, without torch: a worker that unpickles a job need not import it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from shard_embedder.pipeline.core.errors import SettingsError, WeightsError
from shard_embedder.pipeline.core.storage import read_bytes

_RANDOM = re.compile(r"random(?::([0-9]+))?")
_MAX_SEED = 2**64 - 1  # torch.manual_seed takes no larger one
# The query of a presigned URL is a credential.
_QUERY = re.compile(r"\?[^\s'\")\]]+")


@dataclass(frozen=True)
class Weights:
    """A pinned parameter set.

    `name` is what the user gave, without the folders of a path. `sha256` is that of the file, as `sha256sum` prints
    it, or that of random parameters (`state_sha256`). Random weights have a `seed`, all others a `state`: tensors by
    name.
    """

    name: str
    sha256: str
    state: dict[str, Any] | None = field(default=None, repr=False)
    seed: int | None = None


def spec_of(name: str) -> str:
    """What `load_weights` takes for weights of this name: torchvision's are `ResNet50_Weights.IMAGENET1K_V2`."""
    return name.partition("_Weights.")[2] or name


def random_seed(spec: str) -> int | None:
    """The seed of `random` or `random:SEED`, None for any other weights. Without a seed it is 0.

    Raises:
        WeightsError: a seed that is not a whole number from 0 to 2**64 - 1.
    """
    if spec != "random" and not spec.startswith("random:"):
        return None
    match = _RANDOM.fullmatch(spec)
    if match is None or int(match.group(1) or 0) > _MAX_SEED:
        raise WeightsError(f"the seed of random weights must be a whole number from 0 to 2**64 - 1, got {spec!r}")
    return int(match.group(1) or 0)


def is_file(spec: str) -> bool:
    """Whether weights are given by a path or a URL."""
    return "/" in spec or spec.lower().endswith((".pth", ".pt", ".safetensors"))


def shown(spec: str) -> str:
    """A path or URL of weights without its query, which may be a credential."""
    return spec.partition("?")[0] if "://" in spec else spec


def read_file(spec: str) -> bytes:
    """The content of a path or URL of weights. Raises `WeightsError` where it cannot be read."""
    try:
        return read_bytes(spec)
    except FileNotFoundError as error:
        raise WeightsError(f"weights {shown(spec)} not found") from error
    except SettingsError:
        raise
    except Exception as error:
        reason = _QUERY.sub("?...", f"{type(error).__name__}: {error}")
        raise WeightsError(f"weights {shown(spec)} cannot be read: {reason}") from error
