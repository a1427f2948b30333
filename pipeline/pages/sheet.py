"""The contact sheet: each query with its nearest neighbours, as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from shard_embedder.pipeline.core.errors import SampleError
from shard_embedder.pipeline.pages.previews import shrink

_TILE = 156
_GAP = 16
_QUERY_GAP = 44
_MARGIN = 36
_CAPTION = 50
_HEADER = 136
_INK, _GREY, _PAPER, _MAT = "#1f2328", "#59636e", "#ffffff", "#f0f2f4"
_RIGHT, _WRONG, _ALARM = "#1a7f37", "#cf222e", "#fff1c2"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _badge(is_right: bool) -> Image.Image:
    """A tick or a cross in a disc, drawn large and made smaller for smooth edges."""
    badge = Image.new("RGBA", (112, 112))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((2, 2, 110, 110), fill=_RIGHT if is_right else _WRONG, outline=_PAPER, width=8)
    lines = [((32, 58), (50, 76), (82, 38))] if is_right else [((38, 38), (74, 74)), ((74, 38), (38, 74))]
    for line in lines:
        draw.line(line, fill=_PAPER, width=13, joint="curve")
    return badge.resize((28, 28), Image.Resampling.LANCZOS)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """`text`, with its middle left out where it is too long."""
    shown, kept = text, len(text)
    while kept > 2 and draw.textlength(shown, font) > width:
        kept -= 1
        shown = f"{text[: kept // 2]}...{text[-(kept - kept // 2) :]}"
    return shown


def _thumbnail(path: Path) -> Image.Image | None:
    """The image at `path` to fit a tile, or None where it cannot be opened (a name that is not UTF-8)."""
    try:
        # Twice as large, to be made smaller as it looks best.
        upright, _ = shrink(path.read_bytes(), 2 * _TILE)
    except (OSError, SampleError):
        return None
    if abs(upright.width - upright.height) * _TILE <= 4 * max(upright.size):
        # As good as square: no hairline of the mat beside it.
        return upright.resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    return ImageOps.contain(upright, (_TILE, _TILE), Image.Resampling.LANCZOS)


class Sheet:
    """A contact sheet: a header, and rows of a query with its neighbours."""

    def __init__(self, num_rows: int, num_neighbours: int) -> None:
        width = 2 * _MARGIN + _TILE + _QUERY_GAP + num_neighbours * (_TILE + _GAP) - _GAP
        height = _HEADER + num_rows * (_TILE + _CAPTION + _GAP) + _MARGIN - _GAP
        self.image = Image.new("RGB", (max(width, 760), height), _PAPER)
        self._draw = ImageDraw.Draw(self.image)

    def header(self, title: str, lines: list[str], alarm: str) -> None:
        """Title, what is seen in two lines, and what to beware of (none where empty)."""
        self._draw.text((_MARGIN, 24), title, _INK, _font(28))
        for number, line in enumerate(lines):
            self._draw.text((_MARGIN, 64 + number * 23), line, _GREY, _font(16))
        if alarm:
            font = _font(16)
            left = self.image.width - _MARGIN - self._draw.textlength(alarm, font) - 24
            self._draw.rounded_rectangle((left, 26, self.image.width - _MARGIN, 56), 15, _ALARM)
            self._draw.text((left + 12, 41), alarm, _INK, font, anchor="lm")

    def tile(self, row: int, column: int, path: Path, caption: str, detail: str, is_right: bool | None) -> None:
        """One image. Column 0 is the query; `is_right` is None where nothing is right or wrong."""
        left = _MARGIN + (column and _QUERY_GAP - _GAP + column * (_TILE + _GAP))
        top = _HEADER + row * (_TILE + _CAPTION + _GAP)
        colour = _INK if column == 0 else {None: _MAT, True: _RIGHT, False: _WRONG}[is_right]
        box = (left, top, left + _TILE, top + _TILE)
        self._draw.rectangle(box, _MAT)
        thumbnail = _thumbnail(path)
        if thumbnail is None:
            self._draw.text((left + _TILE // 2, top + _TILE // 2), "no preview", _GREY, _font(14), anchor="mm")
        else:
            x, y = (_TILE - thumbnail.width) // 2, (_TILE - thumbnail.height) // 2
            self.image.paste(thumbnail, (left + x, top + y))
        self._draw.rectangle((left - 4, top - 4, left + _TILE + 3, top + _TILE + 3), outline=colour, width=4)
        if column and is_right is not None:
            badge = _badge(is_right)
            self.image.paste(badge, (left + _TILE - 22, top - 8), badge)
        font = _font(14)
        self._draw.text((left, top + _TILE + 9), _fitted(self._draw, caption, font, _TILE), _INK, font)
        self._draw.text((left, top + _TILE + 27), detail, _GREY, font)
