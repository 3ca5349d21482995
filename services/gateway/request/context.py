"""One request's state, all of it, and what every request works with.

A request of one prompt is one context. One of several prompts is a context for each, under the one that the HTTP side
made: `under` names it; limits, client and connection are read there. Each group of fields has one writer, named at its
head. What follows from the timestamps (receipt, log line, spans, figures) is worked out at the end, in finish.py.
"""

import asyncio
import time
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
from opentelemetry.util.types import AttributeValue

from services.gateway.access.access import Access, Bill
from services.gateway.access.client import ANONYMOUS, Client
from services.gateway.answer.connection import Connection
from services.gateway.answer.errors import Headers
from services.gateway.answer.receipt import Receipt
from services.gateway.answer.render import Collector, EventWriter, Form, Usage
from services.gateway.background import BackgroundTasks
from services.gateway.observe.metrics import Metrics
from services.gateway.observe.traces.traces import Traces
from services.gateway.request.resume import Sent, Work
from services.gateway.scheduling.fleet import Fleet
from services.gateway.scheduling.members import Members
from services.gateway.scheduling.prefixes import Prefixes
from services.gateway.scheduling.queue import Queue, Waiting
from shared import wire
from shared.bus import Bus
from shared.errors import BatonError
from shared.settings import GatewaySettings
from shared.spans import Span


class Stage(StrEnum):
    """Where a prompt is; the words are labels of metrics."""

    READING = "edge"  # read, checked, tokenised
    ADMISSION = "admission"
    QUEUED = "queued"  # until it has workers
    RESERVING = "reserving"  # a decode worker is asked
    HANDOFF = "handoff"  # it has accepted; the prompt is being computed somewhere
    STREAMING = "streaming"  # tokens have been seen
    DONE = "done"


class RequestContext(msgspec.Struct, eq=False, kw_only=True, weakref=True):
    """Times are of the monotonic clock."""

    # http/entry.py: who asks what
    id: str  # on the bus; of several prompts each has its own
    request_id: str = ""  # the client's, or `id`
    response_id: str = ""
    began: float = 0.0  # first byte
    headers: dict[bytes, bytes] = {}
    connection: Connection | None = None
    task: asyncio.Task[None] | None = None  # while it may be cancelled
    span: Span | None = None  # its root; None: telemetry is off
    client: Client = ANONYMOUS
    tier: str = "default"
    can_stream: bool = True  # its HTTP has chunks
    streamed: bool = False  # the client asked for events
    is_read: bool = False  # all of its body is here
    held_bytes: int = 0  # of the body, until it is checked
    form: Form | None = None
    limit: int | None = None  # tokens that it asked for
    prompts: "list[RequestContext]" = []  # of several: theirs
    under: "RequestContext | None" = None
    first_choice: int = 0  # the number of its first choice in the client's answer
    original: Work | None = None  # the prompt, and how it is to be answered
    waiting: Waiting | None = None  # what scheduling knows of it
    deadline: float = 0.0  # for its body, then for all of it

    # request/pipeline.py: how far it has come, and what has gone wrong on the way
    stages: list[tuple[Stage, float]] = []  # each with its beginning
    verdict: BatonError | None = None  # why it is ended from outside
    bill: Bill | None = None  # from admission on
    answer_headers: Headers = []  # beside the answer's own
    lost: int = 0  # attempts lost without a new token in between
    busy: int = 0
    last_busy: str = ""
    retries: int = 0  # also written by attempt.py, for prefill
    told_at_loss: int = 0  # tokens that the client had at the last loss
    work: Work | None = None  # of this attempt

    # request/attempt.py: the present attempt
    attempt: int = -1
    decode: str = ""  # its worker
    prefill: str | None = None  # the worker that computes, or has computed, the prompt
    reason: str | None = None  # of the placement, for the receipt
    path: str | None = None  # split | whole
    question: str = ""  # to decode, on the bus; empty: none is open
    asked_until: float = 0.0
    prefill_question: str = ""
    prefill_tried: set[str] = set()
    moving: asyncio.Task[None] | None = None  # looks for another prefill worker
    handoff_until: float = 0.0
    accepted: wire.Accepted | None = None
    prefill_done: wire.PrefillDone | None = None
    prefilled_at: float | None = None
    outcome: asyncio.Future[None] | None = None  # all rows have come, or what the attempt failed with
    reported: asyncio.Future[None] | None = None  # made when the answers to both questions are waited for

    # request/tokens.py: what has come, and what the client has
    next_row: int = 0
    open_choices: int = 0
    sent: list[Sent] = []  # by choice, over all attempts
    writer: EventWriter | Collector | None = None
    progress_at: float | None = None  # from then on rows must come; None: not yet
    due_at: float | None = None  # of the next row, after the bus was away
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    usage: wire.DecodeUsage | None = None
    finish_reasons: list[str] = []
    unwritten: list[bytes] = []  # of the request, since its client was written to last
    blocked: list[bytes] = []  # before those, while the client takes nothing
    blocked_bytes: int = 0
    started: bool = False  # the answer's head is out
    written_at: float = 0.0

    # request/finish.py
    total: Usage | None = None  # of one that went well
    shown: Receipt | None = None  # as its answer ended with
    cached_tokens: int = 0

    @property
    def stage(self) -> Stage:
        return self.stages[-1][0]

    @property
    def whole(self) -> "RequestContext":
        """The client's request that this prompt belongs to."""
        return self.under or self

    @property
    def generated(self) -> int:
        """Tokens that the client has, over all attempts."""
        return sum(sent.count for sent in self.sent)


@dataclass(slots=True)
class Streams:
    """The prompts whose rows are awaited, by their id on the bus."""

    open: dict[str, RequestContext] = field(default_factory=dict)
    fed: dict[RequestContext, bool] = field(default_factory=dict)  # since rows were written last; with news?
    bad_rows: int = 0

    def __len__(self) -> int:
        return len(self.open)


@dataclass(slots=True)
class Running:
    """The requests that are here."""

    requests: dict[RequestContext, None] = field(default_factory=dict)
    prompts: int = 0  # of all of them: each takes a place
    body_bytes: int = 0  # of bodies that are arriving or being checked
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    draining: bool = False
    has_seen_path: bool = False  # a complete path through the cluster was ready once

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """What every request works with. Without behaviour of its own: read gateway.py for how it is made."""

    settings: GatewaySettings
    model: str  # served name
    bus: Bus
    metrics: Metrics
    background: BackgroundTasks
    access: Access
    fleet: Fleet
    members: Members
    queue: Queue
    prefixes: Prefixes
    traces: Traces
    running: Running
    streams: Streams


def enter(ctx: RequestContext, stage: Stage) -> None:
    ctx.stages.append((stage, time.monotonic()))


def note(ctx: RequestContext, event: str, **attributes: AttributeValue) -> None:
    """On the request's span."""
    span = ctx.whole.span
    if span is not None:
        span.add_event(event, attributes)


def abort(ctx: RequestContext, error: BatonError) -> None:
    """End a request from outside, wherever it is: its client left, its time is up, the gateway is going."""
    if ctx.verdict is None and ctx.task is not None:
        ctx.verdict = error
        ctx.task.cancel()


def fail(ctx: RequestContext, error: Exception) -> None:
    """End an attempt. Too late once all rows have come."""
    if ctx.outcome is not None and not ctx.outcome.done():
        ctx.outcome.set_exception(error)
