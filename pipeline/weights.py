"""Weights by name, path or URL: a state dict in torchvision's layout, and the sha256 that names it."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.hub import get_dir
from torchvision.models import WeightsEnum, get_model_weights
from torchvision.transforms._presets import ImageClassification

from pipeline.decode import Preprocess
from pipeline.errors import WeightsError
from pipeline.storage import read_bytes

StateDict = dict[str, Tensor]
_RANDOM = re.compile(r"random(?::(\d+))?")


@dataclass(frozen=True)
class Weights:
    """A pinned parameter set.

    `name` is how the user named it, without the folders of a path. `sha256` is that of the file, or for
    `random` that of the parameters. `seed` is set for random weights, `state` for all others.
    """

    name: str
    sha256: str
    state: StateDict | None = None
    seed: int | None = None


def random_seed(spec: str) -> int | None:
    """The seed of `random` or `random:SEED`, None for any other weights. Without a seed it is 0."""
    match = _RANDOM.fullmatch(spec)
    return int(match.group(1) or 0) if match else None


def named_weights(architecture: str, name: str) -> WeightsEnum:
    """A member of torchvision's weights of an architecture, `DEFAULT` included.

    Raises:
        WeightsError: no such name; the known ones are listed.
    """
    known = get_model_weights(architecture)
    try:
        return known[name]
    except KeyError as error:
        names = ", ".join(["DEFAULT", *(entry.name for entry in known)])
        raise WeightsError(f"weights of {architecture} must be one of {names}, got {name!r}") from error


def load_state(architecture: str, spec: str) -> tuple[StateDict, str, str]:
    """State dict, name and sha256 of weights that are a file or one of torchvision's.

    torchvision's own are downloaded once to torch's hub folder and their hash is checked.

    Raises:
        WeightsError: not found, no download possible, or not a state dict. A file is loaded with
            `weights_only=True`: nothing in it is executed.
    """
    if _is_file(spec):
        data = _read(spec)
        return _parse(data, spec), spec.rstrip("/").rpartition("/")[2], hashlib.sha256(data).hexdigest()
    weights = named_weights(architecture, spec)
    try:
        state = weights.get_state_dict(progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"cannot download the weights {weights} from {weights.url}: {error}. Where there is no network, "
            f"put that file into {get_dir()}/checkpoints, or give --weights a path, an s3:// URL or random:SEED"
        ) from error
    return dict(state), str(weights), state_sha256(dict(state))


def _is_file(spec: str) -> bool:
    return "/" in spec or spec.endswith((".pth", ".pt", ".safetensors"))


def _read(spec: str) -> bytes:
    try:
        return read_bytes(spec)
    except FileNotFoundError as error:
        raise WeightsError(f"weights {spec} not found") from error
    except Exception as error:
        raise WeightsError(f"weights {spec} cannot be read: {type(error).__name__}: {error}") from error


def _parse(data: bytes, spec: str) -> StateDict:
    try:
        if spec.endswith(".safetensors"):
            loaded: Any = load_safetensors(data)
        else:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise WeightsError(f"weights {spec} are not a state dict that loads without code: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"weights {spec} must be a state dict of tensors, got {type(loaded).__name__}")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def state_sha256(state: StateDict) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def preprocess_of(weights: WeightsEnum) -> Preprocess:
    """What `weights.transforms()` does, as numbers. Raises `WeightsError` for a preset we do not know."""
    preset = weights.transforms()
    if not isinstance(preset, ImageClassification):
        raise WeightsError(f"{weights} has an unknown preprocessing: {type(preset).__name__}")
    crop = preset.crop_size
    return Preprocess(
        resize=preset.resize_size[0],
        crop=(crop[0], crop[-1]),
        interpolation=preset.interpolation.value,
        mean=tuple(preset.mean),
        std=tuple(preset.std),
    )
