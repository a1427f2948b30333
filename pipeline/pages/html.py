"""Pages that need nothing but themselves: what they have in common, and one of rows of an image and those near it."""

from __future__ import annotations

from html import escape
from typing import NamedTuple

from pipeline.output.names import Place
from pipeline.pages.previews import Preview

# Nothing is fetched and nothing runs, whatever a name or an image holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# A key may have thousands of characters, and a page many of them.
MAX_TEXT = 300
_LOOK = """
:root { color-scheme: light dark;
  --bg: #f6f6f3; --card: #fff; --ink: #1d2126; --soft: #5b626b; --line: #dfdfd9; --empty: #ecece7;
  --data: #2a6d9e; --accent: #a84a05; --good: #1b7340; --bad: #b3261e; --warn: #855600; }
@media (prefers-color-scheme: dark) { :root {
  --bg: #14161a; --card: #1c1f24; --ink: #e9e7e3; --soft: #a5abb3; --line: #343941; --empty: #282c33;
  --data: #6fb3e3; --accent: #f2a24d; --good: #6fc896; --bad: #f48b82; --warn: #e3b352; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; margin: 0 auto; padding: 2rem 1rem;
  max-width: 80rem; color: var(--ink); background: var(--bg); overflow-wrap: anywhere;
  -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
figure { margin: 0; min-width: 0; }
img, .none { display: block; width: 100%; aspect-ratio: 1; border-radius: 6px; background: var(--empty); }
.none { font-size: 12px; line-height: 1.35; padding: .5rem; overflow: hidden; color: var(--soft); }
figcaption { font-size: 13px; line-height: 1.35; padding-top: .3rem; overflow-wrap: anywhere;
  font-variant-numeric: tabular-nums; }
small { font-size: 12px; color: var(--soft); }
"""


class Tile(NamedTuple):
    """One image: what it is called, what to say of it, and how it looks."""

    name: str
    detail: str
    preview: Preview


def shown(place: Place) -> str:
    """Where a sample is, for people."""
    return f"{place[0]} [{place[1]}]"


def safe(text: object, most: int = MAX_TEXT) -> str:
    """Any text as HTML that shows it: no markup, nothing that a browser acts on, at most `most` characters."""
    whole = str(text)
    cut = whole if len(whole) <= most else f"{whole[: most - 1]}…"
    # What cannot be seen is escaped as Python would write it: controls, marks that turn the direction of writing.
    visible = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut)
    return escape("".join(visible))


def document(title: str, style: str, body: str) -> str:
    """A whole page of `body`, which is HTML, in light and dark."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{safe(title)}</title><style>{_LOOK}{style}</style></head><body>\n{body}\n</body></html>\n"
    )


def figure(tile: Tile, kind: str) -> str:
    """A tile as HTML, of a class of its own."""
    url, reason = tile.preview
    picture = (
        f'<div class="none">no preview: {safe(reason)}</div>'
        if url is None
        else f'<img src="{escape(url)}" alt="{safe(tile.name)}">'
    )
    caption = f"{safe(tile.name)}<br><small>{safe(tile.detail)}</small>"
    return f'<figure class="{kind}">{picture}<figcaption>{caption}</figcaption></figure>'
