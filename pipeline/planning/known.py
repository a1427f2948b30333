"""What a run found out about its backbone, kept for the next one, which then need not import torch at all.

An entry is found by everything that it follows from: the settings, the processor, the libraries as they were
installed, and this package's own code. What a key cannot hold, the content of a weights file, is read again and
compared. Where anything of this is not certain, nothing is known.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbones.weights_spec import Weights, is_file, random_seed, read_file
from pipeline.core.config import Config
from pipeline.core.errors import PipelineError
from pipeline.decoding.preprocess import Preprocess
from pipeline.planning.cache import Bytes, Cache, Entry
from pipeline.planning.cpu import cpu_name

_LIBRARIES = ("torch", "torchvision", "safetensors", "openvino")
_TIMM = ("timm", "huggingface-hub")
_GRAPH, _CONSTANTS, _PRECISION = "graph", "constants", "precision"

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Known:
    """What a config names, looked up.

    `backbone` is the name without alias, `shape` that of one embedding, (C,) or (C, H, W), and `versions` are of what
    computes the features.
    """

    backbone: str
    weights: Weights
    preprocess: Preprocess
    shape: tuple[int, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class Kept:
    """The place in a cache for what is known of one job's backbone; `entry` is what an earlier run left there.

    `spec` is how the job names its weights.
    """

    cache: Cache
    key: str
    spec: str
    entry: Entry | None = None

    def graph(self) -> tuple[bytes, Bytes] | None:
        """The converted graph and its constants, uint8; None where they must be made."""
        parts = self.entry.parts() if self.entry is not None else None
        if parts is None or parts.keys() != {_GRAPH, _CONSTANTS}:
            return None
        return parts[_GRAPH].tobytes(), parts[_CONSTANTS]

    def keep(self, known: Known, graph: bytes, constants: Bytes) -> None:
        """Keep a graph that was seen to give what eager torch gives, and what else is known.

        Nothing is kept of weights of which a later run could not tell whether they are still these.
        """
        if known.weights.seed is None and known.weights.path is None and not is_file(self.spec):
            return
        facts = {
            "backbone": known.backbone,
            "weights": known.weights.name,
            "weights_sha256": known.weights.sha256,
            "weights_path": str(known.weights.path) if known.weights.path else None,
            "weights_seed": known.weights.seed,
            "preprocess": known.preprocess.settings(),
            "shape": list(known.shape),
            "versions": known.versions,
        }
        self.cache.keep(self.key, facts, {_GRAPH: graph, _CONSTANTS: constants.data})

    def verdict(self, weights: Weights, images: Pixels, candidates: tuple[str, ...]) -> str | None:
        """Which of `candidates` an earlier run took for the graph of `weights` on the same images [N, H, W, 3]."""
        entry = self.cache.find(self._verdict_key(weights, images, candidates))
        precision = entry.facts.get(_PRECISION) if entry is not None else None
        return precision if precision in (*candidates, "fp32") else None

    def keep_verdict(self, weights: Weights, images: Pixels, candidates: tuple[str, ...], precision: str) -> None:
        """Keep it for the next run."""
        self.cache.keep(self._verdict_key(weights, images, candidates), {_PRECISION: precision}, {})

    def _verdict_key(self, weights: Weights, images: Pixels, candidates: tuple[str, ...]) -> str:
        follows_from = [self.key, weights.sha256, images.shape, hashlib.sha256(images.data).hexdigest(), candidates]
        return hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()


def look_up(config: Config, cache: Cache | None) -> tuple[Known | None, Kept | None]:
    """What an earlier run knew of the config's backbone, if all of it still holds; and where it is kept.

    The weights are known and not loaded, random ones aside. On a GPU nothing is known: there is no graph.
    """
    key = make_key(config, cache) if cache is not None and config.device != "cuda" else None
    if cache is None or key is None:
        return None, None
    entry = cache.find(key)
    known = _known(entry) if entry is not None else None
    if known is None or not _still_holds(known.weights, config.weights):
        return None, Kept(cache, key, config.weights)
    return known, Kept(cache, key, config.weights, entry)


def make_key(config: Config, cache: Cache) -> str | None:
    """What an entry of `cache` is found by; None where it cannot be told what it would follow from."""
    libraries = _installed([*_LIBRARIES, *(_TIMM if config.backbone.startswith("timm/") else ())])
    code = _own_code()
    if libraries is None or code is None:
        return None
    follows_from = {
        "settings": [
            config.backbone, config.weights, config.preprocess, config.image_size, config.features, config.normalize,
        ],
        "libraries": libraries,
        "code": code,
        "python": sys.version,
        "processor": cpu_name(),
        "surroundings": dict(cache.surroundings),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(follows_from, sort_keys=True).encode()).hexdigest()


def _installed(names: list[str]) -> dict[str, str] | None:
    """sha256 of the list of files, each with its own sha256, that each library was installed as.

    None where a library has no such list, or is worked on where it lies: its version then says nothing.
    """
    found = {}
    for name in names:
        try:
            library = distribution(name)
        except PackageNotFoundError:
            return None
        record, origin = library.read_text("RECORD"), library.read_text("direct_url.json") or ""
        if record is None or '"editable"' in origin:
            return None
        found[name] = hashlib.sha256(f"{library.version}\n{record}".encode()).hexdigest()
    return found


def _own_code() -> str | None:
    """sha256 of this package's files; None where they are not to be had."""
    digest = hashlib.sha256()
    try:
        for path in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    except OSError:
        return None
    return digest.hexdigest()


def _known(entry: Entry) -> Known | None:
    facts = entry.facts
    try:
        path = facts["weights_path"]
        weights = Weights(
            facts["weights"], facts["weights_sha256"], seed=facts["weights_seed"], path=Path(path) if path else None
        )
        preprocess = Preprocess.from_settings(facts["preprocess"])
        return Known(facts["backbone"], weights, preprocess, tuple(facts["shape"]), facts["versions"])
    except (KeyError, TypeError):
        return None


def _still_holds(weights: Weights, spec: str) -> bool:
    """Whether loading `spec` would give `weights`."""
    try:
        if random_seed(spec) is not None:
            return True
        if is_file(spec):
            return hashlib.sha256(read_file(spec)).hexdigest() == weights.sha256
        if weights.path is None:
            return False
        with weights.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == weights.sha256
    except (PipelineError, OSError):
        return False  # loading it tells why
