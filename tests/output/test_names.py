"""Names of parts: what a shard is called in every reader's file system, and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_embedder.pipeline.output.names import PartName, escape, unescape

# Text that has what is special more often than not.
ODD_TEXT = st.text(
    st.one_of(st.sampled_from('ab/._~5F=:%?*[]{}#\\"<>|\n\x1b\x7f\x85\u2028é'), st.characters(codec="utf-8"))
)


@pytest.mark.parametrize(
    "shard",
    ["a", "train/00001", "a_b.c-d", "a b", "ünï/코드", "a+b&c,d;e@f(g)!'$^", "x/y_.z", "a..b", "1.parquets/a"],
)
def test_an_ordinary_name_stays_as_it_is(shard: str) -> None:
    assert escape(shard) == shard


@pytest.mark.parametrize(
    ("shard", "path"),
    [
        ("_private", "~5Fprivate"),
        ("_new/.x/_y_", "~5Fnew/~2Ex/~5Fy_"),
        ("dt=2026-01-01/a:b", "dt~3D2026-01-01/a~3Ab"),
        ("50%41~7E", "50~2541~7E7E"),
        ("a\n\x1b\u2028", "a~0A~1B~E2~80~A8"),
        ("x.parquet/y", "x~2Eparquet/y"),
    ],
)
def test_a_special_character_is_escaped_by_its_bytes(shard: str, path: str) -> None:
    assert escape(shard) == path
    assert unescape(path) == shard


@pytest.mark.parametrize(
    "path", ["_a", "a/_b", ".a", "a~5f", "a~41", "a~", "a~F", "~FF", "~E2~80", "a:b", "a=b", "~5Fa~"]
)
def test_a_path_that_no_name_gives_is_none(path: str) -> None:
    assert unescape(path) is None
    assert PartName.parse(f"{path}.0123456789ab-00000-last.parquet") is None


@given(ODD_TEXT)
def test_every_name_comes_back_and_is_safe(shard: str) -> None:
    path = escape(shard)
    assert unescape(path) == shard
    assert not re.search(r"[=:*?\[\]{}#%\\\"<>|\x00-\x1f\x7f]|(^|/)[_.]", path)
    assert path.count("/") == shard.count("/")


@given(ODD_TEXT)
def test_no_two_paths_are_of_one_name(path: str) -> None:
    shard = unescape(path)
    assert shard is None or escape(shard) == path
