"""How tests look at a page: as text of which nothing can act, and in a browser."""

from __future__ import annotations

import re
from collections.abc import Collection
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from tests.browser import Browser

# What a picture begins with.
PICTURE = '<details class="picture"><summary><img src="data:image/jpeg;base64,'


class _Reader(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str, hrefs: Collection[str] = ("report.json",)) -> str:
    """The page's text, of a page in which nothing can act and which needs nothing else but links to `hrefs`."""
    found = _Reader(page)
    assert not {"script", "iframe", "object", "embed", "base", "form", "foreignobject"} & {*found.tags}
    for name, value in found.attributes:
        assert not name.startswith("on"), f"{name} acts"
        if name == "src":
            assert (value or "").startswith("data:image/jpeg;base64,")
        if name == "href":
            assert value in hrefs
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in found.attributes
    assert not re.search(r"url\(|@import|https?:|[\x00-\x08\x0b-\x1f\u202a-\u202e]", page)
    assert "could not be drawn" not in page
    return " ".join(" ".join(found.text).split())


# The least contrast of any text with what is behind it, by WCAG 2's formula, with the text that has it.
_CONTRAST = """
(() => {
  const parse = c => { const [r, g, b, a = 1] = c.match(/[\\d.]+/g).map(Number); return {rgb: [r, g, b], a}; };
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = rgb => { const [r, g, b] = rgb.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  let worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    if (![...node.childNodes].some(c => c.nodeType === 3 && c.data.trim()) || !node.checkVisibility()) continue;
    let back = node, colour;
    while (back && !(colour = parse(getComputedStyle(back).backgroundColor)).a) back = back.parentElement;
    const a = light(parse(getComputedStyle(node).color).rgb), b = light(colour.rgb);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < worst[0]) worst = [ratio, node.textContent.trim().slice(0, 60)];
  }
  return worst;
})()
"""
# Ordinary words that are broken into letters: those that stand on more than one line.
_BROKEN_WORDS = r"""
(() => {
  const broken = [], range = document.createRange();
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode;
    if (!node.parentElement.checkVisibility()) continue;
    for (const word of node.data.matchAll(/(?<=^|[\s("'])\p{L}{2,12}(?=$|[\s,;:.)"'%])/gu)) {
      range.setStart(node, word.index);
      range.setEnd(node, word.index + word[0].length);
      if (new Set([...range.getClientRects()].map(box => Math.round(box.top))).size > 1) broken.push(word[0]);
    }
  }
  return broken;
})()
"""
# Cells of tables that show something and are narrower than a short word.
_NARROW_CELLS = """
[...document.querySelectorAll('th, td')].filter(cell => cell.checkVisibility() && cell.textContent.trim())
  .filter(cell => cell.clientWidth < 40).map(cell => cell.textContent)
"""


def check_layout(browser: Browser, width: int) -> None:
    """No text of the page that is open is cut off, broken into letters, or makes the page wider than its window."""
    assert browser.call("Page.getLayoutMetrics")["cssContentSize"]["width"] == width, "nothing is wider than the page"
    assert browser.value(_BROKEN_WORDS) == []
    assert browser.value(_NARROW_CELLS) == []


def check_looks(browser: Browser, page: Path, width: int, scheme: str, shot: Path) -> None:
    """Open a page, and see that it looks right: nothing missing or refused, readable, in the colours of `scheme`."""
    browser.open(page, width=width, scheme=scheme)
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")
    check_readable(browser, width, scheme, shot)


def check_readable(browser: Browser, width: int, scheme: str, shot: Path) -> None:
    """The page that is open was refused nothing, and is readable in the colours of `scheme`."""
    assert browser.complaints == [], "nothing was refused or is wrong"
    check_layout(browser, width)
    contrast, text = browser.value(_CONTRAST)
    assert contrast >= 4.5, f"{text!r} is hard to read"
    pixels = np.asarray(Image.open(browser.screenshot(shot, whole=False)).convert("L"))
    corner = pixels[:8, :8].mean()
    assert corner < 60 if scheme == "dark" else corner > 220
    assert pixels.std() > 10
