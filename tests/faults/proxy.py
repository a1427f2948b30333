"""An S3 endpoint that fails as told: a proxy on loopback before a real server.

The client signs the host it talks to, so requests go on with their headers unchanged. Faults are rules
with a count; what no rule takes passes through. Every request is in `requests`, with what became of it.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, NamedTuple
from urllib.parse import urlsplit


class Request(NamedTuple):
    """One request that reached the proxy. `fault` is empty where it passed."""

    method: str
    path: str
    fault: str


@dataclass
class Rule:
    """`fault` happens to requests of `method` (a pattern) whose path matches `path`, `times` times.

    Answers of its own: `slow_down` (503), `error` (500), `denied` (403), `missing` (404), `empty` (200 with
    no body).
    Broken answers: `reset` and `cut` (the connection breaks after half of the body), `short` (half of the
    body, with a Content-Length that says so), `drip` (the body, a byte every `seconds`), `stall` (half of the
    body, then nothing for `seconds`).
    No answer: `silent` (nothing for `seconds`), `hang_up` (closed at once, not passed on), `lost` (passed
    on, then closed without the answer), `unread` (the request's body is not even read, for `seconds`).
    Slow: `late` (passed on and answered after `seconds`).
    No fault of the network: `meanwhile` (`action` is run, then the request is passed on).
    """

    fault: str
    path: str = ""
    method: str = ""
    times: int = 1
    seconds: float = 30.0
    action: Callable[[], None] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def takes(self, method: str, path: str) -> bool:
        """Whether the request is hit; counts down."""
        if not (re.fullmatch(self.method or ".*", method) and re.search(self.path, path)):
            return False
        with self._lock:
            self.times -= 1
            return self.times >= 0


_ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "missing": (404, "NoSuchKey", "The specified key does not exist."),
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    proxy: ClassVar[FaultProxy]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def handle_expect_100(self) -> bool:
        rule = self.proxy.match(self.command, self.path)
        if rule is not None and rule.fault == "unread":
            # Invite the body, and leave it in the socket: small enough buffers make the sender wait.
            self.send_response_only(100)
            self.end_headers()
            self._note(rule)
            self.proxy.stopped.wait(rule.seconds)
            self._break()
            return False
        self._rule = rule
        return super().handle_expect_100()

    def _handle(self) -> None:
        rule = self.__dict__.pop("_rule", None) or self.proxy.match(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._note(rule)
        fault = rule.fault if rule is not None else ""
        if fault in _ANSWERS:
            status, code, text = _ANSWERS[fault]
            answer = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], answer)
        elif fault == "empty":
            self._answer(200, [], b"")
        elif rule is not None and fault == "silent":
            self.proxy.stopped.wait(rule.seconds)
            self._break()
        elif fault == "hang_up":
            self._break()
        elif rule is not None and rule.action is not None:
            rule.action()
            self._forward(body, None)
        else:
            self._forward(body, rule)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _note(self, rule: Rule | None) -> None:
        self.proxy.requests.append(Request(self.command, self.path, rule.fault if rule is not None else ""))

    def _forward(self, body: bytes, rule: Rule | None) -> None:
        upstream = http.client.HTTPConnection(self.proxy.target, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            data = response.read()
        except OSError:
            # The server behind is down: so is this one.
            self._break()
            return
        finally:
            upstream.close()
        passed = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in ("connection", "transfer-encoding")
        ]
        if rule is not None and rule.fault == "lost":
            self._break()
        elif rule is not None and rule.fault == "late":
            self.proxy.stopped.wait(rule.seconds)
            self._answer(response.status, passed, data)
        elif rule is not None:
            self._spoil(response.status, passed, data, rule)
        else:
            self._answer(response.status, passed, data)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _spoil(self, status: int, headers: list[tuple[str, str]], body: bytes, rule: Rule) -> None:
        half = body[: len(body) // 2]
        if rule.fault == "short":
            self._answer(status, headers, half)
        elif rule.fault == "drip":
            self._answer(status, headers, b"", len(body))
            for byte in body:
                self.wfile.write(bytes([byte]))
                if self.proxy.stopped.wait(rule.seconds):
                    break
        else:
            self._answer(status, headers, half, len(body))
            if rule.fault == "stall":
                self.proxy.stopped.wait(rule.seconds)
            self._break(reset=rule.fault == "reset")

    def _break(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            # With this, closing sends RST and drops what is not sent yet.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def shutdown_request(self, request: socket.socket) -> None:
        """Close, without the FIN that the standard library sends before: it would come before an RST."""
        if struct.unpack("ii", request.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (1, 0):
            self.close_request(request)
        else:
            super().shutdown_request(request)

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class FaultProxy:
    """Stands before `endpoint` while entered."""

    def __init__(self, endpoint: str) -> None:
        self.target = urlsplit(endpoint).netloc
        self.rules: list[Rule] = []
        self.requests: list[Request] = []
        self.stopped = threading.Event()
        handler = type("_Handler", (_Handler,), {"proxy": self})
        self._server = _Server(("127.0.0.1", 0), handler)

    @property
    def url(self) -> str:
        """The endpoint that clients are to use."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def add(self, fault: str, path: str = "", method: str = "", times: int = 1, seconds: float = 30.0) -> Rule:
        """Add a rule; the first that takes a request decides."""
        self.rules.append(Rule(fault, path, method, times, seconds))
        return self.rules[-1]

    def meanwhile(self, action: Callable[[], None], path: str = "", method: str = "") -> Rule:
        """Add a rule: `action` happens once, just before a request is passed on."""
        self.rules.append(Rule("meanwhile", path, method, action=action))
        return self.rules[-1]

    def match(self, method: str, path: str) -> Rule | None:
        """The rule that takes this request, if any."""
        return next((rule for rule in self.rules if rule.takes(method, path)), None)

    def count(self, method: str = "", path: str = "", fault: str | None = None) -> int:
        """Requests seen of a method and path (patterns), of one fault, or of any and none."""
        return sum(
            bool(re.fullmatch(method or ".*", request.method) and re.search(path, request.path))
            and fault in (None, request.fault)
            for request in list(self.requests)
        )

    def __enter__(self) -> FaultProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
