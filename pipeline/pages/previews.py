"""Small pictures of samples, read from the shards that they are in."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from PIL import Image

from shard_embedder.pipeline.core.config import Config
from shard_embedder.pipeline.core.errors import InputError, SampleError, ShardError
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.core.storage import locate, stat
from shard_embedder.pipeline.core.threads import begin
from shard_embedder.pipeline.decoding.decoder import Decoder
from shard_embedder.pipeline.decoding.preprocess import SQUASH, Preprocess
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.output.names import Place
from shard_embedder.pipeline.pages.stored_images import NO_IMAGE, StoredImages
from shard_embedder.pipeline.shards.find import Shard
from shard_embedder.pipeline.shards.keys import Naming
from shard_embedder.pipeline.shards.peek import images

# Of a picture that can be enlarged, in pixels.
SIDE = 384
_QUALITY = 80


class Preview(NamedTuple):
    """A small JPEG of an image and the image's own size, or the reason why there is none."""

    jpeg: bytes | None
    reason: str = ""
    width: int = 0
    height: int = 0
    num_bytes: int = 0


class Tile(NamedTuple):
    """One image on a page: how it looks, what it is or how near, what it is called, and where it is.

    `href` leads to its file, where it is on this machine.
    """

    preview: Preview
    label: str
    name: str
    place: str
    href: str | None = None


def shown(place: Place) -> str:
    """Where a sample is, for people."""
    return f"{place[0]} [{place[1]}]"


def shrink(image: bytes, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The whole of an encoded image, as the job decodes it, in at most `side` by `side` pixels; its width and height.

    Raises:
        SampleError: it cannot be decoded.
    """
    # Mean and standard deviation are for the backbone, and not used here.
    small = Preprocess(side, (side, side), "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), SQUASH)
    rules = DecodingRules(preprocess=small, max_pixels=Config.max_pixels, accept_damaged=True)
    width, height = Decoder(rules).upright_size(image)
    scale = min(1.0, side / max(width, height))
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    fitting = replace(small, resize=max(shape), crop=shape)
    return Image.fromarray(Decoder(replace(rules, preprocess=fitting)).decode(image)), (width, height)


def preview(image: bytes, side: int = SIDE) -> Preview:
    """The same as a JPEG, or the reason why there is none."""
    try:
        small, (width, height) = shrink(image, side)
    except SampleError as error:
        return Preview(None, str(error))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return Preview(buffer.getvalue(), "", width, height, len(image))


def previews(
    shards: Sequence[Shard],
    naming: Naming,
    places: Iterable[Place],
    tag_of: Callable[[str], str | None],
    prefix: str,
) -> dict[Place, Preview]:
    """Previews of samples in `shards`, a reason where one cannot be had.

    Without any, the shards are those below `prefix`, where they lay when they were embedded. `tag_of` gives the
    version of a shard that was embedded: of a shard that has changed since, nothing is shown. A shard is read once,
    to the last sample wanted of it.
    """
    try:
        stored = StoredImages(shards, naming, tag_of, prefix)
    except InputError as error:
        return dict.fromkeys(places, Preview(None, str(error)))
    wanted: dict[str, set[int]] = defaultdict(set)
    for name, index in places:
        wanted[name].add(index)
    previews: dict[Place, Preview] = {}
    for name, indices in wanted.items():
        shard, read, reason = stored.shard(name), {}, NO_IMAGE
        if isinstance(shard, str):
            reason = shard
        else:
            try:
                read = images(shard, naming, indices)
            except (OSError, ShardError) as error:
                reason = f"its shard cannot be read: {describe(error)}"
        for index in indices:
            previews[name, index] = preview(read[index]) if index in read else Preview(None, reason)
    return previews


class Fronts(NamedTuple):
    """Encoded images from the fronts of shards, and by shard why there are none."""

    images: dict[Place, bytes]
    reasons: dict[str, str]


def read_fronts(
    shards: Mapping[str, Shard],
    naming: Naming,
    wanted: Mapping[str, set[int]],
    max_bytes: int,
    max_s: float,
) -> Fronts:
    """The `wanted` samples of `shards` that lie at their fronts: `max_bytes` are read in all, for `max_s` seconds.

    What a shard that is not read in time, or cannot be, leaves out is told, and never raised.
    """
    fronts = Fronts({}, {})
    if not wanted:
        return fronts
    share = max_bytes // len(wanted)
    reading = {
        begin(partial(_front, shards[name], naming, indices, share), "read-front"): name
        for name, indices in wanted.items()
    }
    # A store that hangs is waited for no longer; its calls end by themselves, or with this process.
    done, late = wait(reading, timeout=max_s)
    for future in late:
        fronts.reasons[reading[future]] = f"not read within {max_s:.0f} s"
    for future in done:
        try:
            found = future.result()
        except (OSError, ShardError) as error:
            fronts.reasons[reading[future]] = describe(error)
            continue
        if not found:
            fronts.reasons[reading[future]] = f"none of the sample's images in its first {share / 2**20:.0f} MiB"
        fronts.images.update({(reading[future], index): image for index, image in found.items()})
    return fronts


def _front(shard: Shard, naming: Naming, indices: set[int], max_bytes: int) -> dict[int, bytes]:
    found = images(shard, naming, indices, max_bytes)
    now = stat(*locate(shard.url))
    if (now.num_bytes, now.version) != (shard.num_bytes, shard.version):
        raise ShardError("it has changed since it was embedded")
    return found
