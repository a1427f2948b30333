"""The door through which text leaves: secrets of URLs, and characters that command a terminal."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_embedder.pipeline.core.redact import describe, has_secret, redact, show

SECRET = "wJalrXUtnFEMI"
CARRIERS = [
    "s3://AKIA:{}@b/x",
    "s3:AKIA:{}@b/x",
    "--input=s3://AKIA:{}@b/x",
    "https://{}@huggingface.co/x",
    *(
        f"https://h/x?{name}={{}}"
        for name in (
            "X-Amz-Signature", "X-Goog-Signature", "sig", "access_token", "token", "key", "api_key", "apikey", "auth",
            "authorization", "jwt", "Signature", "pass", "password", "pwd", "sas", "code", "hdnea", "hmac",
            "client_secret", "subscription-key", "a=1&SharedKey", "x.y.passphrase",
        )
    ),
    "https://h/x#access_token={}",
    "https://h/x;token={}",
    "https://h/x%3FX-Amz-Signature%3D{}",
    "https://h/x?t%6Fken={}",
    "https://h/x%253Fsig%253D{}",
]  # fmt: skip


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_secret_is_found_and_struck_wherever_it_stands_in_a_url(carrier: str) -> None:
    url = carrier.format(SECRET)
    assert has_secret(url)
    for text in (url, f"cannot read {url}: no", f"'{url}' and {url}", describe(OSError(url)), show(url)):
        struck = redact(text)
        assert SECRET not in struck
        assert "***" in struck
        assert redact(struck) == struck
    assert redact(f"cannot read {url} twice").startswith("cannot read ")


@pytest.mark.parametrize(
    "url",
    [
        "https://h/a.tar?download=true&author=x&keyword=y&postcode=1&v=3", "s3://bkt/100%25.tar", "s3://b/x@y",
        "/a?key=1", "a b?c", "https://h/%E4%B8%AD.tar", "s3://arn:aws:s3:eu:1:accesspoint/x/y",
    ],
)  # fmt: skip
def test_what_is_no_secret_stays(url: str) -> None:
    assert not has_secret(url)
    if "key" not in url.partition("?")[2][:3]:
        assert redact(url) == url


@given(st.text(max_size=60), st.sampled_from(CARRIERS))
def test_no_text_around_it_hides_a_secret(text: str, carrier: str) -> None:
    assert SECRET not in redact(f"{text} {carrier.format(SECRET)} {text}")
    assert has_secret(f"https://h/{quote(text)}?sig={SECRET}")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x1b]0;title\x07b", r"a\x1b[2J\x1b]0;title\x07b"),
        ("in/x\nbalanced: every sample", r"in/x\nbalanced: every sample"),
        ("a\r\tb\x7f\x9b", r"a\r\tb\x7f\x9b"),
        ("gpj\u202e.tar \u2028 \u2067", r"gpj\u202e.tar \u2028 \u2067"),
        ("not UTF-8 \udcff", r"not UTF-8 \udcff"),
        (
            "other settings:\n  precision: fp32\n  dtype: float32",
            "other settings:\n  precision: fp32\n  dtype: float32",
        ),
        ("\n[1] shards", "\n[1] shards"),
        ("ünï 코드 😀 [x]", "ünï 코드 😀 [x]"),
    ],
)
def test_what_would_command_a_terminal_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert show(text) == shown
    show(text).encode()


@given(st.text())
def test_no_text_begins_a_line_of_its_own(text: str) -> None:
    shown = show(f"BROKEN {text}")
    assert all(line.startswith("  ") for line in shown.split("\n")[1:])
    assert not set(shown) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)]))
