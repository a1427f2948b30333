"""HEIC images, as phones take them, by pillow-heif: Pillow does not read them itself."""

from __future__ import annotations

import functools
import struct

FORMAT = "HEIF"
_BOX, _LARGE_BOX = struct.Struct(">I4s"), struct.Struct(">Q")


@functools.cache
def register() -> None:
    """Have Pillow open HEIC images in this process."""
    # It is optional, and only the process that decodes needs it.
    import pillow_heif  # noqa: PLC0415

    # The picture itself, in this thread: a task decodes on one core, and each thread takes address space that stays.
    pillow_heif.register_heif_opener(decode_threads=0, thumbnails=False, depth_images=False, aux_images=False)


def is_cut(data: bytes) -> bool:
    """Whether the file ends before the box that holds the picture does.

    A picture in tiles, as phones store it, is decoded without those that are missing, and no error tells of them.
    """
    position = 0
    while position + _BOX.size <= len(data):
        size, kind = _BOX.unpack_from(data, position)
        if size == 1 and position + _BOX.size + _LARGE_BOX.size <= len(data):
            (size,) = _LARGE_BOX.unpack_from(data, position + _BOX.size)
        if kind == b"mdat" and position + size > len(data):
            return True
        # 0 is for a box that goes to the end of the file, and less than its own head for what is none.
        if size < _BOX.size:
            return False
        position += size
    return False
