"""What the embeddings of an output look like: lengths, a map and a gallery, as sections of a run's page."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from shard_embedder.pipeline.core.formatting import format_share
from shard_embedder.pipeline.pages.charts import Axis, axis, round_step
from shard_embedder.pipeline.pages.html import cut, render_or_reason
from shard_embedder.pipeline.pages.previews import Preview, Tile, preview, read_fronts, shown
from shard_embedder.pipeline.pages.sample import (
    SEED,
    Near,
    Plane,
    Sample,
    evenly,
    neighbours,
    norms,
    plane,
    take_sample,
)
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.keys import Naming

NUM_QUERIES = 6
NUM_NEAR = 5
MAX_PICTURES = 150
MAX_SHARDS = 8
MAX_BYTES = 64 * 2**20
MAX_S = 10.0
# Of a picture on the map, in pixels.
_SIDE = 128
# Norms that differ by less than this part of themselves are told, and not drawn.
_SAME = 1e-3
_NUM_BARS = 24
# Of the map: width by height, and what is left free around the points.
_RATIO = 4 / 3
_MARGIN = 1.12


@dataclass(frozen=True)
class Pictures:
    """What is shown of a sample: pictures by their rows, small for the map and large for the gallery."""

    small: dict[int, Preview]
    large: dict[int, Preview]
    gallery: list[Near]
    num_in_reach: int
    faults: list[str]

    def of(self, row: int) -> Preview:
        """The picture of a row of the gallery, or why there is none."""
        return self.large.get(row, Preview(None, "its image was not read"))


def take_pictures(sample: Sample, shards: Mapping[str, Shard], naming: Naming) -> Pictures:
    """At most `MAX_PICTURES` pictures from the fronts of at most `MAX_SHARDS` shards, and neighbours among these.

    `MAX_BYTES` are read and `MAX_S` seconds waited for, and as long again drawn. Neighbours are looked for among the
    rows whose images were read, so that each can be shown; where hardly any were, among all.
    """
    named = evenly([name for name in dict.fromkeys(name for name, _ in sample.places) if name in shards], MAX_SHARDS)
    wanted: dict[str, set[int]] = {name: set() for name in named}
    for name, index in sample.places:
        if name in wanted:
            wanted[name].add(index)
    fronts = read_fronts(shards, naming, wanted, MAX_BYTES, MAX_S)
    pool = [row for row, place in enumerate(sample.places) if place in fronts.images]
    searched = pool if len(pool) > NUM_NEAR else range(len(sample.ids))
    gallery = neighbours(sample.vectors, searched, NUM_QUERIES, NUM_NEAR)
    order = [row for near in gallery for row in (near.row, *(other for other, _ in near.others))]
    num_gallery = len(dict.fromkeys(order))
    order += np.random.default_rng(SEED).permutation(pool).tolist()
    small: dict[int, Preview] = {}
    large: dict[int, Preview] = {}
    ends = time.monotonic() + MAX_S
    for number, row in enumerate(dict.fromkeys(order)):
        image = fronts.images.get(sample.places[row])
        if image is None or len(small) == MAX_PICTURES:
            continue
        late = Preview(None, f"not drawn within {MAX_S:.0f} s") if time.monotonic() > ends else None
        small[row] = late or preview(image, _SIDE)
        if number < num_gallery:
            large[row] = late or preview(image)
    faults = [f"no pictures of shard {name}: {reason}" for name, reason in fronts.reasons.items()]
    return Pictures(small, large, gallery, len(searched), faults)


def section(output: str, shards: Mapping[str, Shard], opened: Collection[str], naming: Naming) -> Markup:
    """What the stored embeddings look like, as HTML; pictures are of the shards that are `opened`."""

    def make() -> dict[str, Any]:
        sample = take_sample(output, shards, opened)
        if not sample.ids:
            return {"sample": sample, "faults": sample.faults}
        pictures = take_pictures(sample, {name: shards[name] for name in opened if name in shards}, naming)
        return {
            "sample": sample,
            "faults": sample.faults + pictures.faults,
            "map": render_or_reason("map.html.j2", lambda: _map(sample, pictures)),
            "norms": render_or_reason("norms.html.j2", lambda: _norms(sample)),
            "gallery": render_or_reason("gallery.html.j2", lambda: _gallery(sample, pictures, bool(opened))),
        }

    return render_or_reason("look.html.j2", make)


def _norms(sample: Sample) -> dict[str, Any]:
    values = norms(sample.vectors)
    low, high = float(values.min()), float(values.max())
    found = {"count": len(values), "median": float(np.median(values))}
    if high - low <= _SAME * high:
        return found | {"edges": []}
    step = round_step((high - low) / _NUM_BARS)
    first, last = int(np.floor(low / step)), int(np.floor(high / step)) + 1
    edges = [at * step for at in range(first, last + 1)]
    places = np.clip((values / step).astype(np.int64) - first, 0, last - first - 1)
    heights = np.bincount(places, minlength=last - first).tolist()
    return found | {
        "low": low,
        "high": high,
        "zeros": int((values == 0).sum()),
        "edges": edges,
        "heights": heights,
        "x": axis("L2 norm of the embedding (no unit)", edges[0], edges[-1], 5, tight=True),
        "y": axis("embeddings", 0.0, max(heights), 4),
    }


def _map(sample: Sample, pictures: Pictures) -> dict[str, Any]:
    found = plane(sample.vectors)
    if found is None:
        return {"count": len(sample.ids), "points": []}
    x, y = _axes(found)
    points = found.points.tolist()
    return {
        "count": len(points),
        "points": points,
        "explained": sum(found.explained),
        "x": x,
        "y": y,
        "pictured": [
            {
                "left": x.share(points[row][0]),
                "up": y.share(points[row][1]),
                "id": sample.ids[row],
                "place": shown(sample.places[row]),
                "jpeg": preview.jpeg,
            }
            for row, preview in pictures.small.items()
            if preview.jpeg is not None
        ],
    }


def _axes(found: Plane) -> tuple[Axis, Axis]:
    """Axes of one scale, so that distances are true: with half as many units again where the map is wider."""
    low, high = found.points.min(axis=0), found.points.max(axis=0)
    middle, half = (low + high) / 2, (high - low) / 2 * _MARGIN
    tall = max(float(half[1]), float(half[0]) / _RATIO)
    labels = [
        f"principal component {n + 1} ({format_share(part)} of the variance)"
        for n, part in enumerate(found.explained)
    ]
    reach = (tall * _RATIO, tall)
    first, second = (
        axis(label, float(at) - to, float(at) + to, most, tight=True)
        for label, at, to, most in zip(labels, middle, reach, (8, 6), strict=True)
    )
    return first, second


def _gallery(sample: Sample, pictures: Pictures, is_opened: bool) -> dict[str, Any]:
    def tile(row: int, label: str) -> Tile:
        return Tile(pictures.of(row), label, cut(sample.ids[row], 60), cut(shown(sample.places[row]), 60))

    return {
        "is_opened": is_opened,
        "rows": [
            [tile(near.row, "query"), *(tile(row, f"cosine {cosine:.3f}") for row, cosine in near.others)]
            for near in pictures.gallery
        ],
        "num_in_reach": pictures.num_in_reach,
        "has_pictures": any(preview.jpeg is not None for preview in pictures.large.values()),
        "MOST": NUM_NEAR,
    }
