"""JPEGs: what their markers say, and the pixels of those in which libjpeg-turbo finds no fault.

Source of the markers: ITU-T T.81, annex B; of the colours Adobe Technical Note 5116, section 18.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from pipeline.decoding.orientation import orientation_in

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Baseline, extended sequential and progressive, all with Huffman codes.
HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SOI, EOI, SOS, ADOBE = 0xD8, 0xD9, 0xDA, 0xEE
_JFIF, _APP1 = 0xE0, 0xE1
# A JPEG, progressive or not, can repeat its scans, each as much work as a decode and ten bytes long or more: what all
# of them go over is at most this many times `max_pixels`. Encoders write ten or so.
MAX_SCANS = 100
_START_OF_SCAN, _SCAN_BYTES = b"\xff\xda", 10
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# Markers without a length: restarts, and one that is reserved.
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
# The largest block of pixels that a JPEG is coded in. Images are coded up to its edge.
_BLOCK = 32
# What decoding needs of the segments: frames and scans, their tables, and what says which colours they are of.
_NEEDED = FRAMES | {SOS, 0xC4, 0xCC, 0xDB, 0xDD}
_LEAST_NEEDED = {_JFIF: (b"JFIF\0", 14), ADOBE: (b"Adobe", 12)}


class Segment(NamedTuple):
    """A segment before the compressed data: its marker, and where it begins and ends, marker and length included."""

    kind: int
    start: int
    end: int


@dataclass(frozen=True)
class JpegHeader:
    """What the segments up to the first scan say. Components are named by their ids."""

    frame: int
    bits: int
    height: int
    width: int
    components: tuple[int, ...]
    first_scan: tuple[int, ...]
    # Where the first scan's compressed data begins.
    data_start: int
    num_segments: int
    exif: bytes
    xmp: bytes

    @property
    def coded_pixels(self) -> int:
        """The pixels that a decoder works on: those of whole blocks."""
        return -(-self.height // _BLOCK) * -(-self.width // _BLOCK) * _BLOCK**2

    @property
    def orientation(self) -> int:
        """1 to 8; 1 where the metadata is missing or broken."""
        return orientation_in(self.exif, self.xmp) if self.exif or self.xmp else 1


def segments(data: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to that of its first scan. What libjpeg skips between them is skipped."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        kind = data[position + 1]
        if kind == 0xFF:  # padding
            position += 1
        elif kind == 0 or kind in _BARE:
            position += 2
        elif kind in (SOI, EOI):
            return
        else:
            length = int.from_bytes(data[position + 2 : position + 4], "big")
            if length < 2:
                return
            end = position + 2 + length
            yield Segment(kind, position, end)
            if kind == SOS:
                return
            position = end


def read_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None where `data` is none, or has no frame and no scan."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame, xmp = None, b""
    exif: list[bytes] = []
    for num_segments, (kind, start, end) in enumerate(segments(data), 1):
        if kind in FRAMES:
            frame = kind, data[start + 4 : end]
        elif kind == _APP1:
            if data.startswith(_EXIF, start + 4):
                # Of several, Pillow joins what is behind the mark.
                exif.append(data[start + 4 + (len(_EXIF) if exif else 0) : end])
            elif data.startswith(_XMP, start + 4):
                xmp = data[start + 4 + len(_XMP) : end]
        elif kind == SOS and frame is not None:
            scan = data[start + 4 : end]
            number, body = frame
            if len(body) < 6 or len(scan) < 4 or end > len(data):
                return None
            return JpegHeader(
                frame=number,
                bits=body[0],
                height=int.from_bytes(body[1:3], "big"),
                width=int.from_bytes(body[3:5], "big"),
                components=tuple(body[6::3]),
                first_scan=tuple(scan[1:-3:2]),
                data_start=end,
                num_segments=num_segments,
                exif=b"".join(exif),
                xmp=xmp,
            )
    return None


def without_metadata(data: bytes) -> bytes:
    """The same JPEG with nothing but what its pixels need."""
    kept = [data[:2]]
    end = 2
    for kind, start, end in segments(data):
        mark, least = _LEAST_NEEDED.get(kind, (b"", 0))
        if kind in _NEEDED or (mark and data.startswith(mark, start + 4) and end - start - 4 >= least):
            kept.append(data[start:end])
    return b"".join((*kept, data[end:]))


def scans_cost(header: JpegHeader, data: bytes, limit: int) -> int:
    """How many pixels its scans go over at most, each of them all; 0 where it cannot be more than `limit`."""
    # Most images are too small for it, whatever they hold.
    if len(data) // _SCAN_BYTES * header.coded_pixels <= limit:
        return 0
    return data.count(_START_OF_SCAN) * header.coded_pixels


def decode(data: bytes, header: JpegHeader) -> Pixels | None:
    """RGB [H, W, 3] of a JPEG that is RGB or grey; None where libjpeg-turbo finds a fault in it."""
    try:
        # Strict: what libjpeg only warns of, such as data that ends too early, is refused.
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (header.height, header.width) else None
