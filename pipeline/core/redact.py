"""What of a URL is a secret: found, so that it can be refused, and struck from every message."""

from __future__ import annotations

import re

REFUSAL = (
    "must not carry credentials: give them by the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or by the "
    "machine's role"
)
# What stands before a host: `user:password@` or `token@`. The secret half of a key often holds a slash, so that
# its `@` may come later than the first; and slashes after the scheme are forgotten.
_USERINFO = re.compile(
    r"(?<=://)()[^/\s@'\"]+(?=@)|(?:(?<=://)|(?:^|(?<=[\s'\"]))([a-z][a-z0-9+.-]*:/{0,3}))[^/\s@'\"]*:[^\s@'\"]+(?=@)",
    re.IGNORECASE,
)
# What signs or permits a request in its query or fragment: of S3, of Google, of Azure, and of no one in particular.
_QUERY = re.compile(
    r"(?<=[?&#])(x-(?:amz|goog)-[\w-]+|sig|[\w.-]*(?:signature|token|secret|password|api[_-]?key|access_?key_?id|"
    r"accessid|credential))=[^&#\s'\"]+",
    re.IGNORECASE,
)


def has_secret(url: str) -> bool:
    """Whether a URL carries credentials. A local path never does: `?` and `#` are names there."""
    return bool(_USERINFO.search(url) or ("://" in url and _QUERY.search(url)))


def redact(text: str) -> str:
    """`text` with `***` in place of every secret that stands in a URL."""
    return _QUERY.sub(r"\1=***", _USERINFO.sub(lambda match: f"{match[1] or match[2] or ''}***", text))


def describe(error: BaseException) -> str:
    """An error's type and text without what may be a secret in it."""
    text = redact(str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
