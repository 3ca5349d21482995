"""TokenBatch -> the requests that wait for their rows.

A row goes to its stream's reader, a task; or, in the middle of an answer, straight through the stream's sink, a plain
function: a task that wakes for each token costs as much as all else that is done for it.

Invariants: reader and sink see every row once and in order; a row reaches a stream only if its attempt and sequence
fit: rows of another attempt are reported to `on_stranger` (which cancels them there), a hole fails the stream; what
waits in a stream is bounded; a stream fails once and stays failed; one bad row never keeps the others of its batch
from their streams.
"""

import asyncio
import logging
from collections.abc import Callable

import msgspec

from shared import wire
from shared.errors import BatonError, BusUnavailable, Cancelled, Internal, OutputLost, WorkerStalled, from_wire

log = logging.getLogger(__name__)

MAX_ROWS = 16_384  # of one prompt, unread: a client that does not read is cancelled rather than buffered
MAX_ROW_BYTES = 4 * 1024 * 1024  # what they may take, the first FREE_ROWS not counted
FREE_ROWS = 64
ROW_BYTES = 200  # of a row's objects
LOGPROB_BYTES = 300  # of one alternative
OVERDUE_S = 5.0  # far beyond an engine step: a stream that the bus cut off does not go on by itself

OnStranger = Callable[[str, str, int], None]  # worker, request, attempt
Sink = Callable[[list["Row"]], bool]  # takes all of these or, with False, none: they are the reader's


class Row(msgspec.Struct, frozen=True, gc=False):
    """One delta of one choice, or a piece of the prompt's log probabilities.

    Made once a token: a frozen dataclass takes 0.9 µs, this 0.1. It holds no cycle, so the collector may pass it by.
    """

    choice: int  # of the client's request, over all its prompts
    text: str
    tokens: bytes  # packed ids
    finish: wire.Finish | None = None
    logprobs: list[wire.TokenLogprob] | None = None
    prompt_logprobs: list[wire.TokenLogprob | None] | None = None


class Stream:
    """The rows of one (request, attempt), in order. One reader. `first`: the number its choice 0 has for the client."""

    def __init__(self, request: str, attempt: int, choices: int, first: int = 0) -> None:
        self.request = request
        self.attempt = attempt
        self.usage: wire.DecodeUsage | None = None
        self.tokens = 0  # completion tokens seen
        self.first = first
        self.on_overrun: Callable[[], None] | None = None  # its reader is too slow: called once
        self.sink: Sink | None = None  # asked while the reader waits
        self._open = choices  # choices without a finish yet
        self._choices = choices
        self._next = 0
        self._rows: list[Row] = []
        self._row_bytes = 0  # about
        self._error: BatonError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._watched_since: float | None = None  # None: no deadline on progress yet
        self._due_at: float | None = None  # of the next row, after the bus was away

    @property
    def ended(self) -> bool:
        """All rows have arrived; some may still be unread."""
        return self._open == 0

    @property
    def started(self) -> bool:
        """A row has arrived, read or not."""
        return self._next > 0

    async def read(self) -> list[Row]:
        """Every row that waits, at least one; empty at the end. Raises what the stream failed with."""
        if not self._rows and self._error is None and not self.ended:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self._rows:
            rows, self._rows = self._rows, []
            self._row_bytes = 0
            return rows
        if self._error is not None:
            raise self._error
        return []

    def fail(self, error: BatonError) -> None:
        """The reader gets the rows that are there, then the error. Too late after the end."""
        if self._error is None and not self.ended:
            self._error = error
            self._wake()

    def watch(self, now: float) -> None:
        """From now on the stream must make progress."""
        self._watched_since = now

    def check(self, now: float, progress_s: float) -> None:
        if self._watched_since is not None and now - self._watched_since > progress_s:
            self.fail(WorkerStalled(f"no token for {progress_s:g} s"))
        if self._due_at is not None and now > self._due_at:
            self.fail(BusUnavailable("output was lost while the bus was away"))

    def bus_was_away(self, now: float) -> None:
        """What has given no row is tried anew, what has must go on soon: the last rows may have been lost."""
        self._due_at = now + (OVERDUE_S if self._next else 0.0)

    def put(self, sequence: int, row: Row, usage: wire.DecodeUsage | None, now: float) -> None:
        if self._error is not None or self.ended or sequence < self._next:
            return  # NATS delivers at most once, so a repetition is a worker's slip: harmless
        if sequence > self._next:
            away = self._due_at is not None
            self.fail((BusUnavailable if away else OutputLost)("output was lost between worker and gateway"))
            return
        if not self.first <= row.choice < self.first + self._choices:
            self.fail(Internal("a worker sent a choice that nobody asked for"))
            return
        self._next += 1
        self._watched_since = now
        self._due_at = None
        self._rows.append(row)
        self.tokens += len(row.tokens) // wire.TOKEN_BYTES
        if usage is not None:
            self.usage = usage
        if row.finish is not None:
            self._open -= 1
        if self._reader is None and len(self._rows) > FREE_ROWS:  # the reader is away, writing to the client
            self._weigh(row)

    def deliver(self) -> None:
        """What was put goes on."""
        reader, rows = self._reader, self._rows
        if not (rows or self.ended):
            return
        if self.sink is not None and reader is not None and not reader.done() and not self.ended and self.sink(rows):
            self._rows = []
            return
        self._wake()

    def _weigh(self, row: Row) -> None:
        self._row_bytes += _size_bytes(row)
        if len(self._rows) > MAX_ROWS or self._row_bytes > MAX_ROW_BYTES:
            self.fail(Cancelled("the client reads too slowly"))
            if self.on_overrun is not None:
                self.on_overrun()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


def _size_bytes(row: Row) -> int:
    scores = [*(row.logprobs or ()), *(row.prompt_logprobs or ())]
    alternatives = sum(1 + len(score.top) for score in scores if score is not None)
    return ROW_BYTES + len(row.text) + len(row.tokens) + LOGPROB_BYTES * alternatives


class Streams:
    """All open streams of this gateway, by request."""

    def __init__(self, on_stranger: OnStranger) -> None:
        self._by_request: dict[str, Stream] = {}
        self._on_stranger = on_stranger
        self._fed: dict[Stream, None] = {}  # since rows were delivered last
        self.bad_rows = 0

    def __len__(self) -> int:
        return len(self._by_request)

    def open(self, request: str, attempt: int, choices: int, first: int = 0) -> Stream:
        """The latest attempt of a request replaces an earlier one."""
        stream = Stream(request, attempt, choices, first)
        self._by_request[request] = stream
        return stream

    def close(self, stream: Stream) -> None:
        if self._by_request.get(stream.request) is stream:
            del self._by_request[stream.request]

    def put(self, batch: wire.TokenBatch, now: float) -> None:
        """Rows go on in the next turn of the loop: with those of other batches that have come by then, in one write."""
        strangers: set[tuple[str, int]] = set()
        fed, waited = self._fed, bool(self._fed)
        plain = not (batch.finish or batch.usage or batch.failures or batch.logprobs or batch.prompt_logprobs)
        for index, request in enumerate(batch.requests):
            try:
                attempt = batch.attempts[index]
                stream = self._by_request.get(request)
                if stream is None or stream.attempt != attempt:
                    strangers.add((request, attempt))
                    continue
                fed[stream] = None
                if plain:
                    row = Row(stream.first + batch.choices[index], batch.texts[index], batch.tokens[index])
                    stream.put(batch.sequences[index], row, None, now)
                else:
                    self._put_row(stream, batch, index, now)
            except Exception:  # a worker's bad row must not cost the other rows
                self.bad_rows += 1
                log.exception("a row of %s dropped", batch.worker)
        if fed and not waited:
            asyncio.get_running_loop().call_soon(self._deliver)
        for request, attempt in strangers:
            self._on_stranger(batch.worker, request, attempt)

    def _deliver(self) -> None:
        fed, self._fed = self._fed, {}
        for stream in fed:
            _deliver(stream)

    def check(self, now: float, progress_s: float) -> None:
        """Fail every stream that made no progress for so long."""
        for stream in self._by_request.values():
            stream.check(now, progress_s)

    def bus_was_away(self, now: float) -> None:
        for stream in self._by_request.values():
            stream.bus_was_away(now)

    def _put_row(self, stream: Stream, batch: wire.TokenBatch, index: int, now: float) -> None:
        key = str(index)
        failure = batch.failures.get(key) if batch.failures else None
        if failure is not None:
            stream.fail(
                from_wire(failure.code, failure.message, param=failure.param, retry_after_s=failure.retry_after_s)
            )
            return
        row = Row(
            choice=stream.first + batch.choices[index],
            text=batch.texts[index],
            tokens=batch.tokens[index],
            finish=batch.finish.get(key) if batch.finish else None,
            logprobs=batch.logprobs.get(key) if batch.logprobs else None,
            prompt_logprobs=batch.prompt_logprobs.get(key) if batch.prompt_logprobs else None,
        )
        stream.put(batch.sequences[index], row, batch.usage.get(key) if batch.usage else None, now)


def _deliver(stream: Stream) -> None:
    try:
        stream.deliver()
    except Exception:  # one client's answer must not cost the others theirs
        log.exception("an answer broke on its way out")
        stream.fail(Internal("internal error"))
