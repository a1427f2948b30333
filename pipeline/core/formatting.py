"""Numbers and names as a person reads them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def format_count(number: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `2,000 shards`; with a `plural` that takes more than an s, `2 classes`."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean part_rows?` for a name that is near a known one, else empty."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def one_line(text: str) -> str:
    """`text` on one line, with every character escaped that a terminal would obey."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def format_share(part: float) -> str:
    """0.932 as `93 %`."""
    if 0 < part < 0.01:
        return "under 1 %"
    return f"{100 * part:.0f} %"


def format_duration(length_s: float) -> str:
    """A length of time by its two largest units."""
    if length_s < 9.95:
        return f"{length_s:.1f} s"
    whole = round(length_s)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def format_size(num_bytes: float) -> str:
    """Bytes in the largest unit that leaves a number of at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:,.1f} PiB"
