"""The live search page and its answers: an image, or a row of an index, and what is nearest to it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.formatting import format_size
from shard_embedder.pipeline.embedding.queries import QueryEmbedder
from shard_embedder.pipeline.output.names import Place
from shard_embedder.pipeline.pages.html import data_url, render, show
from shard_embedder.pipeline.pages.previews import Preview, preview, shown
from shard_embedder.pipeline.pages.stored_images import StoredImages
from shard_embedder.pipeline.retrieval.index import Index
from shard_embedder.pipeline.retrieval.search import score_name
from shard_embedder.pipeline.shards.find import Shard

# Of each answer. The page shows as many of them as its slider says.
MAX_NEAR = 50
NUM_NEAR = 12

Answer = dict[str, Any]


class LiveSearch:
    """Answers for the page, of texts that a browser may show; calls may come from several threads."""

    def __init__(self, index: Index, embedder: QueryEmbedder, stored: StoredImages) -> None:
        self.num_rows = index.facts.num_rows
        self._index = index
        self._embedder = embedder
        self._stored = stored
        # Whose turn it is to ask the index.
        self._turn = threading.Lock()

    def by_image(self, image: bytes) -> Answer:
        """The neighbours of an encoded image, and the image made small.

        Raises:
            SampleError: it cannot be embedded.
        """
        near = self._near(image, None)
        return {"query": _picture(preview(image)), "near": near}

    def by_row(self, row: int) -> Answer:
        """The neighbours of a row, without itself. Its image is embedded anew: not every kind of index can give it.

        Raises:
            ShardError, SampleError: its image cannot be read, or embedded.
        """
        name, place = self._name(row)
        image = self._stored.image(place)
        return {
            "query": {"name": show(name), "place": show(shown(place)), **_picture(preview(image))},
            "near": self._near(image, row),
        }

    def picture(self, row: int) -> Answer:
        """The image of a row made small, or the reason why there is none."""
        try:
            return _picture(preview(self._stored.image(self._name(row)[1])))
        except ShardError as error:
            return _picture(Preview(None, str(error)))

    def page(self, max_bytes: int) -> Markup:
        """The page, for images of at most `max_bytes`."""
        facts = self._index.facts
        values = {
            "kind": "live",
            "backbone": facts.made.settings.backbone,
            "weights": facts.made.versions.get("weights", "?"),
            "output": facts.output,
            "numbers": [
                ("embeddings in the index", f"{facts.num_rows:,}"),
                ("index", facts.kind),
                ("recall@10 of the index", f"{facts.recall:.3f}"),
            ],
            "links": [],
            "max_bytes": max_bytes,
            "max_near": min(MAX_NEAR, facts.num_rows),
            "num_near": min(NUM_NEAR, facts.num_rows),
        }
        return render("live.html.j2", values)

    def _name(self, row: int) -> tuple[str, Place]:
        with self._turn:
            image_id, shard, sample_index = self._index.names([row])[row]
        return image_id, (shard, sample_index)

    def _near(self, image: bytes, own_row: int | None) -> list[Answer]:
        """The rows nearest to an image, nearest first, without `own_row`."""
        queries = self._embedder.embed(image)[None]
        with self._turn:
            scores, rows = self._index.search_rows(queries, min(MAX_NEAR + 1, self.num_rows))
            found = [
                (row, score)
                for row, score in zip(rows[0].tolist(), scores[0].tolist(), strict=True)
                if row not in (own_row, -1)
            ][:MAX_NEAR]
            names = self._index.names(row for row, _ in found)
        metric = self._index.facts.metric
        # The score that fills a bar.
        full = 1.0 if metric == "cosine" else max((abs(score) for _, score in found), default=0.0) or 1.0
        return [
            {
                "row": row,
                "score": f"{score_name(metric)} {score:.4f}",
                "bar": min(max(score / full, 0.0), 1.0),
                "name": show(image_id),
                "place": show(shown((shard, sample_index))),
            }
            for row, score in found
            for image_id, shard, sample_index in [names[row]]
        ]


def open_live_search(
    index: Index, shards: Sequence[Shard] = (), weights: str | None = None, device: str = "auto"
) -> LiveSearch:
    """Searches of an index whose images are read from `shards`.

    Without any, they are looked for where they were embedded.

    Raises:
        InputError: no shard is found.
        WeightsError, SettingsError: as `QueryEmbedder` does.
    """
    made = index.facts.made
    stored = StoredImages(shards, made.settings.naming, index.tag, made.input_prefix)
    # One image at a time: a batch would take as long as all of its images.
    return LiveSearch(index, QueryEmbedder(made, weights, device, batch_size=1), stored)


def _picture(found: Preview) -> Answer:
    if found.jpeg is None:
        return {"jpeg": None, "reason": show(found.reason)}
    size = f"{found.width:,} \N{MULTIPLICATION SIGN} {found.height:,} px, {format_size(found.num_bytes)}"
    return {"jpeg": data_url(found.jpeg), "size": size}
