"""The door through which text leaves: no secret of a URL passes, and no character that commands a terminal."""

from __future__ import annotations

import re
from urllib.parse import unquote

REFUSAL = (
    "must not carry credentials: give them by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by the "
    "machine's role"
)
# What stands before a host: `user:password@` or `token@`. The secret half of a key often holds a slash, so that
# its `@` may come later than the first; and slashes after the scheme are forgotten.
_USERINFO = re.compile(
    r"(?<=://)()[^/\s@'\"]+(?=@)|(?:(?<=://)|(?:^|(?<=[\s'\"=]))([a-z][a-z0-9+.-]*:/{0,3}))[^/\s@'\"]*:[^\s@'\"]+(?=@)",
    re.IGNORECASE,
)
# What signs or permits a request in its query, fragment or matrix: of S3, Google, Azure, Akamai, and no one in
# particular. Short words must be all of a name: there is an `author`, a `keyword` and a `postcode`.
_NAME = (
    r"x-(?:amz|goog)-[\w-]+|[\w.-]*(?:signature|token|secret|password|passwd|passphrase|credential|accessid|hdnea|"
    r"(?:api|access|account|shared|private|signing|subscription)[_-]?key(?:[_-]?id)?)|"
    r"(?:[\w.-]*[_.-])?(?:key|auth|authorization|jwt|pass|pwd|code|sas|sig|hmac)"
)
_QUERY = re.compile(rf"((?:[?&#;]|%3F|%26|%23|%3B)(?:{_NAME})(?:=|%3D))(?!\*\*\*)[^&#;\s'\"]+", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:/[^\s'\"]+", re.IGNORECASE)
# Of ASCII and Latin-1, of lines and paragraphs, of the direction of writing, and halves of characters. A line that
# follows one of ours is indented: what begins a line is ours.
_COMMANDS = re.compile(
    r"(?<!^)\n(?!  )|[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def has_secret(url: str) -> bool:
    """Whether a URL carries credentials. A local path never does: `?` and `#` are names there."""
    spellings = {url, unquote(url), unquote(unquote(url))}
    return any(_USERINFO.search(text) or ("://" in text and _QUERY.search(text)) for text in spellings)


def redact(text: str) -> str:
    """`text` with `***` in place of every secret that stands in a URL."""
    struck = _QUERY.sub(r"\1***", _USERINFO.sub(lambda match: f"{match[1] or match[2] or ''}***", text))
    # A secret that is still there is spelled with escapes.
    return _URL.sub(lambda url: f"{url[0].partition(':')[0]}://***" if _is_hiding(url[0]) else url[0], struck)


def _is_hiding(url: str) -> bool:
    """Whether a URL without secrets in it has some when its escapes are read."""
    plain = unquote(url)
    return plain != url and redact(plain) != plain


def show(text: str) -> str:
    """`text` as it may be printed: without secrets, and with control characters as `\\x1b`.

    A line break stays where the next line is indented by two spaces, and at the begin.
    """
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode(), redact(text))


def describe(error: BaseException) -> str:
    """An error's type and text without what may be a secret in it."""
    text = redact(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
