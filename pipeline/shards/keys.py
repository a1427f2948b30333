"""What the name of a member says: the key of its sample, and whether it is an image."""

from __future__ import annotations

from dataclasses import dataclass

from shard_embedder.pipeline.core.config import KEYS

FIRST_DOT = KEYS[0]
# Which member is the image where a sample has several: the first in this order, then the first in the
# shard. `x.png` goes before `x.mask.png`, whatever their order.
HEIF_EXTENSIONS = ("heic", "heif", "hif")
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "avif", "tif", "tiff", "bmp", "gif", *HEIF_EXTENSIONS,
    "jpe", "jfif", "mpo", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm", "tga", "ico", "dib",
)  # fmt: skip
# Members that tell of a shard or data set, and not of one sample. Only names that no image has: a name without an
# extension may be a user's image, so that of those the list is short.
_DOCUMENTS = frozenset({"readme", "license", "licence", "copying", "changelog"})
_DOCUMENT_EXTENSIONS = frozenset({"", "txt", "html"})
_TABLE_EXTENSIONS = frozenset({
    "csv", "tsv", "parquet", "arrow", "feather", "jsonl", "ndjson", "xlsx", "sqlite", "db", "md", "rst", "yaml",
    "yml", "toml", "ini", "cfg", "log", "idx", "index", "lst", "md5", "sha1", "sha256", "sha512", "cff", "bib", "py",
    "sh", "ipynb",
})  # fmt: skip
_IMAGE_RANK = {extension: rank for rank, extension in enumerate(IMAGE_EXTENSIONS)}


@dataclass(frozen=True)
class Naming:
    """How the names of members make samples: where a key ends, and which member is the image."""

    key: str = FIRST_DOT
    image_member: str | None = None

    def is_hidden_image(self, name: str) -> bool:
        """Whether a member without a key is an image that somebody hid, and no macOS `._x.jpg`, which holds none."""
        base = name.rpartition("/")[2]
        return not base.startswith("._") and image_rank(base.rpartition(".")[2], self.image_member) is not None


def split_key(name: str, key: str = FIRST_DOT) -> tuple[str, str] | None:
    """(key, extension) of a member; None for hidden files such as `.DS_Store` and macOS `._x.jpg`.

    The key is the path up to the first dot of the basename, or up to the last. A name without a dot is its own
    key, with the extension "".
    """
    folder, slash, base = name.rpartition("/")
    if not base or base[0] == ".":
        return None
    stem, dot, extension = base.partition(".") if key == FIRST_DOT else base.rpartition(".")
    return (folder + slash + stem, extension) if dot else (name, "")


def tells_of_shard(name: str) -> bool:
    """Whether a member that is no image tells of a shard or data set, and not of one sample.

    That is so of a name that WebDataset reserves (`__index__`, `__meta__`, with any extension), of one such as
    `README` or `LICENSE`, without an extension or with that of a text, and of one with the extension of a table,
    list, script or checksum (`labels.csv`).
    """
    stem, _, extension = name.rpartition("/")[2].lower().partition(".")
    if len(stem) > 4 and stem.startswith("__") and stem.endswith("__"):
        return True
    return extension.rpartition(".")[2] in _TABLE_EXTENSIONS or (
        stem in _DOCUMENTS and extension in _DOCUMENT_EXTENSIONS
    )


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
