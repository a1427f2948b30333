"""What a file is that is no image, or none that can be read, told by its first bytes."""

from __future__ import annotations

# Read by Pillow: what has such a mark and cannot be opened is broken.
_READ = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_OTHER = {
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL \r\n\x87\n": "JPEG XL",
    b"8BPS": "a Photoshop file",
    b"%PDF": "a PDF",
    b"%!PS": "PostScript",
    b"version https://git-lfs": "a pointer of Git LFS, whose file was never fetched",
    b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\0": "xz data",
    b"PK\x03\x04": "a zip archive",
    b"\x1a\x45\xdf\xa3": "a Matroska video",
}
# Brands of the ISO base media format, which AVIF, HEIC and MP4 share.
_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body")
_LOOKED_AT = 4096


def broken_format(data: bytes) -> str | None:
    """The name of the format that a file which cannot be opened has the mark of; None if of none that is read."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp" and data[8:12] in _AVIF:
        return "AVIF"
    return next((name for mark, name in _READ.items() if data.startswith(mark)), None)


def is_heic(data: bytes) -> bool:
    """Whether a file has the mark of a HEIC image."""
    return data[4:8] == b"ftyp" and data[8:12] in _HEIC


def other_kind(data: bytes) -> str | None:
    """What a file of another kind is; None where its first bytes tell nothing."""
    found = next((name for mark, name in _OTHER.items() if data.startswith(mark)), None)
    if found is not None:
        return found
    if data[4:8] == b"ftyp":
        return "an MP4 video, or its like"
    start = data[:_LOOKED_AT]
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_HTML):
        return "HTML"
    if text.startswith((b"<svg", b"<?xml")) and b"<svg" in text:
        return "SVG"
    if not data.strip(b"\0"):
        return "nothing but zeros"
    return "text" if _is_text(start) else None


def _is_text(start: bytes) -> bool:
    try:
        # The last character may be cut.
        text = start.decode("utf-8", errors="strict" if len(start) < _LOOKED_AT else "ignore")
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\f\ufeff" for character in text)
