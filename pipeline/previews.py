"""Small pictures of samples, read from the shards that they are in."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from pipeline.decode import Decoder, Preprocess
from pipeline.errors import SampleError, ShardError
from pipeline.parts import version_tag
from pipeline.shards import find_shards
from pipeline.storage import describe
from pipeline.verify_tars import images

SIDE = 160
MAX_PIXELS = 178_956_970
_QUALITY = 80
# Mean and standard deviation are for the backbone, and not used here.
_SMALL = Preprocess(SIDE, (SIDE, SIDE), "bicubic", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

Place = tuple[str, int]  # shard and sample_index


class Preview(NamedTuple):
    """A JPEG as a `data:` URL, or the reason why there is none."""

    url: str | None
    reason: str = ""


def preview(image: bytes) -> Preview:
    """The middle square of an encoded image, as the job decodes it."""
    try:
        pixels = Decoder(_SMALL, max_pixels=MAX_PIXELS, ignore_orientation=False).decode(image)
    except SampleError as error:
        return Preview(None, str(error))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    return Preview(f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}")


def previews(
    inputs: Sequence[str],
    image_member: str | None,
    places: Iterable[Place],
    tag_of: Callable[[str], str | None],
) -> dict[Place, Preview]:
    """Previews of samples in the shards that `inputs` name, a reason where one cannot be had or none is named.

    `tag_of` gives the version of a shard that was embedded: of a shard that has changed since, nothing is
    shown. A shard is read once, to the last sample wanted of it.

    Raises:
        InputError: the inputs name no shard.
    """
    if not inputs:
        return dict.fromkeys(places, Preview(None, "no input was named to read it from"))
    shards = {shard.name: shard for shard in find_shards(inputs).shards}
    wanted: dict[str, set[int]] = defaultdict(set)
    for name, index in places:
        wanted[name].add(index)
    found: dict[Place, Preview] = {}
    for name, indices in wanted.items():
        shard = shards.get(name)
        reason, read = "its shard is not in this input", {}
        if shard is not None and version_tag(shard.num_bytes, shard.version) != tag_of(name):
            reason = "its shard has changed since it was embedded"
        elif shard is not None:
            try:
                read, reason = images(shard, image_member, indices), "its sample has no image in the shard"
            except (OSError, ShardError) as error:
                reason = f"its shard cannot be read: {describe(error)}"
        for index in indices:
            found[name, index] = preview(read[index]) if index in read else Preview(None, reason)
    return found
