"""HTTP as a load generator needs it: raw sockets kept alive, one parser a connection, deadlines swept, retries.

Invariants: a request ends in one settled `Answer`, whatever the server does; a connection serves one request at a time
and goes back only after a whole response; a client that leaves closes its socket.
"""

import asyncio
import errno
import random
import ssl
import time
from collections import deque
from typing import Self, cast

import httptools
import msgspec

from loadtest.load import retry
from loadtest.load.answer import RECEIPT_HEADER, Answer, Outcome
from loadtest.load.records import Try

KEPT_HEADERS = frozenset({b"content-type", b"retry-after", b"retry-after-ms", b"x-should-retry", RECEIPT_HEADER})
IDLE_S = 3.0  # servers close idle connections after 5 s and more; a request must not meet that
SWEEP_S = 0.1


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where to connect; `authority` is what the Host header says."""

    host: str
    port: int
    tls: bool
    authority: str
    server_name: str = ""  # for TLS
    prefix: str = ""  # of paths
    headers: tuple[tuple[str, str], ...] = ()  # of every request


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, and the most sockets at once."""

    connections: int = 10_000
    connect_s: float = 5.0
    first_byte_s: float = 120.0  # from the request's last byte
    progress_s: float = 60.0  # between two reads
    total_s: float = 600.0  # of one attempt
    retries: int = 0


class NoConnection(Exception):
    """Every socket that this process may have was busy for as long as a first byte may take."""


class Connection(asyncio.Protocol):
    """One socket. `answer`: of the request that it serves now."""

    _transport: asyncio.Transport

    def __init__(self, pool: "Pool") -> None:
        self.answer: Answer | None = None
        self.idle_since_s = 0.0
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._ended = self._keeps_alive = False

    def begin(self, request: bytes, answer: Answer) -> None:
        self.answer = answer
        answer.sent_s = answer.heard_s = time.monotonic()
        self._transport.write(request)
        if answer.leaves_at_once:
            answer.settle(Outcome.LEFT, "", answer.sent_s)
            self._transport.close()  # after the request is out: the server has work to give up

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is not one of asyncio's

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        if self.answer is not None:
            self.answer.broken(time.monotonic())
            self.answer = None
        self._pool.lost(self)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        answer = self.answer
        if answer is None:
            self._transport.abort()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            answer.settle(Outcome.ERROR, "bad_http", now)
        if self._parts:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
            answer.body(body, now)
        if self._ended:
            self._ended = False
            answer.complete(now)
            self.answer = None
            if self._keeps_alive:
                self._pool.give(self, now)
            else:
                self._transport.abort()
        elif answer.outcome is not None:
            self._transport.abort()

    def sweep(self, now: float, limits: Limits) -> None:
        answer = self.answer
        if answer is None:
            return
        if now - answer.sent_s > limits.total_s:
            code = "total"
        elif answer.status is None and now - answer.sent_s > limits.first_byte_s:
            code = "first_byte"
        elif answer.status is not None and now - answer.heard_s > limits.progress_s:
            code = "progress"
        else:
            return
        answer.settle(Outcome.TIMEOUT, code, now)
        self._transport.abort()

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name in KEPT_HEADERS and self.answer is not None:
            self.answer.headers[name] = value

    def on_headers_complete(self) -> None:
        if self.answer is not None:
            self.answer.head(self._parser.get_status_code())

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self._ended = True
        self._keeps_alive = self._parser.should_keep_alive()  # known only here


class Pool:
    """The connections to one endpoint."""

    def __init__(self, endpoint: Endpoint, limits: Limits) -> None:
        self._endpoint, self._limits = endpoint, limits
        self._tls = ssl.create_default_context() if endpoint.tls else None
        self._open: set[Connection] = set()
        self._opening = 0
        self._idle: dict[Connection, None] = {}  # the last is the warmest
        self._waiting: deque[asyncio.Future[Connection | None]] = deque()
        self._sweeper: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._sweep()

    def close(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self._open):
            connection.abort()

    async def take(self) -> Connection:
        """Raises OSError (a TimeoutError is one) or NoConnection."""
        while True:
            found = self._warm()
            if found is not None:
                return found
            if len(self._open) + self._opening < self._limits.connections:
                return await self._connect()
            given = await self._wait()
            if given is not None:
                return given

    def give(self, connection: Connection, now: float) -> None:
        connection.idle_since_s = now
        if not self._wake(connection):
            self._idle[connection] = None

    def lost(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._idle.pop(connection, None)
        self._wake(None)

    async def _wait(self) -> Connection | None:
        """None: there is room for another one."""
        waiter: asyncio.Future[Connection | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._limits.first_byte_s):
                return await asyncio.shield(waiter)
        except (TimeoutError, asyncio.CancelledError) as error:
            if not waiter.done():
                waiter.cancel()
            elif (given := waiter.result()) is not None:
                self.give(given, time.monotonic())
            if isinstance(error, TimeoutError):
                raise NoConnection from None
            raise

    def _warm(self) -> Connection | None:
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        if time.monotonic() - connection.idle_since_s < IDLE_S:
            return connection
        for cold in (connection, *self._idle):  # the warmest is too cold, so all are
            cold.abort()
        self._idle.clear()
        return None

    async def _connect(self) -> Connection:
        end = self._endpoint
        self._opening += 1
        try:
            async with asyncio.timeout(self._limits.connect_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self),
                    end.host,
                    end.port,
                    ssl=self._tls,
                    server_hostname=end.server_name if self._tls else None,
                )
        except BaseException:
            self._wake(None)
            raise
        finally:
            self._opening -= 1
        self._open.add(connection)
        return connection

    def _wake(self, connection: Connection | None) -> bool:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return True
        return False

    def _sweep(self) -> None:
        now = time.monotonic()
        for connection in list(self._open):
            connection.sweep(now, self._limits)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_S, self._sweep)


class Reply(msgspec.Struct, frozen=True):
    """The last attempt's answer, and what came before it."""

    answer: Answer
    first_sent_s: float  # 0: nothing was ever sent
    attempts: int


class Attempts:
    """Of one request so far, for whoever may not see its end: those that failed, and the one that is in flight."""

    def __init__(self) -> None:
        self.failed: list[Try] = []
        self.now: Answer | None = None


class Client:
    """`async with Client(...) as client: await client.post(path, body)`."""

    def __init__(self, endpoint: Endpoint, limits: Limits, rng: random.Random) -> None:
        self._limits, self._rng = limits, rng
        self._pool = Pool(endpoint, limits)
        self._prefix = endpoint.prefix
        given = "".join(f"{name}: {value}\r\n" for name, value in endpoint.headers)
        self._head = (
            f"host: {endpoint.authority}\r\ncontent-type: application/json\r\naccept: text/event-stream\r\n{given}"
        )
        self._heads: dict[tuple[str, int], bytes] = {}
        self.no_connection = 0  # requests that found no socket free

    async def __aenter__(self) -> Self:
        self._pool.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._pool.close()

    async def post(
        self, path: str, body: bytes, attempts: Attempts, *, keep: bool = False, leave_after: int | None = None
    ) -> Reply:
        """Never raises for what a server or a network does."""
        first_sent_s = 0.0
        taken = 0
        while True:
            answer = attempts.now = Answer(keep=keep, leave_after=leave_after)
            await self._attempt(self._request(path, body, taken), answer)
            first_sent_s = first_sent_s or answer.sent_s
            now_s = time.time()
            outcome = answer.outcome or Outcome.ERROR
            if outcome not in (Outcome.OK, Outcome.LEFT):
                attempts.failed.append(_failed(answer, outcome, now_s))
            if taken >= self._limits.retries or not retry.retryable(outcome, answer.status, answer.headers, now_s):
                return Reply(answer, first_sent_s, taken + 1)
            attempts.now = None
            await asyncio.sleep(retry.delay_s(taken, answer.headers, now_s, self._rng.random()))
            taken += 1

    async def _attempt(self, request: bytes, answer: Answer) -> None:
        try:
            connection = await self._pool.take()
        except NoConnection:
            self.no_connection += 1
            answer.settle(Outcome.TIMEOUT, "no_connection", time.monotonic())
            return
        except OSError as error:
            answer.settle(Outcome.UNREACHABLE, _why(error), time.monotonic())
            return
        connection.begin(request, answer)
        try:
            await answer.done
        except asyncio.CancelledError:
            connection.abort()
            raise

    def _request(self, path: str, body: bytes, retries_taken: int) -> bytes:
        head = self._heads.get((path, retries_taken))
        if head is None:
            count = f"x-stainless-retry-count: {retries_taken}\r\n" if retries_taken else ""
            head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}{count}content-length: ".encode()
            self._heads[(path, retries_taken)] = head
        return b"%s%d\r\n\r\n%s" % (head, len(body), body)


def _failed(answer: Answer, outcome: Outcome, now_s: float) -> Try:
    """Times are those of `time.monotonic`; an attempt that never found a socket was sent when it ended."""
    queued_ms = answer.receipt.stages_ms.get("queue") if answer.receipt is not None else None
    return Try(
        sent_s=answer.sent_s or answer.end_s,
        end_s=answer.end_s,
        outcome=outcome,
        status=answer.status,
        code=answer.code,
        retry_after_s=retry.retry_after_s(answer.headers, now_s),
        queued_s=None if queued_ms is None else queued_ms / 1e3,
    )


def _why(error: OSError) -> str:
    for kind, name in ((ConnectionRefusedError, "refused"), (TimeoutError, "connect_timeout"), (ssl.SSLError, "tls")):
        if isinstance(error, kind):
            return name
    return errno.errorcode.get(error.errno or 0, type(error).__name__).lower()
