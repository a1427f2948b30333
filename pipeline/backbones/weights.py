"""Loads weights by name, path or URL: a state dict in its library's layout, and the sha256 that names it."""

from __future__ import annotations

import hashlib
import io
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir

from shard_embedder.pipeline.backbones.weights_spec import Weights, read_file, shown
from shard_embedder.pipeline.core.errors import WeightsError

StateDict = dict[str, Tensor]
# A download is given up when no byte arrives for this long.
DOWNLOAD_TIMEOUT_S = 20
# torchvision names its files `<name>-<first digits of the file's sha256>.pth`.
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")
_COUNTER = "num_batches_tracked"  # files older than torch 0.4.1 lack it; only training uses it
# torch names what it refused within paragraphs of advice to load it all the same.
_REFUSED = re.compile(r"GLOBAL \S+|Unsupported (?:operand|class|type)[^.\n]*")


def load_file(spec: str) -> Weights:
    """Load weights from a path or URL, with `weights_only=True`: nothing in the file is executed.

    Raises:
        WeightsError: not found, not readable, or not a state dict.
    """
    data, label = read_file(spec), shown(spec)
    return weights_from(label.rstrip("/").rpartition("/")[2], data, label)


def weights_from(name: str, data: bytes, file: str) -> Weights:
    """Weights from the content of a `file`. Raises `WeightsError` if it is not a state dict."""
    return Weights(name, hashlib.sha256(data).hexdigest(), parse(data, file))


def published(url: str, weights: str, library: str, timeout_s: float = DOWNLOAD_TIMEOUT_S) -> bytes:
    """The file of a library's own `weights`, from torch's hub folder or downloaded there.

    Unlike `WeightsEnum.get_state_dict`, this also checks a file that was there before, and executes nothing in it.

    Raises:
        WeightsError: no download possible, or not the file that the library published.
    """
    path = Path(get_dir(), "checkpoints", urlsplit(url).path.rpartition("/")[2])
    in_name = HASH_IN_NAME.search(path.name)
    prefix = in_name.group(1) if in_name else ""
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with _socket_timeout(timeout_s):
                download_url_to_file(url, str(path), prefix, progress=False)
        data = path.read_bytes()
    except (OSError, HTTPException, RuntimeError) as error:
        raise WeightsError(
            f"cannot download the weights {weights} from {url}: {error}. Where there is no network, "
            f"put that file into {path.parent}, or give --weights a path, an s3:// URL or random:SEED"
        ) from error
    sha256 = hashlib.sha256(data).hexdigest()
    if not sha256.startswith(prefix):
        raise WeightsError(
            f"{path} is not the file that {library} published: by its name its sha256 starts with {prefix}, "
            f"but it is {sha256}; remove it to download it again, or give --weights the path of your own file"
        )
    return data


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """torch.hub downloads without a timeout of its own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def parse(data: bytes, name: str) -> StateDict:
    """The state dict in a file; nothing in it is executed. Raises `WeightsError` if it is not a state dict."""
    try:
        if name.lower().endswith(".safetensors"):
            loaded: Any = load_safetensors(data)
        else:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch's unpickler raises nearly anything on damaged files
        raise WeightsError(
            f"weights {name} are not a state dict that loads without code: {_reason(error)}"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict):
        raise WeightsError(f"weights {name} must be a state dict of tensors, got {type(loaded).__name__}")
    for key, value in loaded.items():
        if not isinstance(value, Tensor):
            raise WeightsError(
                f"weights {name} must be a state dict of tensors, got {type(value).__name__} as {str(key)!r}"
            )
        if value.is_meta or value.layout != torch.strided:
            kind = "one without values" if value.is_meta else str(value.layout)
            raise WeightsError(f"weights {name} must hold dense tensors, got {kind} as {str(key)!r}")
    return {str(key).removeprefix("module."): value for key, value in loaded.items()}


def _reason(error: Exception) -> str:
    text = str(error).strip()
    refused = _REFUSED.search(text)
    if refused is not None:
        return refused.group().replace("GLOBAL", "it asks for").rstrip(".")
    first = text.partition("\n")[0][:200]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def check_fit(
    expected: StateDict, given: StateDict, name: str, architecture: str, optional: tuple[str, ...] = ()
) -> None:
    """Raise `WeightsError` if a state dict does not fit a model. Keys that begin with `optional` may be missing.

    The error names keys that are missing, unexpected, of another shape, or whole numbers, as quantised weights are.
    """
    missing = [
        key for key in expected if key not in given and not key.startswith(optional) and not key.endswith(_COUNTER)
    ]
    unexpected = [key for key in given if key not in expected]
    wrong = [
        f"{key} {_shape(value)} instead of {_shape(expected[key])}"
        for key, value in given.items()
        if key in expected and value.shape != expected[key].shape
    ]
    whole = [
        f"{key} {value.dtype}"
        for key, value in given.items()
        if key in expected and expected[key].is_floating_point() and not value.is_floating_point()
    ]
    problems = [
        ("missing", missing), ("unexpected", unexpected), ("of another shape", wrong), ("of another type", whole)
    ]  # fmt: skip
    if any(keys for _, keys in problems):
        text = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in problems if keys)
        raise WeightsError(f"weights {name} do not fit {architecture}: {text}")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(keys: list[str], most: int = 8) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def state_sha256(state: StateDict) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in the order of their names."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def random_weights(seed: int, model: nn.Module) -> Weights:
    """Weights that `seed` makes again, with the sha256 of the parameters of `model`, which has them."""
    return Weights(f"random:{seed}", state_sha256(model.state_dict()), seed=seed)


def without_values(weights: Weights) -> Weights:
    """Weights whose tensors have shapes and no values: enough to see whether they fit."""
    assert weights.state is not None
    return replace(weights, state={key: value.to("meta") for key, value in weights.state.items()})
