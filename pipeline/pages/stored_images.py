"""The encoded images of stored rows, read from the shards that they were embedded from."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache

from shard_embedder.pipeline.core.errors import InputError, ShardError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.output.names import Place, version_tag
from shard_embedder.pipeline.shards.find import Shard, shards_below
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.peek import open_tar
from shard_embedder.pipeline.shards.stream import ShardStream

NO_IMAGE = "its sample has no image in the shard"
# Shards of which it is remembered where their images lie: 16 bytes a sample.
_REMEMBERED = 64


class StoredImages:
    """Reads images by shard and sample_index; calls may come from several threads.

    Without `shards`, they are those below `prefix`, where they lay when they were embedded. `tag_of` gives the
    version of a shard that was embedded: of a shard that has changed since, nothing is read.

    Raises:
        InputError: there are none, either.
    """

    def __init__(
        self, shards: Sequence[Shard], naming: Naming, tag_of: Callable[[str], str | None], prefix: str
    ) -> None:
        try:
            found = shards or shards_below(prefix)
        except InputError as error:
            raise InputError(f"no input was named, and {error}") from error
        self._shards = {shard.name: shard for shard in found}
        self._naming = naming
        self._tag_of = tag_of
        self._places = lru_cache(_REMEMBERED)(self._find_images)

    def shard(self, name: str) -> Shard | str:
        """The shard of this name, or the reason why nothing is read of it."""
        shard = self._shards.get(name)
        if shard is None:
            return "its shard is not in this input"
        if version_tag(shard.num_bytes, shard.version) != self._tag_of(name):
            return "its shard has changed since it was embedded"
        return shard

    def image(self, place: Place) -> bytes:
        """The image of a sample. The first of a shard is found by a walk through all of it, others at once.

        Raises:
            ShardError: there is none, or it cannot be read.
        """
        name, index = place
        shard = self.shard(name)
        if isinstance(shard, str):
            raise ShardError(shard)
        try:
            places = self._places(shard)
            offset, num_bytes = places[2 * index : 2 * index + 2] or (0, 0)
            # To its end, and no further: a stream reads ahead.
            with ShardStream(shard.url, offset + num_bytes, shard.version) as stream:
                stream.position = offset
                image = stream.read(num_bytes)
            ShardStream(shard.url, shard.num_bytes, shard.version).check_unchanged()
        except (OSError, ShardError) as error:
            raise ShardError(f"its shard cannot be read: {describe(error)}") from error
        if not image:
            raise ShardError(NO_IMAGE)
        return image

    def _find_images(self, shard: Shard) -> array[int]:
        """Offset and size of each sample's image, one after the other; a sample without an image has zeros."""
        found = array("q")
        with open_tar(shard) as tar:
            for sample in tar.samples(self._naming):
                image = sample.image
                found.extend((image.offset, image.num_bytes) if image is not None and image.has_data else (0, 0))
        return found
