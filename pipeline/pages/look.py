"""What the embeddings of an output look like: lengths, a map and a gallery, as sections of a run's page."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.core.formatting import format_count, format_share
from pipeline.pages.charts import Axis, axis, bars, dots, number, plot, round_step
from pipeline.pages.html import Tile, figure, safe, shown
from pipeline.pages.previews import Preview, preview, read_fronts
from pipeline.pages.sample import SEED, Near, Numbers, Plane, Sample, evenly, neighbours, norms, plane
from pipeline.shards.find import Shard
from pipeline.shards.keys import Naming

NUM_QUERIES = 6
NUM_NEAR = 5
MAX_PICTURES = 150
MAX_SHARDS = 8
MAX_BYTES = 64 * 2**20
MAX_S = 10.0
_SIDE = 128
# Norms that differ by less than this part of themselves are told, and not drawn.
_SAME = 1e-3
_NUM_BARS = 24
# Of the map: width by height, and what is left free around the points.
_RATIO = 4 / 3
_MARGIN = 1.12
STYLE = """
.look { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 3fr); gap: 1rem; align-items: start; }
.look > div { min-width: 0; }
.map .area { height: auto; aspect-ratio: 4 / 3; border-bottom-color: var(--line); }
.pt { position: absolute; width: 10px; height: 10px; margin: -5px 0 0 -5px; border-radius: 50%; cursor: pointer;
  background: var(--accent); box-shadow: 0 0 0 1.5px var(--card); }
.pt input { position: absolute; inset: -6px; width: 22px; height: 22px; margin: 0; opacity: 0; cursor: pointer; }
.pt .tip { display: none; position: absolute; z-index: 3; width: 142px; padding: 6px; border-radius: 8px;
  line-height: 1.3; background: var(--card); color: var(--ink); border: 1px solid var(--soft);
  box-shadow: 0 4px 16px #0005; overflow-wrap: anywhere; pointer-events: none; }
.pt .tip img { margin-bottom: 4px; }
.pt .r { left: 18px; } .pt .l { right: 18px; } .pt .d { top: -10px; } .pt .u { bottom: -10px; }
.pt:hover, .pt:focus-within, .pt:has(:checked) { z-index: 4;
  box-shadow: 0 0 0 2px var(--card), 0 0 0 4px var(--accent); }
.pt:hover .tip, .pt:focus-within .tip, .pt:has(:checked) .tip { display: block; }
.map:has(.pt:hover) .pt:not(:hover) .tip { display: none; }
.map:not(:has(.pt:hover)):has(.pt:focus-within) .pt:not(:focus-within) .tip { display: none; }
.hide { display: inline-flex; gap: .4rem; align-items: center; font-size: 13px; color: var(--soft); cursor: pointer; }
.hide input { accent-color: var(--accent); }
.near { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .7rem; padding: .9rem 0; }
.near + .near { border-top: 1px solid var(--line); }
.near .head img, .near .head .none { outline: 3px solid var(--accent); outline-offset: -3px; }
.near .head figcaption::before { content: "query "; color: var(--accent); font-weight: 600; }
@media (max-width: 860px) { .look { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) { .near { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .near figcaption { font-size: 12px; } .near small { font-size: 11px; } .dots { stroke-width: 3; }
  .pt { width: 8px; height: 8px; margin: -4px 0 0 -4px; } .pt .tip { width: 122px; } }
"""


@dataclass(frozen=True)
class Pictures:
    """What is shown of a sample: by its row a picture, the rows that have one, and what the gallery holds."""

    previews: dict[int, Preview]
    gallery: list[Near]
    num_in_reach: int
    faults: list[str]

    def of(self, row: int) -> Preview:
        """The picture of a row, or why there is none."""
        return self.previews.get(row, Preview(None, "its image was not read"))


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
    order += np.random.default_rng(SEED).permutation(pool).tolist()
    found: dict[int, Preview] = {}
    ends = time.monotonic() + MAX_S
    for row in dict.fromkeys(order):
        image = fronts.images.get(sample.places[row])
        if image is not None and len(found) < MAX_PICTURES:
            late = time.monotonic() > ends
            found[row] = Preview(None, f"not drawn within {MAX_S:.0f} s") if late else preview(image, _SIDE)
    faults = [f"no pictures of shard {name}: {reason}" for name, reason in fronts.reasons.items()]
    return Pictures(found, gallery, len(searched), faults)


def told(sample: Sample) -> str:
    """Where the sample is from, in words."""
    parts = f"{format_count(sample.num_read, 'part')} of {sample.num_stored:,} that are stored"
    more = " (there are more, which were not listed)" if sample.is_cut else ""
    maps = " Feature maps are averaged over their grid here." if sample.is_map else ""
    return (
        f"{format_count(len(sample.ids), 'embedding')} from the fronts of {parts}{more}: a look, and no "
        f"measure of the whole.{maps}"
    )


def lengths(sample: Sample) -> str:
    """The lengths of the embeddings as a histogram."""
    values = norms(sample.vectors)
    low, middle, high = float(values.min()), float(np.median(values)), float(values.max())
    if high - low <= _SAME * high:
        alike = f"The embedding has length {number(middle)}." if len(values) == 1 else ""
        return f"<p>{alike or f'All {len(values):,} have length {number(middle)}, to one part in a thousand.'}</p>"
    step = round_step((high - low) / _NUM_BARS)
    first, last = int(np.floor(low / step)), int(np.floor(high / step)) + 1
    edges = [at * step for at in range(first, last + 1)]
    places = np.clip((values / step).astype(np.int64) - first, 0, last - first - 1)
    counts = np.bincount(places, minlength=last - first).tolist()
    x = axis("L2 norm of the embedding (no unit)", edges[0], edges[-1], 5, tight=True)
    y = axis("embeddings", 0.0, max(counts), 4)
    said = f"from {number(low)} to {number(high)}, median {number(middle)}"
    zeros = int((values == 0).sum())
    zero = f" {format_count(zeros, 'embedding')} of length 0." if zeros else ""
    chart = plot(x, y, bars(x, y, edges, counts, gap=4), "11rem", f"Histogram of the lengths of embeddings: {said}")
    return f"<p>Lengths {safe(said)}.{zero}</p>{chart}"


def map_of(sample: Sample, pictures: Pictures) -> str:
    """The sample on its first two principal components, with pictures of some."""
    found = plane(sample.vectors)
    if found is None:
        many = len(sample.ids) > 1
        return f"<p>{'All embeddings of the sample are equal' if many else 'One embedding'}: there is no map.</p>"
    x, y = _axes(found)
    shared = sum(found.explained)
    said = (
        f"The first two principal components (PCA) of the embeddings, scaled to length 1: {format_share(shared)} of "
        "the variance lies in this plane"
    )
    pictured = [row for row, picture in pictures.previews.items() if picture.url is not None]
    others = [(left, up) for left, up in found.points.tolist()]
    over = "".join(_point(sample, pictures, row, found.points, x, y) for row in pictured)
    chart = plot(x, y, dots(x, y, others), "auto", f"Map of {format_count(len(others), 'embedding')}: {said}", over)
    hint = (
        '<label class="hide"><input type="radio" name="map" checked> no picture</label>'
        if pictured
        else "<p>No pictures.</p>"
    )
    ask = f" Point at, tap or focus one of the {len(pictured)} larger dots to see its image." if pictured else ""
    return f'<p>{safe(said)}.{ask}</p><div class="map">{chart}{hint}</div>'


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


def _point(sample: Sample, pictures: Pictures, row: int, points: Numbers, x: Axis, y: Axis) -> str:
    left, up = x.share(float(points[row, 0])), y.share(float(points[row, 1]))
    side = ("r" if left < 0.5 else "l") + " " + ("d" if up > 0.5 else "u")
    name = safe(sample.ids[row], 80)
    return (
        f'<label class="pt" style="left:{100 * left:.2f}%;top:{100 - 100 * up:.2f}%">'
        f'<input type="radio" name="map" aria-label="{name}"><span class="tip {side}">'
        f'<img src="{pictures.previews[row].url}" alt="">{name}<br>'
        f"<small>{safe(shown(sample.places[row]), 80)}</small></span></label>"
    )


def gallery(sample: Sample, pictures: Pictures) -> str:
    """Queries, each with its nearest."""
    if not pictures.gallery:
        return "<p>Too few embeddings for neighbours.</p>"
    queries = f"{format_count(len(pictures.gallery), 'embedding')} drawn at random (with a fixed seed), "
    among = f"among the {pictures.num_in_reach:,} of this sample whose images were read"
    if not any(picture.url for picture in pictures.previews.values()):
        among = f"among the {pictures.num_in_reach:,} of this sample; no images could be read"
    rows = "".join(f'<div class="near">{_tiles(sample, pictures, near)}</div>' for near in pictures.gallery)
    return f"<p>{queries}each with its nearest by cosine, {among}.</p>{rows}"


def _tiles(sample: Sample, pictures: Pictures, near: Near) -> str:
    head = Tile(_short(sample.ids[near.row]), _short(shown(sample.places[near.row])), pictures.of(near.row))
    tiles = [Tile(f"cosine {cosine:.3f}", _short(sample.ids[row]), pictures.of(row)) for row, cosine in near.others]
    return figure(head, "head") + "".join(figure(tile, "other") for tile in tiles)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def faults(texts: Iterable[str]) -> str:
    """What could not be shown, as notes."""
    return "".join(f'<p class="note">{safe(text)}</p>' for text in texts)
