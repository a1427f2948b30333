"""JPEGs: what their markers say, and the pixels of those in which libjpeg-turbo finds no fault.

Source of the markers: ITU-T T.81, annex B; of the colours Adobe Technical Note 5116, section 18.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from shard_embedder.pipeline.decoding.orientation import orientation_in

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Baseline, extended sequential and progressive, all with Huffman codes.
HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SOI, EOI, SOS, ADOBE = 0xD8, 0xD9, 0xDA, 0xEE
_JFIF, _APP1 = 0xE0, 0xE1
# A JPEG, progressive or not, can repeat its scans, each as much work as a decode and ten bytes long or more: what all
# of them go over is at most this many times `max_pixels`. Encoders write ten or so.
MAX_SCANS = 100
# A search for the two bytes by `re` takes a fifth of the time of `bytes.count`, which was a tenth of a decode.
_START_OF_SCAN, _SCAN_BYTES = re.compile(b"\xff\xda"), 10
# Within compressed data 0xFF stands before 0 and the numbers of restarts only.
MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
_COLOURS = {1: "GRAY", 3: "RGB", 4: "CMYK"}
# What libjpeg says where a part of the picture is missing, or is not what was there.
_MISSING = ("remature end of", "bad Huffman code", "bad arithmetic code", " instead of RST")
# The least of equal bytes at the end that is looked at, and what would be decoded if a picture went on.
_FILLER_BYTES, _PICTURE = 64, bytes(range(7, 247)) * 8
_FIRST_RESTART, _LAST_RESTART, _RESTART = 0xD0, 0xD7, re.compile(rb"\xff[\xd0-\xd7]")
PROGRESSIVE = 0xC2
_PROGRESSIVE_FRAMES, _ALL_COEFFICIENTS = frozenset({PROGRESSIVE, 0xC6, 0xCA, 0xCE}), 2**64 - 1
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
# Markers without a length: restarts, and one that is reserved.
_BARE = frozenset({0x01, *range(0xD0, 0xD8)})
# The size of a JPEG in the unit of DCT scaling.
WHOLE = 8
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


class JpegHeader(NamedTuple):
    """What the segments up to the first scan say. Components are named by their ids."""

    frame: int
    bits: int
    height: int
    width: int
    components: tuple[int, ...]
    first_scan: tuple[int, ...]
    # Where the first scan's compressed data begins.
    data_start: int
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


def segments(data: bytes, most: int | None = None) -> Iterator[Segment]:
    """The segments of a JPEG up to that of its first scan. What libjpeg skips between them is skipped.

    With `most`, at most so many markers are looked at, what is skipped included.
    """
    position = 2
    for _ in itertools.count() if most is None else range(most):
        position = data.find(b"\xff", position)
        if position < 0 or position + 4 > len(data):
            return
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


def read_header(data: bytes, most_segments: int | None = None) -> JpegHeader | None:
    """The header of a JPEG; None where `data` is none, or has no frame and no scan within `most_segments`."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    frame, xmp = None, b""
    exif: list[bytes] = []
    for kind, start, end in segments(data, most_segments):
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
    """How many pixels its scans go over at most, each of them all; 0 where it cannot be more than `limit`.

    Those beyond the limit are not counted.
    """
    # Most images are too small for it, whatever they hold.
    if len(data) // _SCAN_BYTES * header.coded_pixels <= limit:
        return 0
    most = limit // max(1, header.coded_pixels) + 1
    return sum(1 for _ in itertools.islice(_START_OF_SCAN.finditer(data), most)) * header.coded_pixels


def decode(data: bytes, header: JpegHeader, eighths: int = WHOLE) -> Pixels | None:
    """RGB [H, W, 3] of a JPEG that is RGB or grey; None where libjpeg-turbo finds a fault in it.

    At `eighths` of its size, a side that is not a multiple rounded up.
    """
    height, width = (-(-side * eighths // WHOLE) for side in (header.height, header.width))
    # The smallest scale that gives this; for a tiny image that would be a smaller one than all of it.
    least = {} if eighths == WHOLE else {"min_height": height, "min_width": width}
    try:
        # Strict: what libjpeg only warns of, such as data that ends too early, is refused.
        pixels: Pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **least)
    except ValueError:
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def missing_scans(data: bytes, header: JpegHeader) -> str | None:
    """Which scans of a JPEG are not there; None where every component has all of its coefficients whole."""
    left = dict.fromkeys(header.components, _ALL_COEFFICIENTS)
    unseen = set(left)
    is_progressive = header.frame in _PROGRESSIVE_FRAMES
    for components, first, last, low_bit in _scans(data, header):
        coded = (2 << last) - (1 << first) if low_bit == 0 else 0
        for component in components:
            unseen.discard(component)
            left[component] = left.get(component, 0) & ~(coded if is_progressive else _ALL_COEFFICIENTS)
        if not any(left.values()):
            return None
    if unseen:
        return f"{len(unseen)} of its {len(header.components)} colour components are missing"
    return "its later scans are missing"


def damage(data: bytes, looks_the_same: Callable[[bytes], bool], *, is_faultless: bool) -> str | None:
    """Which part of the picture of a JPEG is missing, though it can be decoded; None for a whole one.

    `data` is without metadata, whose faults would be told first. With `is_faultless`, `decode` has taken it.
    `looks_the_same` tells whether other data gives the same picture; it is asked where libjpeg-turbo stops at
    something else, or does not know the kind of JPEG.
    """
    header = read_header(data)
    if header is None or len(header.components) not in _COLOURS:
        return None
    missing = missing_scans(data, header)
    if missing is not None or is_faultless:
        return missing
    try:
        simplejpeg.decode_jpeg(data, _COLOURS[len(header.components)], strict=True)
    except ValueError as error:
        message = str(error)
    else:
        return None
    if any(text in message for text in _MISSING):
        return message.removeprefix("Corrupt JPEG data: ")
    end = data.rfind(bytes((0xFF, EOI)))
    end = len(data[:end].rstrip(b"\xff") if end >= 0 else data)
    filled = _with_other_filler(data, header, end)
    if filled is not None and not looks_the_same(filled):
        return "its data ends in filler, which was decoded as picture"
    # What stands behind the whole of a picture is not decoded.
    restart = bytes((0xFF, _next_restart(data, end)))
    if all(looks_the_same(data[:end] + more + _PICTURE + data[end:]) for more in (b"", restart)):
        return None
    return "its data ends before its last row"


def _scans(data: bytes, header: JpegHeader) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Of each scan its components, its first and last coefficient, and the lowest bit of these that it has."""
    position = header.data_start - 8 - 2 * len(header.first_scan)
    while 0 <= position < len(data) - 4:
        kind = data[position + 1]
        if kind == SOS:
            count = data[position + 4]
            spectrum = data[position + 5 + 2 * count : position + 8 + 2 * count]
            if len(spectrum) == 3 and spectrum[1] < 64:
                components = tuple(data[position + 5 : position + 5 + 2 * count : 2])
                yield components, spectrum[0], spectrum[1], spectrum[2] & 15
        if kind == EOI:
            return
        # Padding is a byte of 0xFF, and has no length.
        length = 0 if kind == 0xFF else int.from_bytes(data[position + 2 : position + 4], "big") + 1
        found = MARKER.search(data, position + 1 + length)
        position = -1 if found is None else found.start()


def _with_other_filler(data: bytes, header: JpegHeader, end: int) -> bytes | None:
    """The same with others in place of the equal bytes that the compressed data ends in; None where these are few."""
    start = max(header.data_start, len(data[:end].rstrip(data[end - 1 : end])))
    # The zero after 0xFF is a part of it.
    start += data[start - 1] == 0xFF
    if end - start < _FILLER_BYTES:
        return None
    return data[:start] + (b"\x5a" if data[end - 1] == 0x33 else b"\x33") * (end - start) + data[end:]


def _next_restart(data: bytes, end: int) -> int:
    """The marker of the restart that comes after the last one."""
    *_, last = [_LAST_RESTART, *(data[found.start() + 1] for found in _RESTART.finditer(data, 0, end))]
    return _FIRST_RESTART if last == _LAST_RESTART else last + 1
