"""GET /dashboard: the page and its files, which hold no data, and the events that fill it.

Invariants: nothing on the page comes from elsewhere or runs inline; data is never kept by a cache; a key that is
revoked ends what it had opened.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from importlib import resources

from fastapi import FastAPI, Request, Response
from starlette.types import Receive, Scope, Send

from services.gateway.access.access import Access
from services.gateway.observe.dashboard.feed import Feed
from shared.errors import BatonError

PAGE = "/dashboard"
KEYS = b"@KEYS@"  # in the page
ASSETS = "/dashboard/assets/"
EVENTS = "/dashboard/events"
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SAFE = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
FRESH = {"cache-control": "no-cache"}  # asked for again each time, answered with 304
PRIVATE = {"cache-control": "no-store", "x-accel-buffering": "no"}

Check = Callable[[], object]


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def add_routes(app: FastAPI, feed: Feed, access: Access) -> None:
    files = _files(wants_keys=access.wants_keys)

    @app.get(PAGE, include_in_schema=False)
    async def page(request: Request) -> Response:
        return _answer(request, files["index.html"])

    @app.get(ASSETS + "{name}", include_in_schema=False)
    async def asset(request: Request, name: str) -> Response:
        found = files.get(name)
        return Response(status_code=404, headers=SAFE) if found is None else _answer(request, found)

    @app.get(EVENTS, include_in_schema=False)
    async def events(request: Request) -> Response:
        authorization = request.headers.get("authorization", "").encode("latin-1")
        frames = feed.watch()
        return Events(await anext(frames), frames, lambda: access.client(authorization))


def _files(*, wants_keys: bool) -> dict[str, _File]:
    """The page asks for a key before it is told to: a refusal would look like a fault of its own."""
    found = {}
    for file in resources.files(__package__).joinpath("assets").iterdir():
        content = file.read_bytes().replace(KEYS, b"wanted" if wants_keys else b"none")
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        found[file.name] = _File(content, TYPES[file.name.rpartition(".")[2]], etag)
    return found


def _answer(request: Request, file: _File) -> Response:
    headers = {**SAFE, **FRESH, "etag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


class Events(Response):
    """Sends frames until they end, the client leaves, or its key is no longer good."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, frames: AsyncGenerator[bytes], check: Check) -> None:
        super().__init__(headers={**SAFE, **PRIVATE})
        del self.headers["content-length"]
        self._first = first
        self._frames = frames
        self._check = check

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                sending, leaving = tasks.create_task(self._send(send)), tasks.create_task(_gone(receive))
                sending.add_done_callback(lambda _: leaving.cancel())
                leaving.add_done_callback(lambda _: sending.cancel())
        finally:
            await self._frames.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for frame in self._frames:
            try:
                self._check()
            except BatonError:
                break
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
