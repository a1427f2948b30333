"""A page of pictures that needs nothing but itself: rows of one image and those near it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import NamedTuple

from pipeline.index import Neighbour
from pipeline.previews import SIDE, Place, Preview

# Nothing is fetched and nothing runs, whatever a name or an image holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = f"""
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }}
section {{ display: flex; flex-wrap: wrap; gap: .8rem; padding: 1rem 0; border-top: 1px solid #8884; }}
figure {{ margin: 0; width: {SIDE}px; }}
figure.head {{ margin-right: 1.6rem; }}
img, .none {{ display: block; width: {SIDE}px; height: {SIDE}px; border-radius: 4px; }}
.none {{ background: #8882; font-size: 12px; padding: .6rem; box-sizing: border-box; overflow: hidden; }}
figcaption {{ font-size: 13px; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }}
small {{ opacity: .7; }}
"""


class Tile(NamedTuple):
    """One image: what it is called, what to say of it, and how it looks."""

    name: str
    detail: str
    preview: Preview


class Row(NamedTuple):
    """One image, and those near it."""

    head: Tile
    near: list[Tile]


def near_tiles(neighbours: Iterable[Neighbour], score: str, found: Mapping[Place, Preview]) -> list[Tile]:
    """Neighbours with what their score is called, and their previews."""
    return [
        Tile(
            near.image_id,
            f"{score} {near.score:.4f}, {shown(near.place)}",
            found[near.place],
        )
        for near in neighbours
    ]


def shown(place: Place) -> str:
    """Where a sample is, for people."""
    return f"{place[0]} [{place[1]}]"


def page(title: str, lines: Iterable[str], rows: Iterable[Row]) -> str:
    """The page as HTML. Every text is shown as it is."""
    said = "".join(f"<p>{escape(line)}</p>" for line in lines)
    body = "".join(
        f"<section>{_figure(row.head, 'head')}{''.join(_figure(tile, 'near') for tile in row.near)}</section>"
        for row in rows
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>{said}{body}</html>\n"
    )


def _figure(tile: Tile, kind: str) -> str:
    url, reason = tile.preview
    picture = (
        f'<div class="none">no preview: {escape(reason)}</div>'
        if url is None
        else f'<img src="{escape(url)}" alt="{escape(tile.name)}">'
    )
    caption = f"{escape(tile.name)}<br><small>{escape(tile.detail)}</small>"
    return f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>'
