"""The decode stage: encoded images to uint8 RGB pixels, resized and cropped as the weights ask.

Plain JPEGs are decoded here by libjpeg-turbo, to the pixels that Pillow makes: only those in which it finds nothing
to complain of, and whose header bounds what they cost. Whatever else there is goes to the process's child
(`pipeline.decoding.child`), where Pillow judges it, and which it may kill.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.core.schema import (
    IMAGE,
    PIXELS,
    REASON,
    STAGE,
    STAGE_DECODE,
    part_row,
    part_rows,
    pixels_field,
    with_payload,
)
from shard_embedder.pipeline.decoding import child, jpeg
from shard_embedder.pipeline.decoding.rules import DecodingRules
from shard_embedder.pipeline.decoding.scaled import eighths_for, fit
from shard_embedder.pipeline.decoding.versions import require_decoders

# What a JPEG costs at most that is decoded in the worker's own process: pixels in all its scans, pixels, and bytes of
# metadata and segments, of which Python reads each.
_MAX_COST = 2**28
_MAX_PIXELS = 2**25
_MAX_METADATA = 2**18
_MAX_SEGMENTS = 1000


@contextmanager
def pillow_does_not_warn() -> Iterator[None]:
    """Pillow warns of what it reads in spite of faults. For a part: a filter for each image would cost time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield


def decode_rows(samples: pa.StructArray, decode: Callable[[int, pa.Buffer], None]) -> dict[str, pa.Array]:
    """Call `decode` with each row and image that has no fault yet; `stage` and `reason` of all rows after that."""
    stages, reasons = samples.field(STAGE).to_pylist(), samples.field(REASON).to_pylist()
    for row, image in enumerate(samples.field(IMAGE)):
        if reasons[row] is not None:
            continue
        try:
            decode(row, image.as_buffer())
        except SampleError as error:
            stages[row], reasons[row] = STAGE_DECODE, str(error)
    return {STAGE: pa.array(stages, pa.string()), REASON: pa.array(reasons, pa.string())}


class Decoder:
    """Decodes by one set of rules."""

    def __init__(self, rules: DecodingRules) -> None:
        self.rules = rules
        self._child_s = 0.0

    def clock(self) -> float:
        """Seconds of the core, which tasks share: there may be more of them than cores. Those of the child count."""
        return time.thread_time() + self._child_s

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Parts with encoded images in, the same parts with pixels out: one by one, as these may be far larger."""
        require_decoders(self.rules.heif)
        for values, samples in part_rows(table):
            yield self._part(values, samples)

    @pillow_does_not_warn()
    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = self.clock()
        height, width = self.rules.preprocess.crop
        pixels = np.zeros((len(samples), height, width, 3), np.uint8)

        def decode(row: int, image: pa.Buffer) -> None:
            pixels[row] = self.decode(image)

        faults = decode_rows(samples, decode)
        payload = pixels_field(height, width)
        mask = faults[REASON].is_valid()
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(pixels.reshape(-1)), type=payload.type, mask=mask if len(mask) else None
        )
        decoded = with_payload(samples, payload, **faults, **{PIXELS: column})
        return part_row({**values, "decode_s": self.clock() - start}, decoded)

    def decode(self, data: bytes | pa.Buffer) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """One encoded image as uint8 RGB of shape [H, W, 3].

        Raises:
            SampleError: not an image, broken, larger than `max_pixels`, or it killed the process that decoded it.
        """
        data = _not_empty(bytes(memoryview(data)))
        header = self.plain_jpeg(data)
        if header is not None:
            eighths = eighths_for(header, self.rules)
            pixels = jpeg.decode(data, header, eighths)
            if pixels is not None:
                return fit(pixels, header, eighths, self.rules)
        pixels, seconds = child.decode(data, self.rules)
        self._child_s += seconds
        return pixels

    def upright_size(self, data: bytes) -> tuple[int, int]:
        """Width and height of one encoded image as it is to be seen. Raises `SampleError` as `decode` does."""
        header = self.plain_jpeg(data)
        if header is None:
            return child.upright_size(_not_empty(data), self.rules)
        is_turned = header.orientation > 4 and not self.rules.ignore_orientation
        return (header.height, header.width) if is_turned else (header.width, header.height)

    def plain_jpeg(self, data: bytes) -> jpeg.JpegHeader | None:
        """The header of a JPEG of the common kinds that is cheap enough for this process; None for all else."""
        header = jpeg.read_header(data, _MAX_SEGMENTS)
        most_cost = min(_MAX_COST, jpeg.MAX_SCANS * self.rules.max_pixels)
        is_plain = (
            header is not None
            and header.frame in jpeg.HUFFMAN_FRAMES
            and header.bits == 8
            and len(header.components) in (1, 3)
            and header.first_scan == header.components
            and header.height * header.width <= self.rules.max_pixels
            and header.coded_pixels <= _MAX_PIXELS
            and jpeg.scans_cost(header, data, most_cost) <= most_cost
            and len(header.exif) + len(header.xmp) <= _MAX_METADATA
            and (header.frame != jpeg.PROGRESSIVE or jpeg.missing_scans(data, header) is None)
        )
        return header if is_plain else None


def _not_empty(data: bytes) -> bytes:
    if not data:
        raise SampleError("empty: 0 bytes")
    return data
