"""A web server of files on loopback, of which each kind lacks something that others have."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import unquote, urlsplit


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a server has."""

    ranges: bool = True
    lengths: bool = True  # without, an answer says nothing of its size
    etags: bool = True
    dates: bool = True
    head: bool = True
    index: bool = False  # pages that list a folder
    redirects: bool = False  # to where the file is, as hubs do


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: ClassVar[WebServer]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        """As GET, or not at all."""
        if self.server_.kind.head:
            self.do_GET()
        else:
            self._send(405, b"")

    def do_GET(self) -> None:
        """A file, or a page of those in a folder."""
        server = self.server_
        path = unquote(urlsplit(self.path).path)
        server.requests.append((self.command, self.path))
        if path in server.statuses:
            self._send(server.statuses[path], b"")
        elif server.kind.redirects and not path.startswith("/cdn/") and path in server.files:
            self._send(302, b"", Location=f"/cdn{self.path}")
        elif path.removeprefix("/cdn") in server.files:
            self._file(server.files[path.removeprefix("/cdn")])
        elif server.kind.index and path.endswith("/"):
            rests = (name[len(path) :].partition("/") for name in server.files if name.startswith(path))
            below = sorted({first + slash for first, slash, _ in rests})
            links = "".join(f'<a href="{name}">{name}</a>\n' for name in ["?C=M;O=D", "../", *below])
            self._send(200, f"<html>{links}</html>".encode(), Content_Type="text/html")
        elif server.kind.index and any(name.startswith(f"{path}/") for name in server.files):
            self._send(301, b"", Location=f"{path}/")
        else:
            self._send(404, b"")

    def _file(self, data: bytes) -> None:
        kind = self.server_.kind
        about = {"ETag": f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'} if kind.etags else {}
        if kind.dates:
            about["Last-Modified"] = "Thu, 01 Jan 2026 10:00:00 GMT"
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if not span or not kind.ranges:
            self._send(200, data, **about)
        elif int(span[1]) >= len(data):
            self._send(416, b"", Content_Range=f"bytes */{len(data)}")
        else:
            start, end = int(span[1]), min(int(span[2]) + 1, len(data))
            if end - start > 1:
                self.server_.read_paths.append(self.path)
                if self.path in self.server_.held:
                    self.server_.released.wait()
            self._send(206, data[start:end], Content_Range=f"bytes {start}-{end - 1}/{len(data)}", **about)

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if self.server_.kind.lengths or status != 200:
            self.send_header("Content-Length", str(len(body)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class WebServer:
    """Serves `files` (by path) while entered; `statuses` are answers to some paths in place of what is there.

    `read_paths` are those of which more than a byte was asked for; of what is `held`, that waits until `released`.
    """

    def __init__(self, kind: Kind, files: dict[str, bytes]) -> None:
        self.kind = kind
        self.files = files
        self.statuses: dict[str, int] = {}
        self.held: set[str] = set()
        self.released = threading.Event()
        self.read_paths: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self._server = _Server(("127.0.0.1", 0), type("_Handler", (_Handler,), {"server_": self}))

    @property
    def url(self) -> str:
        """Without a slash at its end."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> WebServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
