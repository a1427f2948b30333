"""WebDataset's key rule, and which member is the image."""

from __future__ import annotations

# Which member is the image where a sample has several: the first in this order, then the first in the
# shard. `x.png` goes before `x.mask.png`, whatever their order.
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "bmp", "gif",
    "jpe", "jfif", "mpo", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "ico", "dib",
)  # fmt: skip
_IMAGE_RANK = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}


def split_key(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member; None for hidden files such as `.DS_Store` and macOS `._x.jpg`.

    A name without a dot is its own key, with the extension "".
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:
        return None
    return folder + slash + stem, extension


def image_rank(extension: str, image_member: str | None) -> int | None:
    """Rank of a member as its sample's image, lower first; None where it is no image."""
    if image_member is not None:
        return 0 if extension.lower() == image_member.lower() else None
    compound, _, last = extension.lower().rpartition(".")
    rank = _IMAGE_RANK.get(last)
    return rank if rank is None or not compound else rank + len(IMAGE_EXTENSIONS)


def printable(text: str) -> str:
    """`text` with bytes that are not UTF-8 escaped as \\xNN; equal to `text` where there are none."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
