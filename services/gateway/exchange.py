"""One HTTP exchange on a hot route, in plain ASGI messages.

Invariants: the body is bounded; a client that leaves is noticed while it waits and while it reads, and one that reads
too slowly is cut off; a stream that is silent for `idle_s` gets its headers and a comment; after the first byte an
error is one event, before it a status.
"""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from services.gateway import http_errors
from services.gateway.chores import Chores
from services.gateway.edge.connection import CUT, DIRECT, Direct
from services.gateway.edge.intake import Intake
from services.gateway.edge.render import WAITING, error_event
from services.gateway.receipt import HEADER, Receipt, merged
from shared.errors import BatonError, BodyTooLarge, Cancelled, InvalidRequest, RequestTimeout, UnsupportedMedia

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

JSON = re.compile(rb"application/(?:[\w.-]+\+)?json(?:\s*;.*)?", re.IGNORECASE)
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Exchange:
    def __init__(
        self,
        scope: Message,
        receive: Receive,
        send: Send,
        *,
        intake: Intake,
        max_body_bytes: int,
        body_s: float,
        idle_s: float,
    ) -> None:
        self._receive = receive
        self._send = send
        self._intake = intake
        self._held_bytes = 0  # of the body, until it is checked
        self._max_body_bytes = max_body_bytes
        self._body_s = body_s
        self._idle_s = idle_s
        self._cut: Callable[[str], None] | None = scope.get(CUT)
        self._direct: Direct | None = scope.get(DIRECT)
        self._old = scope["http_version"] == "1.0"
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._watcher: asyncio.Task[None] | None = None
        self._written = False  # since the watcher looked last
        self.id = uuid.uuid4().hex
        self._given_id = self._headers.get(b"x-request-id", b"").decode("latin-1")
        self.request_id = self._given_id if REQUEST_ID.fullmatch(self._given_id) else self.id
        self.traceparent = self._headers.get(b"traceparent", b"").decode("latin-1")
        self.authorization = self._headers.get(b"authorization", b"")
        self.headers: http_errors.Headers = []  # of the answer, beside its own
        self.receipts = [Receipt()]  # one a prompt
        self.streams = False  # the client asked for events
        self.started = False  # headers are out

    @property
    def receipt(self) -> Receipt:
        return merged(self.receipts)

    async def body(self) -> bytes:
        """Raises a RequestError, QueueFull, or Cancelled when the client leaves while sending."""
        self._check_headers()
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self._body_s):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Cancelled("the client left")
                    part: bytes = message.get("body", b"")
                    if self._held_bytes + len(part) > self._max_body_bytes:
                        raise self._too_large()
                    self._intake.take(len(part))
                    self._held_bytes += len(part)
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise RequestTimeout("the body did not arrive in time") from None

    def watch(self, chores: Chores, on_gone: Callable[[], None]) -> None:
        """From now on, until `release`: call `on_gone` when the client leaves, keep a silent stream alive."""
        self._watcher = chores.start(self._watch(on_gone))

    def checked(self) -> None:
        """The body is not held any more."""
        self._intake.give_back(self._held_bytes)
        self._held_bytes = 0

    def release(self) -> None:
        self.checked()
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # it ends with a traceback that has this exchange

    def overrun(self) -> None:
        """The client reads more slowly than tokens come, and as much waits for it as may."""
        if self._cut is not None:
            self._cut("overrun")

    def check_stream(self) -> None:
        """Raises InvalidRequest where none can be sent."""
        if self.streams and self._old:
            raise InvalidRequest("stream: needs HTTP/1.1", param="stream")

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

    @property
    def flows(self) -> bool:
        """The answer has begun, and the client takes more at once: `push` may be used."""
        return self.started and self._direct is not None and self._direct.flows

    def push(self, data: bytes) -> None:
        """`write` without a task, while it `flows`."""
        if self._direct is not None:
            self._written = True
            self._direct.push(data)

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

    def _check_headers(self) -> None:
        headers = self._headers
        if self._given_id and self.request_id != self._given_id:
            raise InvalidRequest("x-request-id: up to 128 letters, digits and . _ : -", param="x-request-id")
        if not JSON.fullmatch(headers.get(b"content-type", b"application/json")):
            raise UnsupportedMedia("content-type: must be application/json", param="content-type")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedMedia("content-encoding: bodies are taken as they are only", param="content-encoding")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body_bytes:  # the parser lets only digits through
            raise self._too_large()

    async def _start(self, status: int, headers: http_errors.Headers) -> None:
        headers += [(b"x-request-id", self.request_id.encode()), *self.headers]
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
