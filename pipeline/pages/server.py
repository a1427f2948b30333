"""The server of the live search page, over HTTP on one address.

A request names a row of the index, or carries an image; no path is ever made of it. What a page of another site can
send is refused: by its Origin, and on loopback by its Host, since a name of that site may lead here (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from importlib.resources import files
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from aiohttp import web

from shard_embedder.pipeline.core.errors import PipelineError, SampleError, SettingsError, ShardError
from shard_embedder.pipeline.core.formatting import format_size
from shard_embedder.pipeline.core.redact import redact
from shard_embedder.pipeline.core.threads import begin
from shard_embedder.pipeline.pages.html import show
from shard_embedder.pipeline.pages.live import Answer, LiveSearch

MAX_IMAGE_BYTES = 32 * 2**20
# Images that are received at once, and for how long.
_UPLOADS, _UPLOAD_S = 4, 60.0
# A decoder has 30 s of processor time for an image, and others may stand before it.
_SEARCH_S = 90.0
# Pictures that are read at once.
_READERS, _PICTURE_S = 4, 60.0
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; img-src data:; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}

_T = TypeVar("_T")
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Served(NamedTuple):
    """Where the page is, and whether only this machine reaches it."""

    url: str
    is_loopback: bool


@contextlib.contextmanager
def serving(
    live: LiveSearch, host: str = "127.0.0.1", port: int = 0, max_bytes: int = MAX_IMAGE_BYTES
) -> Iterator[Served]:
    """Serve the page in a thread while the block runs; port 0 is a free one.

    Raises:
        SettingsError: nothing can listen there.
    """
    listener = _listen(host, port)
    address, bound_port = listener.getsockname()[:2]
    is_loopback = ipaddress.ip_address(address.partition("%")[0]).is_loopback
    app = _Pages(live, max_bytes, {host.lower(), address} if is_loopback else None).app()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    try:
        loop.run_until_complete(runner.setup())
        loop.run_until_complete(web.SockSite(runner, listener).start())
        thread = threading.Thread(target=loop.run_forever, name="serve", daemon=True)
        thread.start()
        try:
            yield Served(f"http://{f'[{address}]' if ':' in address else address}:{bound_port}/", is_loopback)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
    finally:
        loop.run_until_complete(runner.cleanup())
        loop.close()
        listener.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host} port {port}: {error.strerror or error}") from error


class _Turns:
    """Calls in threads of their own, `count` at a time.

    One that takes longer than `max_s` is waited for no longer; its turn ends when it does.
    """

    def __init__(self, count: int, max_s: float) -> None:
        self._free = asyncio.Semaphore(count)
        self._max_s = max_s
        self._running: set[asyncio.Future[Any]] = set()

    async def __call__(self, call: Callable[[], _T]) -> _T:
        """What the call returns or raises. Raises `HTTPServiceUnavailable` where it takes too long."""
        try:
            async with asyncio.timeout(self._max_s):
                await self._free.acquire()
                running = asyncio.wrap_future(begin(call, "answer"))
                self._running.add(running)
                running.add_done_callback(self._end)
                return await asyncio.shield(running)
        except TimeoutError as error:
            raise web.HTTPServiceUnavailable(text=f"no answer within {self._max_s:.0f} s") from error

    def _end(self, running: asyncio.Future[Any]) -> None:
        self._running.discard(running)
        self._free.release()

    async def leave(self, _: web.Application) -> None:
        """Wait for none of them any longer."""
        for running in list(self._running):
            running.cancel()


class _Pages:
    """Requests and their answers. On loopback `names` are those of its host, else None."""

    def __init__(self, live: LiveSearch, max_bytes: int, names: set[str] | None) -> None:
        self._live = live
        self._max_bytes = max_bytes
        self._names = None if names is None else names | _LOOPBACK_NAMES
        self._page = live.page(max_bytes)
        self._script = (files(__package__) / "templates" / "live.js").read_text(encoding="utf-8")
        self._uploads = asyncio.Semaphore(_UPLOADS)
        # The device computes one image at a time.
        self._searches = _Turns(1, _SEARCH_S)
        self._pictures = _Turns(_READERS, _PICTURE_S)

    def app(self) -> web.Application:
        """All of it."""
        app = web.Application(middlewares=[self._answer], client_max_size=self._max_bytes)
        app.add_routes(
            [
                web.get("/", self._show_page),
                web.get("/live.js", self._show_script),
                web.get("/favicon.ico", self._show_no_icon),
                web.post("/near", self._near_image),
                web.get("/rows/{row:[0-9]{1,18}}/near", self._near_row),
                web.get("/rows/{row:[0-9]{1,18}}", self._picture),
            ]
        )
        app.on_cleanup.extend([self._searches.leave, self._pictures.leave])
        return app

    @web.middleware
    async def _answer(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """The answer of a handler, or its error as JSON."""
        try:
            self._check(request)
            response = await handler(request)
        except web.HTTPRequestEntityTooLarge:
            response = _error(413, f"an image must have at most {format_size(self._max_bytes)}")
        except web.HTTPException as error:
            response = _error(error.status, error.text or error.reason)
        except (SampleError, ShardError) as error:
            response = _error(422, str(error))
        except (PipelineError, OSError) as error:
            response = _error(500, str(error))
        response.headers.update(_HEADERS)
        return response

    def _check(self, request: web.Request) -> None:
        """Raise `HTTPForbidden` where the request may be of another site's page."""
        origin = request.headers.get("Origin")
        if origin is not None and origin not in (f"http://{request.host}", f"https://{request.host}"):
            raise web.HTTPForbidden(text=f"Origin must be this server's, got {origin!r}")
        if self._names is not None and _name_of(request.host) not in self._names:
            known = ", ".join(sorted(self._names))
            raise web.HTTPForbidden(text=f"Host must be one of {known}, got {request.host!r}")

    async def _show_page(self, _: web.Request) -> web.Response:
        return web.Response(text=self._page, content_type="text/html")

    async def _show_script(self, _: web.Request) -> web.Response:
        return web.Response(text=self._script, content_type="text/javascript")

    async def _show_no_icon(self, _: web.Request) -> web.Response:
        return web.Response(status=204)

    async def _near_image(self, request: web.Request) -> web.Response:
        if (request.content_length or 0) > self._max_bytes:
            raise web.HTTPRequestEntityTooLarge(self._max_bytes, request.content_length or 0)
        async with self._uploads:
            try:
                async with asyncio.timeout(_UPLOAD_S):
                    image = await request.read()
            except TimeoutError as error:
                raise web.HTTPRequestTimeout(text=f"the image did not arrive within {_UPLOAD_S:.0f} s") from error
            return _json(await self._searches(partial(self._live.by_image, image)))

    async def _near_row(self, request: web.Request) -> web.Response:
        return _json(await self._searches(partial(self._live.by_row, self._row(request))))

    async def _picture(self, request: web.Request) -> web.Response:
        return _json(await self._pictures(partial(self._live.picture, self._row(request))))

    def _row(self, request: web.Request) -> int:
        row = int(request.match_info["row"])
        if row >= self._live.num_rows:
            raise web.HTTPNotFound(text=f"row must be below {self._live.num_rows}, got {row}")
        return row


def _name_of(host: str) -> str | None:
    """The name or address in a Host, without the port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _json(answer: Answer, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(answer), status=status, content_type="application/json")


def _error(status: int, message: str) -> web.Response:
    return _json({"error": show(redact(message))}, status)
