"""One local connection: bytes to frames and back, nothing of their meaning but who attached.

Invariants: a frame that cannot be read, or is too large, closes this connection and nothing else; while the client
does not read, it is not read from, so what is buffered for it stays bounded.
"""

import asyncio
import logging
from typing import Protocol, cast

import msgspec

from services.kv_transfer.sessions import HOST
from shared.kv.messages import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Answer,
    AnyAnswer,
    AnyPush,
    Attach,
    Call,
    decode_call,
    encode,
)

log = logging.getLogger(__name__)

ATTACH_S = 10.0  # for a fresh connection to say who it is


class Handler(Protocol):
    def opened(self, connection: "StoreConnection") -> bool: ...
    def called(self, connection: "StoreConnection", call: Call) -> None: ...
    def spoiled(self, connection: "StoreConnection", reason: str) -> None: ...
    def closed(self, connection: "StoreConnection") -> None: ...


class StoreConnection(asyncio.Protocol):
    """`attached` and `pending` are the server's to change."""

    def __init__(self, handler: Handler, serial: int) -> None:
        self.serial = serial
        self.attached: Attach | None = None
        self.pending: dict[int, int] = {}  # ticket number -> call id
        self._handler = handler
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._attach_timer: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        who = self.attached
        if who is None:
            return f"connection {self.serial}"
        return f"{who.worker}'s host" if who.kind == HOST else f"{who.worker}'s {who.kind} {who.rank}"

    def send(self, call_id: int, body: AnyAnswer | AnyPush) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(Answer(call_id, body)))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def has_spoken(self) -> None:
        """It has attached, or waits for that to become possible."""
        if self._attach_timer is not None:
            self._attach_timer.cancel()
            self._attach_timer = None

    # ---- asyncio.Protocol ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its base class
        if not self._handler.opened(self):
            self._transport.abort()
            return
        self._attach_timer = asyncio.get_running_loop().call_later(ATTACH_S, self.abort)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            body = start + HEADER_BYTES
            length = int.from_bytes(self._buffer[start:body], "little")
            if length > MAX_FRAME_BYTES:
                self._spoil(f"a frame of {length} bytes")
                return
            if len(self._buffer) < body + length:
                break
            try:
                call = decode_call(bytes(self._buffer[body : body + length]))
            except msgspec.DecodeError as error:  # ValidationError is one, too
                self._spoil(str(error))
                return
            start = body + length
            self._handler.called(self, call)
        del self._buffer[:start]

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, _error: Exception | None) -> None:
        self.has_spoken()
        self._handler.closed(self)

    def _spoil(self, reason: str) -> None:
        self._buffer.clear()
        self._handler.spoiled(self, reason)
        self.abort()
