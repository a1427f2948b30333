"""Pages that need nothing but themselves, rendered from the templates and style sheets below `templates/`.

No template can act on a text: every value passes `show` on its way into a page, and then jinja2's own escaping.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shard_embedder.pipeline.core.formatting import format_count, format_duration, format_share, format_size
from shard_embedder.pipeline.core.redact import describe
from shard_embedder.pipeline.pages.charts import number

# A key may have thousands of characters, and a page many of them.
MAX_TEXT = 300


def cut(text: object, most: int = MAX_TEXT) -> str:
    """A text of at most `most` characters."""
    whole = str(text)
    return whole if len(whole) <= most else f"{whole[: most - 1]}…"


def show(value: object) -> str:
    """A value as text that a browser only shows, at most `MAX_TEXT` characters of it; rendered HTML as it is."""
    if isinstance(value, Markup):
        return value
    # What cannot be seen is escaped as Python would write it: controls, marks that turn the direction of writing.
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut(value))


def breakable(text: object) -> Markup:
    """A path or id, which may be broken into lines where a word of it ends."""
    return Markup("<wbr>").join(re.split("(?<=[/_])", show(text)))


def data_url(jpeg: bytes) -> Markup:
    """A picture that stands in the page itself."""
    return Markup("data:image/jpeg;base64,") + base64.b64encode(jpeg).decode()


def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader(str(__package__)),
        autoescape=True,
        finalize=show,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # No template may leave out the escaping.
    del made.filters["safe"]
    made.filters |= {
        "breakable": breakable,
        "count": format_count,
        "cut": cut,
        "data_url": data_url,
        "duration": format_duration,
        "number": number,
        "share": format_share,
        "size": format_size,
        "thousands": "{:,}".format,
    }
    return made


_ENVIRONMENT = _environment()


def render(template: str, values: Mapping[str, Any]) -> Markup:
    """The HTML of a template; a value that it names and does not get is an error."""
    return Markup(_ENVIRONMENT.get_template(template).render(values))


def render_or_reason(template: str, make: Callable[[], Mapping[str, Any]]) -> Markup:
    """The HTML of a template with the values of `make`, or why there is none.

    This is the one place where a page meets whatever went wrong: no mistake in a drawing may look like one of the
    run, which is over and stored.
    """
    try:
        return render(template, make())
    except Exception as error:
        return render("failed.html.j2", {"reason": describe(error)})
