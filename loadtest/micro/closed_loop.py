"""A closed loop of streams over raw sockets, for rates at which reading a stream with care would be the limit.

Each connection sends its next request when the last has ended. Events are counted, not parsed: what is checked is
that each answer reports as many tokens as were asked for. Rates come from events, not from whole answers: in a closed
loop these end in waves, and a short window has a wave more or less. A gap is the time between two reads that brought
events; events of one read have a gap of 0 among them, as a client sees it. Time to first token counts to the first
read that brought text.
"""

import asyncio
import itertools
import re
import socket
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import psutil
import uvloop

EVENT = b"data: {"
NO_TOKEN = (b'"role":', b'"choices":[]')  # in the first event of a chat, and in the usage event
DONE = b"data: [DONE]"
LAST_CHUNK = b"0\r\n\r\n"
TEXT = re.compile(rb'"(?:content|text)": ?"[^"]')
USAGE = re.compile(rb'"completion_tokens": ?(\d+)')
TAIL_BYTES = 512  # holds the usage event
LEAVE_S = 30.0


@dataclass
class Seen:
    """What came while the clock ran. Seconds."""

    tokens: int = 0
    answers: int = 0  # that ended
    joined: int = 0  # events that came with another: gaps of 0
    reads: int = 0
    elapsed_s: float = 0.0
    ttft_s: "array[float]" = field(default_factory=lambda: array("d"))
    gaps_s: "array[float]" = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter)
    cpu_s: dict[str, float] = field(default_factory=dict)  # by process


@dataclass(frozen=True, kw_only=True)
class Course:
    """What is driven, how long, and whose CPU time is taken."""

    address: tuple[str, int]
    requests: Sequence[bytes]  # whole HTTP requests, sent in turns
    tokens: int  # that each answer must report
    concurrency: int
    warm_s: float
    measured_s: float
    processes: Mapping[str, psutil.Process]


def drive(course: Course) -> Seen:
    """Blocks until it is over; on a loop of its own, so call it in a thread. Raises OSError when nobody listens."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Loop(course).run())


class _Loop:
    def __init__(self, course: Course) -> None:
        self.course = course
        self.seen = Seen()
        self.next_request = itertools.cycle(course.requests).__next__
        self.is_measuring = False
        self.is_over = False
        self._left = asyncio.Event()
        self._open = 0
        self._replacing: set[asyncio.Task[None]] = set()

    async def run(self) -> Seen:
        course, loop = self.course, asyncio.get_running_loop()
        for _ in range(course.concurrency):
            await loop.create_connection(lambda: _Client(self), *course.address)
        await asyncio.sleep(course.warm_s)
        before, started = self._cpu(), time.perf_counter()
        self.is_measuring = True
        await asyncio.sleep(course.measured_s)
        self.is_measuring = False
        self.seen.elapsed_s = time.perf_counter() - started
        self.seen.cpu_s = {name: spent - before[name] for name, spent in self._cpu().items()}
        self.is_over = True
        async with asyncio.timeout(LEAVE_S):
            if self._open:
                await self._left.wait()
        return self.seen

    def came(self) -> None:
        self._open += 1

    def went(self) -> None:
        self._open -= 1
        if not self._open:
            self._left.set()

    def error(self, what: str) -> None:
        if self.is_measuring:
            self.seen.errors[what] += 1

    def again(self, connect: Callable[[], "_Client"]) -> None:
        """A connection that broke is replaced, so that the load stays what it is."""
        task = asyncio.create_task(self._connect(connect))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)

    async def _connect(self, connect: Callable[[], "_Client"]) -> None:
        try:
            await asyncio.get_running_loop().create_connection(connect, *self.course.address)
        except OSError as error:
            self.error(f"connect: {error.strerror}")
            self.went()

    def _cpu(self) -> dict[str, float]:
        return {name: cpu_s(process) for name, process in self.course.processes.items()}


class _Client(asyncio.Protocol):
    """One connection: one stream after another."""

    def __init__(self, loop: _Loop, *, replaces: bool = False) -> None:
        self._loop = loop
        self._replaces = replaces
        self._transport: asyncio.Transport | None = None
        self._counts = False
        self._status = b""
        self._tail = b""
        self._sent_s = self._last_s = 0.0
        self._is_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's own class is not one of asyncio's
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self._replaces:
            self._loop.came()
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        loop = self._loop
        if loop.is_over:
            loop.went()
            return
        loop.error(f"closed: {type(exc).__name__}" if exc else f"closed after status {self._status.decode() or '-'}")
        loop.again(lambda: _Client(loop, replaces=True))

    def _ask(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._loop.is_over:
            self._transport.close()
            return
        self._status = self._tail = b""
        self._last_s = 0.0
        self._is_done = False
        self._counts = self._loop.is_measuring
        self._sent_s = time.perf_counter()
        self._transport.write(self._loop.next_request())

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self._status:
            self._status = data[9:12]
            if self._status != b"200":
                self._loop.error(f"status {self._status.decode('latin-1')}")
                self._refused()
                return
        events = occurrences(self._tail, data, EVENT)
        if events:
            self._note(data, events, now)
        if self._loop.is_measuring:
            self._loop.seen.tokens -= sum(occurrences(self._tail, data, mark) for mark in NO_TOKEN)
        end = self._tail + data if len(data) < TAIL_BYTES else data
        self._tail = end[-TAIL_BYTES:]
        if not self._is_done and DONE in self._tail:
            self._is_done = True
            self._count()
        if self._is_done and self._tail.endswith(LAST_CHUNK):
            self._ask()

    def _note(self, data: bytes, events: int, now: float) -> None:
        seen, is_measuring = self._loop.seen, self._loop.is_measuring
        if is_measuring:
            seen.reads += 1
            seen.tokens += events
        if self._last_s:
            if is_measuring:
                seen.gaps_s.append(now - self._last_s)
                seen.joined += events - 1
            self._last_s = now
        elif TEXT.search(data):
            if is_measuring and self._counts:
                seen.ttft_s.append(now - self._sent_s)
                seen.joined += events - 1
            self._last_s = now

    def _count(self) -> None:
        """The end of an answer."""
        found = USAGE.search(self._tail)
        tokens = int(found[1]) if found else 0
        if tokens != self._loop.course.tokens:
            self._loop.error(f"{tokens} tokens instead of {self._loop.course.tokens}")
        elif self._loop.is_measuring:
            self._loop.seen.answers += 1

    def _refused(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def occurrences(before: bytes, data: bytes, mark: bytes) -> int:
    """How often a mark ends in `data`, which came after `before`; one may lie across both."""
    rest = len(mark) - 1
    return data.count(mark) + (before[-rest:] + data[:rest]).count(mark)


def cpu_s(process: psutil.Process) -> float:
    """User and system time of a process; it is still there, or somebody has said so already."""
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
