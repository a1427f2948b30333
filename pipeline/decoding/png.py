"""PNGs without their metadata: Pillow gives up on some whose pixels have no fault."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NEEDED = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
# Chunks of text that may say how the image is to be turned.
_TEXT_KINDS, _TEXTS = (b"tEXt", b"zTXt", b"iTXt"), (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")
_FRAME = struct.Struct(">I4s")


class _Chunk(NamedTuple):
    """A chunk: its kind, and where it begins and ends, length and checksum included."""

    kind: bytes
    start: int
    end: int


def without_metadata(data: bytes) -> Iterator[bytes]:
    """The same PNG with less and less of what its pixels do not need: but orientation, then without that too."""
    if data.startswith(SIGNATURE):
        chunks = list(_chunks(data))
        for with_orientation in (True, False):
            kept = [
                data[chunk.start : chunk.end]
                for chunk in chunks
                if chunk.kind in _NEEDED or (with_orientation and _says_orientation(data, chunk))
            ]
            yield b"".join((SIGNATURE, *kept))


def _chunks(data: bytes) -> Iterator[_Chunk]:
    position = len(SIGNATURE)
    while position + _FRAME.size <= len(data):
        length, kind = _FRAME.unpack_from(data, position)
        end = position + _FRAME.size + length + 4
        yield _Chunk(kind, position, end)
        position = end


def _says_orientation(data: bytes, chunk: _Chunk) -> bool:
    """Whether a chunk without a fault may say how the image is to be turned."""
    is_text = chunk.kind in _TEXT_KINDS and data.startswith(_TEXTS, chunk.start + _FRAME.size)
    if not is_text and chunk.kind != b"eXIf":
        return False
    checksum = zlib.crc32(data[chunk.start + 4 : chunk.end - 4])
    return chunk.end <= len(data) and data[chunk.end - 4 : chunk.end] == struct.pack(">I", checksum)
