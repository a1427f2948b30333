"""Images of stored rows are read from their shards, wherever these are, for as long as they are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from shard_embedder.pipeline.core.errors import ShardError
from shard_embedder.pipeline.core.writing import write_bytes
from shard_embedder.pipeline.output.names import version_tag
from shard_embedder.pipeline.pages.stored_images import StoredImages
from shard_embedder.pipeline.shards.find import find_shards
from shard_embedder.pipeline.shards.keys import Naming
from tests.conftest import encode, photo, write_tar


def test_an_image_is_read_by_its_shard_and_position(place: str, tmp_path: Path) -> None:
    images = [encode(photo(seed)) for seed in range(3)]
    members = [
        ("a.jpg", images[0]),
        ("a.json", b"{}"),
        ("b.txt", b"no image"),
        ("c.jpg", images[1]),
        ("d.jpg", images[2]),
    ]
    write_bytes(place, "s.tar", write_tar(tmp_path / "s.tar", members).read_bytes())
    tags = {shard.name: version_tag(shard.num_bytes, shard.version) for shard in find_shards([place]).shards}
    stored = StoredImages([], Naming(), tags.get, place)
    assert [stored.image(("s", index)) for index in (3, 0, 2, 0)] == [images[2], images[0], images[1], images[0]]
    for index in (1, 4, 1000):
        with pytest.raises(ShardError, match=r"^its sample has no image in the shard$"):
            stored.image(("s", index))
    with pytest.raises(ShardError, match=r"^its shard is not in this input$"):
        stored.image(("t", 0))
    with pytest.raises(ShardError, match=r"^its shard has changed since it was embedded$"):
        StoredImages(find_shards([place]).shards, Naming(), {"s": "another"}.get, "").image(("s", 0))
    # Of the same size.
    members[0] = ("A.jpg", images[0])
    write_bytes(place, "s.tar", write_tar(tmp_path / "s.tar", members).read_bytes())
    with pytest.raises(ShardError, match=r"^its shard cannot be read: ShardChangedError: changed while it was read"):
        stored.image(("s", 0))
