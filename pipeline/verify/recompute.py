"""Computes embeddings again from their images, to show what no check of the stored data can."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shard_embedder.pipeline.backbones import build_backbone
from shard_embedder.pipeline.core.config import device_share
from shard_embedder.pipeline.core.errors import SampleError, SettingsError, ShardError
from shard_embedder.pipeline.core.progress import Progress
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.schema import EMBEDDING, IMAGE_ID, SAMPLE_INDEX
from shard_embedder.pipeline.core.storage import join, read_bytes
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.embedding.recipe import recipe_of
from shard_embedder.pipeline.output.fingerprint import Fingerprint
from shard_embedder.pipeline.output.names import EMBEDDINGS, PartName
from shard_embedder.pipeline.output.parts import vectors
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.peek import images
from shard_embedder.pipeline.verify.findings import Verdict, first_few
from shard_embedder.pipeline.verify.parts import PIECE_BYTES

RECOMPUTE_IMAGES = 8
# Least cosine of a stored embedding with the one computed again in fp32.
_COSINE = 0.9999
# The same, for a run that computed or stored in fewer bits, or decoded on its devices.
_COSINE_REDUCED = 0.999
# If another row is this many times nearer than the row itself, the two are swapped, not merely alike.
_NEARER = 2.0


@dataclass(frozen=True)
class Recompute:
    """How many embeddings to compute again (None: all), drawn by `seed`, and with which weights.

    The default weights are those that run.json names. If they cannot be loaded, that is an error if the
    recomputation is `required`, else a note.
    """

    num_images: int | None = RECOMPUTE_IMAGES
    weights: str | None = None
    seed: int = 0
    required: bool = False


class ShardPart(NamedTuple):
    """A part to draw rows from, and its shard."""

    name: PartName
    shard: Shard
    num_rows: int


class Reference:
    """Computes the embedding of an encoded image with plain eager torch in fp32 on CPU."""

    def __init__(self, made: Fingerprint, spec: str | None) -> None:
        # torch takes seconds to import: verify without --input does not need it.
        import torch  # noqa: PLC0415

        recipe = recipe_of(made, spec)
        settings, network = recipe.settings, recipe.network
        preprocess = network.preprocess
        on_device = device_share(settings.decode) > 0
        # A device embeds a JPEG that is damaged inside its data: no look at its markers finds that.
        self._decoder = Decoder(replace(settings.rules, accept_damaged=settings.accept_damaged or on_device))
        self._backbone = build_backbone(network.backbone, recipe.weights, network.features, preprocess.crop).eval()
        self._mean = torch.tensor(preprocess.mean)[:, None, None]
        self._std = torch.tensor(preprocess.std)[:, None, None]
        self._normalize = network.normalize
        is_full = (settings.precision, settings.dtype, on_device) == ("fp32", "float32", False)
        self.least_cosine = _COSINE if is_full else _COSINE_REDUCED
        # A device's decoder and the CPU's give embeddings of one image that are this far apart at most.
        self.apart = math.sqrt(2 * (1 - self.least_cosine)) if on_device else 0.0

    def embed(self, image: bytes) -> np.ndarray[Any, Any]:
        """float32 features [C] of an encoded image, a feature map's as [C * H * W]. Raises `SampleError`."""
        import torch  # noqa: PLC0415

        pixels = torch.from_numpy(np.array(self._decoder.decode(image)))
        with torch.inference_mode():
            scaled = (pixels.permute(2, 0, 1).float() / 255.0 - self._mean) / self._std
            features = self._backbone(scaled[None]).flatten()
        values: np.ndarray[Any, Any] = (features / features.norm() if self._normalize else features).numpy()
        return values


def build_reference(made: Fingerprint, recompute: Recompute, verdict: Verdict) -> Reference | None:
    """The network that `made` records, or None with a note. Raises `SettingsError` if it is required."""
    try:
        return Reference(made, recompute.weights)
    except SettingsError as error:
        if recompute.required:
            raise SettingsError(f"cannot compute embeddings again: {error}") from error
        verdict.notes.append(f"no embedding was computed again: {error}")
        return None


def draw_rows(sources: list[ShardPart], recompute: Recompute) -> list[tuple[ShardPart, list[int]]]:
    """Draw the rows to compute again, every row with the same probability; by part."""
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
    reference: Reference,
    drawn: list[tuple[ShardPart, list[int]]],
    verdict: Verdict,
    on_progress: Progress,
) -> None:
    """Compute the drawn rows again, and add to the verdict where they differ."""
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
            verdict.add_finding(file, "recompute", f"cannot be read again: {describe(error)}")
            continue
        faults: list[str] = []
        for row in rows:
            fault, cosine = _disagreement(reference, encoded.get(indices[row]), values, ids, row)
            if fault is not None:
                faults.append(f"image_id {ids[row]!a}: {fault}")
            if cosine is not None:
                cosines.append(cosine)
            verdict.recomputed += 1
            on_progress("recomputed", verdict.recomputed, total)
        if faults:
            value = f"{len(faults)} of {len(rows)} rows: {first_few(faults, separator='; ')}"
            verdict.add_finding(file, "recompute", value)
    verdict.lowest_cosine = min(cosines, default=None)


def _disagreement(
    reference: Reference, image: bytes | None, values: np.ndarray[Any, Any], ids: list[str], row: int
) -> tuple[str | None, float | None]:
    """How a row of a part's `values` [N, C] differs from the embedding of its image, and their cosine.

    With random weights all embeddings have nearly the same direction, and their cosine shows little. So no other
    row of the part may be much nearer to the image's embedding. Distances up to `Reference.apart` come from the
    decoder of a device.
    """
    if image is None:
        return "its sample has no image in the tar", None
    try:
        embedded = reference.embed(image)
    except SampleError as error:
        return f"its image cannot be decoded: {error}", None
    own = values[row].astype(np.float32)
    lengths = float(np.linalg.norm(own) * np.linalg.norm(embedded))
    cosine = float(own @ embedded) / lengths if 0.0 < lengths < math.inf else 0.0
    distances = _distances(values, embedded)
    nearest = int(distances.argmin())
    if distances[row] > max(_NEARER * distances[nearest], reference.apart * float(np.linalg.norm(embedded))):
        return f"its image's embedding is that of {ids[nearest]!a}", cosine
    if not cosine >= reference.least_cosine:
        return f"cosine {cosine:.6f} with its image's, not {reference.least_cosine} or more", cosine
    return None, cosine


def _distances(values: np.ndarray[Any, Any], embedded: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """L2 distances of rows [N, C] to one embedding [C]; infinite for a row that is not finite."""
    rows = max(1, PIECE_BYTES // embedded.nbytes)
    pieces = [
        np.linalg.norm(values[start : start + rows].astype(np.float32) - embedded, axis=1)
        for start in range(0, len(values), rows)
    ]
    distances: np.ndarray[Any, Any] = np.nan_to_num(np.concatenate(pieces), nan=np.inf, posinf=np.inf)
    return distances
