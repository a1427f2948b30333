"""Embeddings computed again from their images, for what only another computation can show."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.backbones import build_backbone
from pipeline.core.config import DECODES
from pipeline.core.errors import SampleError, SettingsError, ShardError
from pipeline.core.redact import describe
from pipeline.core.schema import EMBEDDING, IMAGE_ID, SAMPLE_INDEX
from pipeline.core.storage import join, read_bytes
from pipeline.decoding.decoder import Decoder
from pipeline.embedding.recipe import recipe_of
from pipeline.output.fingerprint import Fingerprint
from pipeline.output.names import EMBEDDINGS, PartName
from pipeline.output.parts import vectors
from pipeline.shards.find import Shard
from pipeline.shards.keys import Naming
from pipeline.shards.peek import images
from pipeline.verify.findings import Progress, Verdict, few
from pipeline.verify.parts import PIECE_BYTES

RECOMPUTE_IMAGES = 8
# Least cosine of a stored embedding with the same computed again in fp32; where the run computed or stored
# it in fewer bits, or decoded on its devices.
_COSINE = 0.9999
_COSINE_REDUCED = 0.999
# Another row this many times nearer than a row's own: the two are swapped, not merely alike.
_NEARER = 2.0


@dataclass(frozen=True)
class Recompute:
    """How many embeddings to compute again (None: all), drawn by `seed`, and with which weights.

    Without `weights` those that run.json names are used. Where they cannot be had that is an error if
    they are `required`, else a note.
    """

    num_images: int | None = RECOMPUTE_IMAGES
    weights: str | None = None
    seed: int = 0
    required: bool = False


class Source(NamedTuple):
    """A part to draw rows from, and the shard that it was made of."""

    name: PartName
    shard: Shard
    num_rows: int


class Model:
    """An encoded image to features, with plain eager torch in fp32 on CPU, one step after the other."""

    def __init__(self, made: Fingerprint, spec: str | None) -> None:
        recipe = recipe_of(made, spec)
        settings, network = recipe.settings, recipe.network
        preprocess = network.preprocess
        self._decoder = Decoder(settings.rules)
        self._backbone = build_backbone(network.backbone, recipe.weights, network.features, preprocess.crop).eval()
        self._mean = torch.tensor(preprocess.mean)[:, None, None]
        self._std = torch.tensor(preprocess.std)[:, None, None]
        self._normalize = network.normalize
        is_full = (settings.precision, settings.dtype, settings.decode) == ("fp32", "float32", "cpu")
        self.least_cosine = _COSINE if is_full else _COSINE_REDUCED
        # Rows of the same picture, one decoded by a device and one not, are as far apart as the decoders are.
        self.apart = 0.0 if settings.decode == DECODES[0] else math.sqrt(2 * (1 - self.least_cosine))

    def embed(self, image: bytes) -> np.ndarray[Any, Any]:
        """float32 features [C] of an encoded image, a feature map's as [C * H * W]. Raises `SampleError`."""
        pixels = torch.from_numpy(np.array(self._decoder.decode(image)))
        with torch.inference_mode():
            scaled = (pixels.permute(2, 0, 1).float() / 255.0 - self._mean) / self._std
            features = self._backbone(scaled[None]).flatten()
        values: np.ndarray[Any, Any] = (features / features.norm() if self._normalize else features).numpy()
        return values


def make_model(made: Fingerprint, recompute: Recompute, verdict: Verdict) -> Model | None:
    """The model that `made` names, or None with a note. Raises `SettingsError` where it is required."""
    try:
        return Model(made, recompute.weights)
    except SettingsError as error:
        if recompute.required:
            raise SettingsError(f"cannot compute embeddings again: {error}") from error
        verdict.notes.append(f"no embedding was computed again: {error}")
        return None


def draw(sources: list[Source], recompute: Recompute) -> list[tuple[Source, list[int]]]:
    """Rows to compute again, each as likely as any other, by part."""
    starts = list(itertools.accumulate((source.num_rows for source in sources), initial=0))
    count = starts[-1] if recompute.num_images is None else min(recompute.num_images, starts[-1])
    rows: dict[int, list[int]] = defaultdict(list)
    for number in sorted(random.Random(recompute.seed).sample(range(starts[-1]), count)):
        position = bisect.bisect_right(starts, number) - 1
        rows[position].append(number - starts[position])
    return [(sources[position], found) for position, found in rows.items()]


def recompute_rows(
    output: str,
    naming: Naming,
    model: Model,
    drawn: list[tuple[Source, list[int]]],
    verdict: Verdict,
    on_progress: Progress,
) -> None:
    """Compute the drawn rows again, part by part."""
    total = sum(len(rows) for _, rows in drawn)
    cosines: list[float] = []
    for source, rows in drawn:
        file = f"{EMBEDDINGS}/{source.name}"
        try:
            data = read_bytes(join(output, file))
            table = pq.read_table(pa.BufferReader(data), columns=[IMAGE_ID, SAMPLE_INDEX, EMBEDDING])
            ids, indices = table.column(IMAGE_ID).to_pylist(), table.column(SAMPLE_INDEX).to_pylist()
            values = vectors(table).reshape(len(table), -1)
            encoded = images(source.shard, naming, {indices[row] for row in rows})
        except (pa.ArrowException, OSError, ShardError) as error:
            verdict.find(file, "recompute", f"cannot be read again: {describe(error)}")
            continue
        faults: list[str] = []
        for row in rows:
            fault, cosine = _disagreement(model, encoded.get(indices[row]), values, ids, row)
            if fault is not None:
                faults.append(f"image_id {ids[row]!a}: {fault}")
            if cosine is not None:
                cosines.append(cosine)
            verdict.recomputed += 1
            on_progress("recomputed", verdict.recomputed, total)
        if faults:
            value = f"{len(faults)} of {len(rows)} rows: {few(faults, separator='; ')}"
            verdict.find(file, "recompute", value)
    verdict.lowest_cosine = min(cosines, default=None)


def _disagreement(
    model: Model, image: bytes | None, values: np.ndarray[Any, Any], ids: list[str], row: int
) -> tuple[str | None, float | None]:
    """How a row of a part's `values` [N, C] differs from the embedding of its image, and their cosine.

    Cosine alone does not tell images apart where all embeddings are nearly alike, as those of random
    weights are; so no other row of the part may be much nearer either. Of an output that was decoded by devices,
    what is nearer than `Model.apart` may be the decoder's.
    """
    if image is None:
        return "its sample has no image in the tar", None
    try:
        embedded = model.embed(image)
    except SampleError as error:
        return f"its image cannot be decoded: {error}", None
    own = values[row].astype(np.float32)
    lengths = float(np.linalg.norm(own) * np.linalg.norm(embedded))
    cosine = float(own @ embedded) / lengths if 0.0 < lengths < math.inf else 0.0
    distances = _distances(values, embedded)
    nearest = int(distances.argmin())
    if distances[row] > max(_NEARER * distances[nearest], model.apart * float(np.linalg.norm(embedded))):
        return f"its image's embedding is that of {ids[nearest]!a}", cosine
    if not cosine >= model.least_cosine:
        return f"cosine {cosine:.6f} with its image's, not {model.least_cosine} or more", cosine
    return None, cosine


def _distances(values: np.ndarray[Any, Any], embedded: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """L2 distances of rows [N, C] to one embedding [C]; infinite where a row is not finite."""
    rows = max(1, PIECE_BYTES // embedded.nbytes)
    pieces = [
        np.linalg.norm(values[start : start + rows].astype(np.float32) - embedded, axis=1)
        for start in range(0, len(values), rows)
    ]
    distances: np.ndarray[Any, Any] = np.nan_to_num(np.concatenate(pieces), nan=np.inf, posinf=np.inf)
    return distances
