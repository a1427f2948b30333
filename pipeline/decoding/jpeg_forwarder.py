"""The decode stage where devices decode: plain JPEGs go on as they are, all else as pixels.

What a device's decoder makes of a damaged JPEG is its own: one gives grey, another what it had in memory. So only
those go on whose markers lead from the first byte to the last, as `is_whole` finds them without decoding anything:
one that is cut off stays with the decoder that tells errors. Damage inside the compressed data changes no marker,
and is seen by no such look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from shard_embedder.pipeline.core.errors import SettingsError
from shard_embedder.pipeline.core.schema import (
    ENCODED,
    SAMPLE_INDEX,
    encoded_field,
    part_row,
    part_rows,
    with_payload,
)
from shard_embedder.pipeline.decoding import jpeg
from shard_embedder.pipeline.decoding.decoder import Decoder, decode_rows, pillow_does_not_warn
from shard_embedder.pipeline.decoding.preprocess import Preprocess, resized_size
from shard_embedder.pipeline.decoding.versions import require_decoders, require_torchcodec, torchcodec_version

# `orientation` of what is pixels already.
PIXELS_ALREADY = 0
# Larger images are decoded on CPU, and those that would be so while they are resized: in float32 on the device these
# take 400 MB, and that beside a backbone.
MAX_DEVICE_PIXELS = 2**25
# What is scaled by more is, too: of bicubic's kernel on the device 91 is the most.
MAX_DEVICE_SCALE = 64
DEVICE_INTERPOLATIONS = ("bilinear", "bicubic")

_FIRST_RESTART = 0xD0
# Grey, and YCbCr as JFIF and as some older encoders number it; others may be RGB, which not every decoder looks for.
_COMPONENTS = ((1,), (0,), (1, 2, 3), (0, 1, 2))
_ADOBE_RGB = 0


def require_device_decoding(preprocess: Preprocess) -> None:
    """Check that a device can decode, and resize as the weights ask.

    Raises:
        SettingsError: it cannot.
    """
    require_torchcodec(torchcodec_version())
    if preprocess.interpolation not in DEVICE_INTERPOLATIONS:
        raise SettingsError(
            f"decode gpu resizes by {' or '.join(DEVICE_INTERPOLATIONS)}, and these weights ask for "
            f"{preprocess.interpolation}: decode must be cpu for them, got 'gpu'"
        )


def is_whole(data: bytes) -> bool:
    """Whether `data` is a JPEG, 8-bit YCbCr or grey, with one frame, from its first marker to its last.

    Source: ITU-T T.81, annex B, and for the colours Adobe Technical Note 5116, section 18.
    """
    if data[:2] != bytes((0xFF, jpeg.SOI)):
        return False
    position, num_frames, num_scans = 2, 0, 0
    while position + 4 <= len(data):
        mark, kind = data[position], data[position + 1]
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        # Of the markers without a length only the last one may stand here.
        if mark != 0xFF or kind < 0xC0 or _FIRST_RESTART <= kind <= jpeg.EOI or length < 2:
            return False
        body = data[position + 4 : position + 2 + length]
        position += 2 + length
        if kind in jpeg.FRAMES:
            num_frames += 1
            if kind not in jpeg.HUFFMAN_FRAMES or not _is_known_frame(body):
                return False
        elif kind == jpeg.ADOBE and body[:5] == b"Adobe" and len(body) >= 12 and body[11] == _ADOBE_RGB:
            return False
        elif kind == jpeg.SOS:
            num_scans += 1
            found = jpeg.MARKER.search(data, position)
            if found is None:
                return False
            position = found.start()
            if data[position + 1] == jpeg.EOI:
                return position + 2 == len(data) and num_frames == 1
    return False


def _is_known_frame(body: bytes) -> bool:
    """Whether a frame header is of 8 bits, with components that stand for grey or YCbCr."""
    return len(body) >= 6 and body[0] == 8 and tuple(body[6::3]) in _COMPONENTS and len(body) == 6 + 3 * body[5]


class JpegForwarder:
    """Checks each image by its header, as `decoder` does; what is no plain JPEG it lets `decoder` decode.

    Of a `share` below 1 it forwards that share of the samples, chosen by their index in the shard alone: the same in
    every run, and spread over every part.
    """

    def __init__(self, decoder: Decoder, share: float = 1.0) -> None:
        self._decoder = decoder
        self._share = share

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        """Parts with encoded images in, the same parts with what a device is to decode (`encoded_field`) out."""
        require_decoders(self._decoder.rules.heif)
        for values, samples in part_rows(table):
            yield self._part(values, samples)

    @pillow_does_not_warn()
    def _part(self, values: dict[str, Any], samples: pa.StructArray) -> pa.Table:
        start = self._decoder.clock()
        encoded: list[dict[str, Any] | None] = [None] * len(samples)
        indices = samples.field(SAMPLE_INDEX).to_pylist()

        def forward(row: int, image: pa.Buffer) -> None:
            data = bytes(memoryview(image))
            is_of_share = math.floor((indices[row] + 1) * self._share) > math.floor(indices[row] * self._share)
            encoded[row] = self.forward(data) if is_of_share else self._decoded(data)

        faults = decode_rows(samples, forward)
        payload = encoded_field()
        result = with_payload(samples, payload, **faults, **{ENCODED: pa.array(encoded, payload.type)})
        return part_row({**values, "decode_s": self._decoder.clock() - start}, result)

    def forward(self, data: bytes) -> dict[str, Any]:
        """One image as a value of `encoded_field`.

        Raises:
            SampleError: as `Decoder.decode` does.
        """
        # The markers first: no other parser sees what they do not lead through, in this process.
        header = self._decoder.plain_jpeg(data) if is_whole(data) else None
        if header is not None and self._is_for_device(header):
            turned = 1 if self._decoder.rules.ignore_orientation else header.orientation
            # Its orientation is told. No parser of metadata runs in the process of the device, nor turns it twice.
            plain = jpeg.without_metadata(data)
            return {"data": plain, "height": header.height, "width": header.width, "orientation": turned}
        return self._decoded(data)

    def _decoded(self, data: bytes) -> dict[str, Any]:
        height, width = self._decoder.rules.preprocess.crop
        pixels = self._decoder.decode(data).tobytes()
        return {"data": pixels, "height": height, "width": width, "orientation": PIXELS_ALREADY}

    def _is_for_device(self, header: jpeg.JpegHeader) -> bool:
        height, width = header.height, header.width
        if header.orientation > 4:  # turned by a quarter
            height, width = width, height
        new_height, new_width = resized_size(height, width, self._decoder.rules.preprocess)
        most_pixels = max(height * width, height * new_width, new_height * new_width)
        most_scale = max(height / new_height, width / new_width)
        return most_pixels <= MAX_DEVICE_PIXELS and most_scale <= MAX_DEVICE_SCALE
