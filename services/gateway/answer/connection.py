"""One client's TCP connection: uvicorn's HTTP protocol with a deadline and a bound on everything that it waits for.

Invariants: a connection that gives no complete head, takes no bytes or sends no end of a body is ended by a timer; what
it can hold in memory is bounded; nothing is written into an answer that has begun; every refusal has OpenAI's shape.
The timers cost a request nothing: they are set only when a head comes in pieces or a write blocks.
"""

import asyncio
import contextlib
import enum
import resource
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httptools
from prometheus_client import CollectorRegistry, Counter, Gauge
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from services.gateway.answer import errors
from shared.errors import BatonError, HeadersTooLarge, InvalidRequest, NoCapacity, RequestTimeout

MAX_HEAD_BYTES = 32 * 1024  # request line and headers; up to one SLICE_BYTES more may have been parsed
MAX_HEADERS = 100
MAX_PIPELINED = 16  # requests sent ahead on one connection
MAX_LINGERING = 256  # refused connections that may still read their answer
SLICE_BYTES = 16 * 1024  # of a head parsed at once: 256 KiB of small headers would stall the loop for tens of ms
LINGER_S = 2.0  # to read an answer that came before the end of the request; closing at once may destroy it
SPARE_FILES = 256  # descriptors that are not clients: the bus, Redis, model files, probes
CONNECTION = "baton.connection"  # scope key: the Connection that the request came on
RETRY_AFTER_S = 1.0


class ConnectionFigures:
    """What this gateway's connections have in common."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._cut = Counter(
            "baton_connections_cut_total",
            "Connections refused or ended here",
            ("reason",),
            registry=registry,
        )
        self._open = Gauge("baton_connections", "Open client connections", registry=registry)
        self._blocked = Gauge("baton_blocked_writes", "Clients that take no bytes now", registry=registry)
        self.lingering = 0

    def watch(self, count: Callable[[], int]) -> None:
        self._open.set_function(count)

    def blocked(self, change: int) -> None:
        self._blocked.inc(change)

    def cut(self, reason: str) -> None:
        self._cut.labels(reason).inc()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    header_s: float  # for a complete head
    write_s: float  # that a client may take no bytes
    max_connections: int
    traffic: ConnectionFigures = field(compare=False)


class _Part(enum.Enum):
    """Of a request, what the parser is in."""

    NONE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()


class Connection(HttpToolsProtocol):
    def __init__(self, *args: Any, limits: Limits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # paths and queries are clients' words
        self._limits = limits
        self._answering: RequestResponseCycle | None = None  # `cycle` is the last one that was sent ahead
        self._part = _Part.NONE
        self._head_bytes = 0
        self._objection: BatonError | None = None  # why a callback stopped the parser
        self._deaf = False  # refused: what still comes is dropped
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._on_gone: Callable[[], None] | None = None
        self._on_writable: Callable[[], None] | None = None

    # ---- from the transport --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        if len(self.connections) >= self._limits.max_connections:
            self.transport = transport
            self._refuse(NoCapacity("too many connections", retry_after_s=RETRY_AFTER_S), "full")
            return
        super().connection_made(transport)
        self._reading = self.loop.call_later(self._limits.header_s, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_reading_timer()
        self._stop_writing_timer()
        if self._deaf:
            self._limits.traffic.lingering -= 1
        self._hang_up()  # uvicorn tells only the last of those sent ahead
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        try:
            if len(data) <= SLICE_BYTES or self._part is _Part.BODY:
                self._feed(data)
            else:
                for start in range(0, len(data), SLICE_BYTES):
                    self._feed(data[start : start + SLICE_BYTES])
        except httptools.HttpParserError:
            if self._objection is None:
                self._refuse(InvalidRequest("this is not valid HTTP/1.1"), "bad_http")
            else:
                self._refuse(self._objection, self._objection.code)
            return
        if self._reading is None and (self._part is _Part.HEAD or (self._part is _Part.NONE and not self._busy())):
            self._reading = self.loop.call_later(self._limits.header_s, self._head_late)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_writing_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_writing_timer()
        if self._on_writable is not None:
            self._on_writable()

    # ---- from the parser -----------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[CONNECTION] = self  # type: ignore[literal-required]
        self._part = _Part.HEAD
        if len(self.pipeline) >= MAX_PIPELINED:
            self._object(InvalidRequest(f"at most {MAX_PIPELINED} requests may be sent ahead"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEADERS:
            self._object(HeadersTooLarge(f"a request may have up to {MAX_HEADERS} headers"))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_reading_timer()
        if self.parser.get_method() == b"CONNECT":
            self._object(InvalidRequest("this is not a proxy"))
        if not self.parser.should_upgrade():  # else `_stay` comes here again
            super().on_headers_complete()
        self._part = _Part.BODY

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._part = _Part.NONE
        self._head_bytes = 0
        self._stop_reading_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_writing_timer()  # a close waits until the client has taken everything
        elif self._part is _Part.BODY and self._reading is None:
            self._reading = self.loop.call_later(LINGER_S, self.cut, "slow_body")

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._start_writing_timer()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # ---- for the application -------------------------------------------------------------------------------

    def attend(self, on_gone: Callable[[], None], on_writable: Callable[[], None]) -> bool:
        """Until `leave`, the request that is being answered hears that its client left, or takes bytes again.

        False: the client has left already.
        """
        self._on_gone, self._on_writable = on_gone, on_writable
        self.keep_listening()
        return not (self._answering is None or self._answering.disconnected or self.transport.is_closing())

    def keep_listening(self) -> None:
        """Who does not read the socket does not hear that the client leaves; requests sent ahead pause reading."""
        self.flow.resume_reading()

    def leave(self) -> None:
        self._on_gone = self._on_writable = None

    @property
    def flows(self) -> bool:
        """The client takes more at once."""
        return not self.flow.write_paused

    def start_stream(self, status: int, headers: errors.Headers, data: bytes) -> None:
        """The head of an answer in chunks, and its first bytes."""
        cycle = self._started()
        if cycle is not None:
            cycle.chunked_encoding = True
            head = self._head(cycle, status, [*headers, (b"transfer-encoding", b"chunked")])
            self.transport.write(b"%b%x\r\n%b\r\n" % (head, len(data), data))

    def push(self, data: bytes) -> None:
        """More of it. A write that blocks is the caller's to avoid (`flows`); `write_s` ends it."""
        if not self.transport.is_closing():
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def end_stream(self, data: bytes) -> None:
        """The last of it."""
        cycle = self._answering
        if cycle is not None and not cycle.disconnected:
            self.transport.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n")
            self._completed(cycle)

    def answer(self, status: int, headers: errors.Headers, body: bytes) -> None:
        """All of an answer."""
        cycle = self._started()
        if cycle is not None:
            head = self._head(cycle, status, [*headers, (b"content-length", b"%d" % len(body))])
            self.transport.write(head + body)
            self._completed(cycle)

    def _started(self) -> RequestResponseCycle | None:
        """None: nobody reads any more."""
        cycle = self._answering
        if cycle is None or cycle.disconnected:
            return None
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        return cycle

    def _head(self, cycle: RequestResponseCycle, status: int, headers: errors.Headers) -> bytes:
        lines = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            if name == b"connection":  # uvicorn adds `close` when it shuts down
                cycle.keep_alive = False
            else:
                lines += (name, b": ", value, b"\r\n")
        lines.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        return b"".join(lines)

    def _completed(self, cycle: RequestResponseCycle) -> None:
        """As uvicorn's own `send` ends an answer."""
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()

    # ---- ends ----------------------------------------------------------------------------------------------

    def cut(self, reason: str) -> None:
        """At once, and what was not written yet is lost. The application hears that the client has left."""
        if not self.transport.is_closing() or self._writing is not None:
            self._limits.traffic.cut(reason)
            self.transport.abort()

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._stay(data[upgrade.args[0] :])
            return
        if self._part is _Part.HEAD:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._object(HeadersTooLarge(f"a request's head may have up to {MAX_HEAD_BYTES} bytes"))

    def _stay(self, rest: bytes) -> None:
        """No upgrade is served, and a client that offers one (h2c, as Java's does) is answered in HTTP/1.1.

        The parser would take the body for another protocol's bytes: a new one reads the head without the offer.
        """
        head = [self.parser.get_method(), b" ", self.url, b" HTTP/1.1\r\n"]
        for name, value in self.headers:
            if name not in (b"upgrade", b"connection", b"http2-settings"):
                head += [name, b": ", value, b"\r\n"]
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"".join([*head, b"\r\n", rest]))

    def _object(self, error: BatonError) -> None:
        """Stops the parser in the middle of what it was given."""
        self._objection = error
        raise httptools.HttpParserError(error.code)

    def _refuse(self, error: BatonError, reason: str) -> None:
        """An answer that no application gives, then the end."""
        self._limits.traffic.cut(reason)
        self._stop_reading_timer()
        if self._answering is not None and self._busy() and self._answering.response_started:
            self.transport.abort()  # nothing else may be written into an answer
            return
        self._hang_up()  # an application that has not spoken yet hears that the client has left
        self._deaf = True
        self._limits.traffic.lingering += 1
        self.transport.write(_answer(error))
        if self._limits.traffic.lingering > MAX_LINGERING or not self.transport.can_write_eof():
            self.transport.close()
            return
        with contextlib.suppress(OSError):  # the client was faster
            self.transport.write_eof()
        self._reading = self.loop.call_later(LINGER_S, self.transport.abort)

    def _head_late(self) -> None:
        self._reading = None
        if self._busy():  # reading may be paused behind the answer: look again later
            self._reading = self.loop.call_later(self._limits.header_s, self._head_late)
        elif self._part is _Part.HEAD:
            self._refuse(RequestTimeout("the request's head did not arrive in time"), "slow_head")
        else:
            self.cut("idle")

    def _busy(self) -> bool:
        return self._answering is not None and not self._answering.response_complete

    def _hang_up(self) -> None:
        if self._answering is not None and not self._answering.response_complete:
            self._answering.disconnected = True
            self._answering.message_event.set()
        if self._on_gone is not None:
            self._on_gone()

    def _start_writing_timer(self) -> None:
        if self._writing is None:
            self._limits.traffic.blocked(1)
            self._writing = self.loop.call_later(self._limits.write_s, self.cut, "slow_reader")

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
            self._limits.traffic.blocked(-1)

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None


def room(wanted: int) -> int:
    """How many connections the process may have, at most `wanted`, after raising its limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return wanted if soft == resource.RLIM_INFINITY else max(1, min(wanted, soft - SPARE_FILES))


def _answer(error: BatonError) -> bytes:
    status, headers, body = errors.render(error)
    headers += [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        (b"x-request-id", uuid.uuid4().hex.encode()),
    ]
    lines = [name + b": " + value + b"\r\n" for name, value in headers]
    return b"".join([STATUS_LINE[status], *lines, b"\r\n", body])
