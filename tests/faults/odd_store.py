"""A small S3 in memory that lacks what some stores lack: on loopback, and without signatures."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

_DATE = "Thu, 01 Jan 2026 10:00:00 GMT"
_LISTED_DATE = "2026-01-01T10:00:00.123Z"
_MAX_KEY_BYTES = 1024


@dataclass
class Quirks:
    """What is odd about a store. The answers are (status, code)."""

    delete_many: tuple[int, str] | None = None  # to a request that deletes many
    conditional: tuple[int, str] | None = None  # to If-None-Match
    ignores_conditions: bool = False
    has_etags: bool = True
    has_dates: bool = True
    token: Callable[[int], str | None] = str  # of the page that begins there
    page_size: int = 1000
    # Called with the method and key of each request, before it takes effect.
    before: Callable[[str, str], None] = lambda method, key: None
    put_fault: Callable[[str], tuple[int, str] | None] = lambda key: None  # the answer to a PUT of this key


@dataclass
class Stored:
    """What a bucket holds, and which requests came."""

    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)  # of each request, names in lower case
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ClassVar[OddStore]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def _handle(self) -> None:
        body = self._body()
        split = urlsplit(self.path)
        key = unquote(split.path).lstrip("/").partition("/")[2]
        query = {name: values[0] for name, values in parse_qs(split.query, keep_blank_values=True).items()}
        store, quirks = self.store, self.store.quirks
        quirks.before(self.command, key)
        with store.stored.lock:
            store.stored.requests.append((self.command, key or split.query))
            store.stored.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._answer_to(key, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in (self.headers.get("Content-Encoding") or ""):
            return body
        pieces, rest = [], body
        while rest:
            head, _, rest = rest.partition(b"\r\n")
            size = int(head.split(b";")[0], 16)
            if not size:
                break
            pieces.append(rest[:size])
            rest = rest[size + 2 :]
        return b"".join(pieces)

    def _answer_to(self, key: str, query: dict[str, str], body: bytes) -> None:
        objects, quirks = self.store.stored.objects, self.store.quirks
        if self.command == "POST" and "delete" in query:
            if quirks.delete_many is not None:
                self._refuse(*quirks.delete_many)
                return
            for text in re.findall(r"<Key>(.*?)</Key>", body.decode(), re.DOTALL):
                objects.pop(text, None)
            self._send(200, b'<DeleteResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"></DeleteResult>')
        elif self.command == "PUT":
            self._put(key, body)
        elif self.command == "DELETE":
            objects.pop(key, None)
            self._send(204, b"")
        elif not key:
            self._list(query)
        elif key not in objects:
            self._refuse(404, "NoSuchKey")
        else:
            self._get(objects[key])

    def _put(self, key: str, body: bytes) -> None:
        objects, quirks = self.store.stored.objects, self.store.quirks
        fault = quirks.put_fault(key) or ((400, "KeyTooLongError") if len(key.encode()) > _MAX_KEY_BYTES else None)
        if fault is not None:
            self._refuse(*fault)
            return
        if self.headers.get("If-None-Match") is not None:
            if quirks.conditional is not None:
                self._refuse(*quirks.conditional)
                return
            if key in objects and not quirks.ignores_conditions:
                self._refuse(412, "PreconditionFailed")
                return
        objects[key] = body
        self._send(200, b"", ETag=_etag(body))

    def _get(self, data: bytes) -> None:
        about = {"ETag": _etag(data)} if self.store.quirks.has_etags else {}
        if self.store.quirks.has_dates:
            about["Last-Modified"] = _DATE
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if span:
            start, end = int(span[1]), min(int(span[2]) + 1, len(data))
            about["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
            self._send(206, data[start:end], **about)
        else:
            self._send(200, data, **about)

    def _list(self, query: dict[str, str]) -> None:
        quirks = self.store.quirks
        prefix = query.get("prefix", "")
        keys = sorted(key for key in self.store.stored.objects if key.startswith(prefix))
        token = query.get("continuation-token", "0")
        start = int(token) if token.isdecimal() else 0
        page = keys[start : start + quirks.page_size]
        more = start + len(page) < len(keys)
        following = quirks.token(start + len(page)) if more else None
        entries = "".join(self._entry(key) for key in page)
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>bkt</Name><Prefix>{escape(quote(prefix))}</Prefix><EncodingType>url</EncodingType>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>"
            f"{f'<NextContinuationToken>{following}</NextContinuationToken>' if following is not None else ''}"
            f"{entries}</ListBucketResult>"
        )
        self._send(200, text.encode())

    def _entry(self, key: str) -> str:
        data, quirks = self.store.stored.objects[key], self.store.quirks
        etag = f"<ETag>{escape(_etag(data))}</ETag>" if quirks.has_etags else ""
        date = f"<LastModified>{_LISTED_DATE}</LastModified>" if quirks.has_dates else ""
        return f"<Contents><Key>{escape(quote(key))}</Key><Size>{len(data)}</Size>{etag}{date}</Contents>"

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, f"<Error><Code>{code}</Code><Message>{code}, says the store.</Message></Error>".encode())

    def _send(self, status: int, body: bytes, **headers: Any) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class OddStore:
    """One bucket, `bkt`, while entered. `quirks` may be changed at any time."""

    def __init__(self) -> None:
        self.quirks = Quirks()
        self.stored = Stored()
        self._server = _Server(("127.0.0.1", 0), type("_Handler", (_Handler,), {"store": self}))

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which it is found."""
        return {
            "AWS_ACCESS_KEY_ID": "any",
            "AWS_SECRET_ACCESS_KEY": "any",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def count(self, method: str, key: str = "") -> int:
        """Requests of a method whose key, or else query, matches the pattern `key`."""
        return sum(seen == method and bool(re.search(key, path)) for seen, path in list(self.stored.requests))

    def __enter__(self) -> OddStore:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
