"""One attempt's answer as it arrives: events stamped with the time when they are read, and the class it falls into.

Invariants: an answer settles once, and into exactly one outcome; nothing that a server sends raises; what it may make
this process hold is bounded. Times are those of `time.monotonic`; events that come in one read share theirs.
"""

import asyncio
import contextlib
import re
from enum import StrEnum
from typing import Any

import msgspec

TEXT = re.compile(rb'"(?:content|text|reasoning|reasoning_content)": ?"[^"]')  # of an event that carries some
MARKS = (b"[DONE]", b'"usage":{', b'"usage": {', b'"error":', b": baton-receipt ")  # of events that have to be parsed
RECEIPT = b": baton-receipt "
RECEIPT_HEADER = b"x-baton-receipt"
MAX_EVENT_BYTES = 1 << 20
MAX_ERROR_BYTES = 1 << 16
CODE_LENGTH = 60


class Outcome(StrEnum):
    OK = "ok"
    SHED = "shed"  # 429 or 503
    CLIENT_ERROR = "client_error"  # another 4xx
    ERROR = "error"  # 5xx, an error event, or an answer that is none
    CUT = "cut"  # the stream ended without [DONE]
    TIMEOUT = "timeout"
    UNREACHABLE = "unreachable"
    WRONG = "wrong"  # its text is not the expected one
    LEFT = "left"  # the client left on purpose


class Receipt(msgspec.Struct, frozen=True):
    """What Baton's gateway says about a request."""

    path: str | None = None
    cached_tokens: int | None = None
    retries: int | None = None
    predicted_ttft_ms: float | None = None
    actual_ttft_ms: float | None = None
    stages_ms: dict[str, float | None] = {}


class _Cached(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Event(msgspec.Struct, frozen=True):
    usage: _Usage | None = None
    error: Any = None


_event = msgspec.json.Decoder(_Event)
_receipt = msgspec.json.Decoder(Receipt)


class Answer:
    """`keep`: hold the events, for who wants the text. `leave_after`: leave on purpose after so many events."""

    def __init__(self, *, keep: bool = False, leave_after: int | None = None) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.outcome: Outcome | None = None
        self.code = ""
        self.status: int | None = None
        self.headers: dict[bytes, bytes] = {}
        self.sent_s = 0.0
        self.heard_s = 0.0  # the last sign of life
        self.end_s = 0.0
        self.times: list[float] = []  # one an event that carries text
        self.kept: list[bytes] = []
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.receipt: Receipt | None = None
        self._keep, self._leave_after = keep, leave_after
        self._streams = False
        self._ended = False  # [DONE] was read
        self._tail = b""
        self._body = b""

    @property
    def leaves_at_once(self) -> bool:
        return self._leave_after == 0

    def head(self, status: int) -> None:
        """The headers are complete."""
        self.status = status
        self._streams = status == 200 and b"event-stream" in self.headers.get(b"content-type", b"")
        if RECEIPT_HEADER in self.headers:
            self._read_receipt(self.headers[RECEIPT_HEADER])

    def body(self, data: bytes, now: float) -> None:
        self.heard_s = now
        if not self._streams:
            if len(self._body) < MAX_ERROR_BYTES:
                self._body += data
            return
        if b"\r" in data:  # in JSON it would be escaped
            data = data.replace(b"\r\n", b"\n")
        if self._tail:
            data = self._tail + data
        if data.endswith(b"\n\n"):
            self._tail = b""
        else:
            cut = data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0
            data, self._tail = data[:cut], data[cut:]
            if len(self._tail) > MAX_EVENT_BYTES:
                self.settle(Outcome.ERROR, "event_too_long", now)
                return
        self._events(data, now)

    def complete(self, now: float) -> None:
        """The response has ended as HTTP wants it, or at least its stream as SSE wants it."""
        status = self.status or 0
        if self._streams:
            self._stream_ended(now, "no_done")
        elif status == 200:
            self.settle(Outcome.ERROR, "not_a_stream", now)
        elif status in (429, 503):
            self.settle(Outcome.SHED, self._error_code(), now)
        else:
            kind = Outcome.CLIENT_ERROR if 400 <= status < 500 else Outcome.ERROR
            self.settle(kind, self._error_code(), now)

    def broken(self, now: float) -> None:
        """The connection has closed before that."""
        if self.status is None:
            self.settle(Outcome.UNREACHABLE, "closed", now)
        elif self._streams:
            self._stream_ended(now, "closed")
        elif self.status == 200:
            self.settle(Outcome.ERROR, "not_a_stream", now)
        else:
            self.complete(now)

    def settle(self, outcome: Outcome, code: str, now: float) -> None:
        """The first one counts."""
        if self.outcome is None:
            self.outcome, self.code, self.end_s = outcome, code, now
            if not self.done.done():
                self.done.set_result(None)

    def _stream_ended(self, now: float, code: str) -> None:
        if not self._ended:
            self.settle(Outcome.CUT, code, now)
        elif not self.times and self.output_tokens is None:
            self.settle(Outcome.ERROR, "empty_stream", now)
        else:
            self.settle(Outcome.OK, "", now)

    def _events(self, data: bytes, now: float) -> None:
        """Whole events."""
        count = len(TEXT.findall(data))
        if count:
            self.times.extend([now] * count)
            if self._leave_after is not None and len(self.times) >= self._leave_after:
                self.settle(Outcome.LEFT, "", now)
        if self._keep:
            self.kept.append(data)
        marks = [at for mark in MARKS if (at := data.find(mark)) >= 0]
        if marks:
            begin = data.rfind(b"\n\n", 0, min(marks))
            for event in data[max(0, begin) :].split(b"\n\n"):
                self._special(event, now)

    def _special(self, event: bytes, now: float) -> None:
        for line in event.split(b"\n"):
            if line.startswith(b"data: [DONE]"):
                self._ended = True
            elif line.startswith(b"data:"):
                self._data(line[5:], now)
            elif line.startswith(RECEIPT):
                self._read_receipt(line[len(RECEIPT) :])
                if self.cached_tokens is None and self.receipt is not None:
                    self.cached_tokens = self.receipt.cached_tokens

    def _read_receipt(self, data: bytes) -> None:
        """The last one counts: a stream's header comes before its first token. What is none is another server's."""
        with contextlib.suppress(msgspec.MsgspecError):
            self.receipt = _receipt.decode(data)

    def _data(self, data: bytes, now: float) -> None:
        try:
            event = _event.decode(data)
        except msgspec.MsgspecError:
            self.settle(Outcome.ERROR, "bad_event", now)
            return
        if event.error is not None:
            self.settle(Outcome.ERROR, _code(event.error) or "error_event", now)
        elif event.usage is not None:
            usage = event.usage
            self.prompt_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens
            if usage.prompt_tokens_details is not None:
                self.cached_tokens = usage.prompt_tokens_details.cached_tokens

    def _error_code(self) -> str:
        try:
            body = msgspec.json.decode(self._body)
        except (msgspec.MsgspecError, RecursionError):
            body = None
        error = body.get("error", body) if isinstance(body, dict) else None
        return _code(error) or f"http_{self.status}"


def _code(error: Any) -> str:
    """The code of an OpenAI error object; what a stranger sends is cut to a word that a table can show."""
    if not isinstance(error, dict):
        return ""
    found = error.get("code") or error.get("type") or ""
    return re.sub(r"[^A-Za-z0-9_.:-]+", "_", str(found))[:CODE_LENGTH]


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None


class _Chunk(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []


_chunk = msgspec.json.Decoder(_Chunk)


def text_and_tokens(kept: list[bytes]) -> tuple[str, list[int]]:
    """What the kept events of a one-choice stream say; the ids are empty unless the server was asked for them."""
    texts: list[str] = []
    tokens: list[int] = []
    for event in b"".join(kept).split(b"\n\n"):
        if not event.startswith(b"data: {"):
            continue
        try:
            chunk = _chunk.decode(event[6:])
        except msgspec.MsgspecError:
            continue  # counted when it came
        for choice in chunk.choices:
            texts.append(choice.text or (choice.delta.content if choice.delta else None) or "")
            tokens.extend(choice.token_ids or ())
    return "".join(texts), tokens
