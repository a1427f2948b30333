"""What every page shares: a value is shown and does nothing, whichever template it comes through."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from jinja2 import TemplateAssertionError, UndefinedError
from markupsafe import Markup

from shard_embedder.pipeline.pages import html
from shard_embedder.pipeline.pages.html import MAX_TEXT, render, render_or_reason, show
from tests.conftest import ROOT

TEMPLATES = Path(html.__file__).with_name("templates")


def test_markup_control_characters_and_long_texts_are_shown_and_do_nothing() -> None:
    assert render("failed.html.j2", {"reason": '<b>"&'}).count("&lt;b&gt;&#34;&amp;") == 1
    assert show("a\x00\x1b[2J\u202e\ud800é\U0001f40d") == r"a\x00\x1b[2J\u202e\ud800é🐍"
    assert show("k" * 10_000) == "k" * (MAX_TEXT - 1) + "…"
    assert show(Markup("<b>")) == "<b>"


def test_a_value_that_a_template_names_and_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="reason"):
        render("failed.html.j2", {})
    assert "This could not be drawn: UndefinedError: " in render_or_reason("facts.html.j2", dict)


def test_no_template_can_leave_the_escaping_out() -> None:
    with pytest.raises(TemplateAssertionError, match="safe"):
        html._ENVIRONMENT.from_string("{{ reason | safe }}")
    for path in TEMPLATES.iterdir():
        assert not re.search(r"autoescape|\|\s*(safe|tojson|urlize|xmlattr)\b", path.read_text()), path.name


def test_every_template_and_style_sheet_is_in_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in data["shard_embedder.pipeline.pages"] for path in TEMPLATES.parent.glob(pattern)}
    assert packed == {*TEMPLATES.iterdir()}
