"""One HTTP exchange on a hot route, in plain ASGI messages.

Invariants: the body is bounded; a client that leaves is noticed while it waits and while it reads; a stream that is
silent for `idle_s` gets its headers and a comment; after the first byte an error is one event, before it a status.
"""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from services.gateway import http_errors
from services.gateway.chores import Chores
from services.gateway.edge.render import WAITING, error_event
from services.gateway.receipt import HEADER, Receipt, merged
from shared.errors import BatonError, BodyTooLarge, Cancelled, InvalidRequest, Timeout

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

BODY_S = 30.0  # for the whole body to arrive
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    def __init__(self, scope: Message, receive: Receive, send: Send, *, max_body_bytes: int, idle_s: float) -> None:
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._idle_s = idle_s
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._watcher: asyncio.Task[None] | None = None
        self._written = False  # since the watcher looked last
        self.id = uuid.uuid4().hex
        self._given_id = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = self._given_id if REQUEST_ID.fullmatch(self._given_id) else self.id
        self.traceparent = self._headers.get(b"traceparent", b"").decode("latin-1")
        self.receipts = [Receipt()]  # one a prompt
        self.streams = False  # the client asked for events
        self.started = False  # headers are out

    @property
    def receipt(self) -> Receipt:
        return merged(self.receipts)

    async def body(self) -> bytes:
        """Raises InvalidRequest, BodyTooLarge, Timeout, or Cancelled when the client leaves while sending."""
        if self._given_id and self.request_id != self._given_id:
            raise InvalidRequest("x-request-id: up to 128 letters, digits and . _ : -", param="x-request-id")
        if int(self._headers.get(b"content-length", b"0") or b"0") > self._max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Cancelled("the client left")
                    part: bytes = message.get("body", b"")
                    size += len(part)
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise Timeout("the body did not arrive in time") from None

    def watch(self, chores: Chores, on_gone: Callable[[], None]) -> None:
        """From now on, until `release`: call `on_gone` when the client leaves, keep a silent stream alive."""
        self._watcher = chores.start(self._watch(on_gone))

    def release(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def open_stream(self) -> None:
        self.started = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await self._start(200, headers)

    async def write(self, data: bytes) -> None:
        self._written = True
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def close(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def answer(self, status: int, body: bytes, headers: http_errors.Headers | None = None) -> None:
        self.started = True
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, [(b"content-type", b"application/json"), length, *(headers or [])])
        await self.close(body)

    async def fail(self, error: BatonError) -> None:
        if self.started:
            # Never a faked finish, and no [DONE]: the client's library raises on the event.
            await self.close(error_event(error))
        else:
            status, headers, body = http_errors.render(error)
            await self.answer(status, body, headers)

    async def _start(self, status: int, headers: http_errors.Headers) -> None:
        headers.append((b"x-request-id", self.request_id.encode()))
        receipt = self.receipt
        if receipt.path is not None or receipt.stages_ms is not None:
            headers.append((HEADER, receipt.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _watch(self, on_gone: Callable[[], None]) -> None:
        while True:
            try:
                async with asyncio.timeout(self._idle_s):
                    message = await self._receive()
            except TimeoutError:
                if self.streams and not self._written:
                    await self._keep_alive()
                self._written = False
                continue
            if message["type"] == "http.disconnect":
                on_gone()
                return

    async def _keep_alive(self) -> None:
        if not self.started:
            await self.open_stream()
        await self._send({"type": "http.response.body", "body": WAITING, "more_body": True})

    def _too_large(self) -> BodyTooLarge:
        return BodyTooLarge(f"the body may have up to {self._max_body_bytes} bytes")
