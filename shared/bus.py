"""NATS as Baton uses it: typed request/reply and publish, with trace context in the headers.

Invariants: every request has a deadline and a reply subject, so a missing responder is an instant `WorkerLost`; every
handler guards each message, so one bad message is counted and answered, never fatal; a `Failure` reply is raised
again as the error it stands for. Handlers of requests run concurrently, at most `max_handlers` at once. Answers to all
questions come through one subscription: the client's own `request` makes a task and a random name for each. Messages
are decoded and handed on where the parser finds them (nats_client.py).
"""

import asyncio
import contextlib
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
from typing import Any, Generic, TypeVar

import msgspec
import nats
import nats.errors
from nats.aio.subscription import Subscription
from opentelemetry.context import Context

from shared import telemetry, wire
from shared.bus_login import Account, inbox, login, not_joined
from shared.errors import BatonError, BusUnavailable, Internal, SettingsError, Timeout, WorkerLost, from_wire
from shared.nats_client import Headers, NatsClient
from shared.settings import CommonSettings

log = logging.getLogger(__name__)

M = TypeVar("M", bound=wire.Message)
RequestHandler = Callable[[wire.AnyMessage, Context], Awaitable[wire.Message]]
JobHandler = Callable[[wire.AnyMessage, Headers, "Reply"], None]
MessageHandler = Callable[[wire.AnyMessage], None]

MAX_PAYLOAD_BYTES = 8 * 1024 * 1024
CONNECT_S = 10.0
TRIP_S = 5.0  # to the server and back, for who waits;
ABANDONED_S = 60.0  # an answer that nobody waits for: a dead connection is found sooner
REMEMBERED = 16  # latest errors, for the line that says why nobody could be joined
NO_RESPONDERS = "503"  # the server's status where nobody listens


class Bus:
    """One connection to NATS. Create with `connect`, end with `close`."""

    def __init__(self, client: NatsClient, *, inbox: str, max_handlers: int) -> None:
        self._client = client
        self._max_handlers = max_handlers
        self._handlers: set[asyncio.Task[None]] = set()
        self._inbox = f"{inbox}.{uuid.uuid4().hex}"
        self._trips: set[asyncio.Task[None]] = set()
        self._numbers = count()
        self._open: dict[
            str, Callable[[wire.AnyMessage | BatonError], None]
        ] = {}  # questions, by number; who asks has a deadline
        self.bad_messages = 0  # read by each service's metrics
        self.refused = 0  # subjects that this service's user may not use
        self.reconnects = 0  # each time, what others published meanwhile may be lost

    @classmethod
    async def open(cls, settings: CommonSettings, name: str) -> "Bus":
        """As a service's settings say. Raises SettingsError."""
        account = Account(user=settings.nats_user, password=settings.nats_password, tls=settings.tls)
        return await cls.connect(settings.nats_url, name, account)

    @classmethod
    async def connect(cls, url: str, name: str, account: Account | None = None, *, max_handlers: int = 4096) -> "Bus":
        """Raises SettingsError when no server takes us within CONNECT_S: at start that is a configuration matter."""
        servers, user, options = login(url, account or Account())
        client = NatsClient(must_encrypt=any(server.startswith("tls://") for server in servers))
        bus = cls(client, inbox=inbox(user), max_handlers=max_handlers)
        said: deque[str] = deque(maxlen=REMEMBERED)

        async def on_error(error: Exception) -> None:
            said.append(str(error) or type(error).__name__)
            if "permissions violation" in said[-1].lower():
                bus.refused += 1
            log.warning("bus: %s: %s", type(error).__name__, error)

        async def on_disconnect() -> None:
            log.warning("bus: disconnected")

        async def on_reconnect() -> None:
            bus.reconnects += 1
            log.info("bus: connected again")

        try:
            async with asyncio.timeout(CONNECT_S):
                await client.connect(
                    servers,
                    name=name,
                    **options,
                    error_cb=on_error,
                    disconnected_cb=on_disconnect,
                    reconnected_cb=on_reconnect,
                    connect_timeout=2,
                    reconnect_time_wait=0.2,  # seconds; fractions work
                    max_reconnect_attempts=-1,
                    ping_interval=5,
                    max_outstanding_pings=2,
                )
                await client.handle(f"{bus._inbox}.*", bus._on_answer)
        except (OSError, TimeoutError, nats.errors.Error) as error:
            await client.close()
            raise SettingsError(not_joined(servers, said)) from error
        return bus

    @property
    def connected(self) -> bool:
        return bool(self._client.is_connected)

    @property
    def running_handlers(self) -> int:
        return len(self._handlers)

    async def request(self, subject: str, message: wire.Message, expect: type[M], *, timeout_s: float) -> M | wire.Busy:
        """Ask and wait. Busy is an answer; a Failure is raised.

        Raises WorkerLost when nobody listens there, Timeout, BusUnavailable, or the error that the other side sent.
        """
        return await Question(self, subject, message, expect).answer(timeout_s)

    # ---- questions whose answers are taken by a plain function ---------------------------------------------

    def expect(self, on_answer: Callable[[wire.AnyMessage | BatonError], None]) -> str:
        """Open a question; returns its number. `on_answer` gets the first answer, or the error that it carries.

        Whoever opens it closes it: with `forget`, unless it was answered, and sees to its deadline.
        """
        number = str(next(self._numbers))
        self._open[number] = on_answer
        return number

    def forget(self, number: str) -> None:
        self._open.pop(number, None)

    def reply_subject(self, number: str) -> str:
        """Where its answers go, whoever gives them."""
        return f"{self._inbox}.{number}"

    async def ask(self, subject: str, message: wire.Message, number: str, *, headers: Headers = None) -> None:
        """Send a question that was opened. `headers`: of its trace. Raises BusUnavailable."""
        await self.publish(subject, message, reply=self.reply_subject(number), headers=headers)

    def _on_answer(self, subject: str, _: str, data: bytes, headers: Headers) -> None:
        on_answer = self._open.pop(subject.rpartition(".")[2], None)
        if on_answer is None:
            return
        try:
            on_answer(_answer_of(data, headers))
        except Exception:  # one bad answer must not silence all others
            self.bad_messages += 1
            log.exception("bus: an answer was dropped")

    # ---- messages ------------------------------------------------------------------------------------------

    async def publish(self, subject: str, message: wire.Message, *, reply: str = "", headers: Headers = None) -> None:
        """Send and forget. `reply`: where an answer goes, to whomever; `headers`: of a trace. Raises BusUnavailable."""
        try:
            await self._client.publish(subject, wire.encode(message), reply=reply, headers=headers or None)
        except (nats.errors.Error, OSError) as error:
            raise BusUnavailable(f"the bus is away: {type(error).__name__}") from error

    async def serve(self, subject: str, handler: RequestHandler) -> Subscription:
        """Answer requests on a subject, each in a task of its own, with the sender's trace context."""

        def on_message(_: str, reply: str, data: bytes, headers: Headers) -> None:
            if len(self._handlers) >= self._max_handlers:
                answer = self._respond(reply, wire.Busy(reason="max_handlers"))
            else:
                answer = self._answer(reply, data, headers, handler)
            self._start(answer)

        return await self._client.handle(subject, on_message)

    async def take(self, subject: str, handler: JobHandler) -> Subscription:
        """Hand requests to a plain function, which sees to the answer; what it raises is one. It must not block."""

        def on_message(_: str, reply_to: str, data: bytes, headers: Headers) -> None:
            reply = Reply(self, reply_to)
            try:
                handler(_decode(data), headers, reply)
            except Exception as error:  # noqa: BLE001 - the boundary: the asker gets an answer whatever went wrong
                reply.give_soon(self._failure_of(error))

        return await self._client.handle(subject, on_message)

    async def listen(self, subject: str, handler: MessageHandler) -> Subscription:
        """Call a plain function for each published message, in order, on the loop. It must not block."""

        def on_message(where: str, _: str, data: bytes, __: Headers) -> None:
            try:
                handler(wire.decode(data))
            except Exception:  # one bad message must not silence the subscription
                self.bad_messages += 1
                log.exception("bus: message on %s dropped", where)

        return await self._client.handle(subject, on_message)

    async def round_trip(self) -> None:
        """To the server and back, once. Raises BusUnavailable, after TRIP_S at the latest.

        In a task that goes on when nobody waits any more: an answer to who was cancelled ends the client's reading,
        and a cancellation that comes with the answer is lost in its `wait_for` (Python 3.11).
        """
        if not self.connected:
            raise BusUnavailable("the bus is away")
        trip = asyncio.create_task(self._client.flush(timeout=ABANDONED_S))
        self._trips.add(trip)
        trip.add_done_callback(self._returned)
        try:
            async with asyncio.timeout(TRIP_S):
                await asyncio.shield(trip)
        except (nats.errors.Error, OSError, TimeoutError) as error:
            raise BusUnavailable(f"the bus is away: {type(error).__name__}") from error

    def _returned(self, trip: "asyncio.Task[None]") -> None:
        self._trips.discard(trip)
        if not trip.cancelled():
            trip.exception()  # whoever waits has been told

    async def flush(self) -> None:
        """Until the server has seen everything sent so far, e.g. that a subscription is in place.

        Raises BusUnavailable.
        """
        # nats-py writes its PING before what it has in its buffer; that goes out while the first PONG is awaited.
        for _ in range(2):
            await self.round_trip()

    async def close(self) -> None:
        """Cancel running handlers and disconnect."""
        for task in self._handlers:
            task.cancel()
        await asyncio.gather(*self._handlers, return_exceptions=True)
        with contextlib.suppress(OSError, nats.errors.Error):  # the server may have gone first
            await self._client.close()
        for trip in self._trips:
            trip.cancel()
        await asyncio.gather(*self._trips, return_exceptions=True)

    def _start(self, answer: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(answer)
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _answer(self, reply_to: str, data: bytes, headers: Headers, handler: RequestHandler) -> None:
        try:
            reply = await handler(_decode(data), telemetry.extract(headers))
        except Exception as error:  # noqa: BLE001 - the boundary: the asker gets an answer whatever went wrong
            reply = self._failure_of(error)
        await self._respond(reply_to, reply)

    def _failure_of(self, error: Exception) -> wire.Failure:
        if isinstance(error, BatonError):
            return failure(error)
        self.bad_messages += 1
        log.error("bus: a handler failed", exc_info=error)
        return wire.Failure(code=Internal.code, message="internal error")

    async def _respond(self, reply_to: str, reply: wire.Message) -> None:
        if not reply_to:
            return
        try:
            await self._client.publish(reply_to, wire.encode(reply))
        except (nats.errors.Error, OSError) as error:
            log.warning("bus: reply lost: %s", type(error).__name__)


class Reply:
    """The answer to one message: the first one that is given."""

    __slots__ = ("_bus", "_to", "is_given")

    def __init__(self, bus: Bus, to: str) -> None:
        self._bus = bus
        self._to = to
        self.is_given = False

    async def give(self, message: wire.Message) -> None:
        if not self.is_given:
            self.is_given = True
            await self._bus._respond(self._to, message)  # noqa: SLF001

    def give_soon(self, message: wire.Message) -> None:
        """For plain functions."""
        self._bus._start(self.give(message))  # noqa: SLF001


class Question(Generic[M]):
    """One request on its way; `end` ends it from outside."""

    def __init__(self, bus: Bus, subject: str, message: wire.Message, expect: type[M]) -> None:
        self._bus = bus
        self._subject = subject
        self._message = message
        self._expect = expect
        self._loop = asyncio.get_running_loop()
        self._answer: asyncio.Future[wire.AnyMessage] = self._loop.create_future()

    def end(self, error: BatonError) -> None:
        """Whoever waits for the answer gets this instead, unless it is here."""
        if not self._answer.done():
            self._answer.set_exception(error)

    async def answer(self, timeout_s: float) -> M | wire.Busy:
        """See Bus.request."""
        late = Timeout(f"no answer on {self._subject} within {timeout_s:g} s")
        timer = self._loop.call_later(timeout_s, self.end, late)
        number = self._bus.expect(self._take)
        try:
            if not self._answer.done():
                await self._bus.ask(self._subject, self._message, number, headers=telemetry.inject())
            reply = await self._answer
        finally:
            timer.cancel()
            self._bus.forget(number)
            # Of the future an exception is told even if this task is cancelled meanwhile.
            if not self._answer.cancel() and not self._answer.cancelled():
                self._answer.exception()
        if isinstance(reply, (self._expect, wire.Busy)):
            return reply
        raise Internal(f"unexpected {type(reply).__name__} on {self._subject}")

    def _take(self, reply: wire.AnyMessage | BatonError) -> None:
        if isinstance(reply, BatonError):
            self.end(reply)
        elif not self._answer.done():
            self._answer.set_result(reply)


def _answer_of(data: bytes, headers: Headers) -> wire.AnyMessage | BatonError:
    if not data and headers and headers.get("Status") == NO_RESPONDERS:
        return WorkerLost("nobody listens there")
    try:
        reply = _decode(data)
    except Internal as error:
        return error
    if isinstance(reply, wire.Failure):
        return from_wire(reply.code, reply.message, param=reply.param, retry_after_s=reply.retry_after_s)
    return reply


def failure(error: BatonError, backlog: wire.Backlog | None = None) -> wire.Failure:
    """The message that carries an error."""
    return wire.Failure(
        code=error.code,
        message=error.message,
        param=error.param,
        retry_after_s=error.retry_after_s,
        backlog=backlog or wire.Backlog(),
    )


def _decode(data: bytes) -> wire.AnyMessage:
    try:
        return wire.decode(data)
    except msgspec.DecodeError as error:
        raise Internal("a message could not be read") from error
