"""Spans as Baton makes them: OpenTelemetry's interface, a tenth of its SDK's cost, and known to belong to a request.

A gateway begins a trace with a root span; every later one carries its `owner`, "<gateway>/<root's span id>", in W3C
`tracestate` (`baton=...`), so that each process knows whom to send it to. Invariants: what belongs to no gateway's
request is not recorded; a span is reported once, when it ends; of an exception nothing but its type and code is kept.
"""

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes, AttributeValue

from shared import wire
from shared.errors import BatonError

S = TypeVar("S", bound=trace.Span)

STATE_KEY = "baton"  # in W3C tracestate
MAX_EVENTS = 64  # of one span
PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?")
OWNER = re.compile(rf"(?:^|,)\s*{STATE_KEY}=([A-Za-z0-9_-]+/[0-9a-f]{{16}})\s*(?:,|$)")


class Parent(trace.NonRecordingSpan):
    """A span of another process, or of nobody: `trace_id` is 0 then."""

    def __init__(self, trace_id: int, span_id: int, *, sampled: bool, owner: str) -> None:
        self.trace_id: int = trace_id
        self.span_id: int = span_id
        self.sampled: bool = sampled
        self.owner: str = owner

    def get_span_context(self) -> SpanContext:
        return _span_context(self.trace_id, self.span_id, sampled=self.sampled, owner=self.owner, remote=True)

    def is_recording(self) -> bool:
        return False


class Span(trace.Span):
    """Lives from its making to `end`. `owner` and `sampled` are its trace's."""

    def __init__(
        self,
        recorder: "Recorder",
        name: str,
        parent: "Span | Parent | None",
        *,
        kind: SpanKind,
        start_ns: int,
        owner: str,
    ) -> None:
        """`owner`: empty for the parent's."""
        self.name, self.kind = name, kind
        self.span_id = random.getrandbits(64) or 1
        self.trace_id: int = parent.trace_id if parent is not None and parent.trace_id else random.getrandbits(128) or 1
        self.parent_id: int = parent.span_id if parent is not None else 0
        self.sampled: bool = parent is not None and parent.sampled
        self.owner: str = f"{owner}/{self.span_id:016x}" if owner else parent.owner if parent is not None else ""
        self.start_ns, self.end_ns = start_ns, 0
        self.attributes: dict[str, AttributeValue] = {}
        self.events: list[tuple[str, int, dict[str, AttributeValue]]] = []
        self.error: str | None = None  # why it failed; empty: nobody said
        self._recorder = recorder
        self.headers: dict[str, str] = {}  # W3C's, made when they are needed first

    @property
    def root(self) -> str:
        """Span id of the request's first span."""
        return self.owner[-16:]

    def get_span_context(self) -> SpanContext:
        return _span_context(self.trace_id, self.span_id, sampled=self.sampled, owner=self.owner, remote=False)

    def is_recording(self) -> bool:
        return self.end_ns == 0

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        self.attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        self.attributes.update(attributes)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        if len(self.events) < MAX_EVENTS:
            self.events.append((name, timestamp or time.time_ns(), dict(attributes or {})))

    def update_name(self, name: str) -> None:
        self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        code = status.status_code if isinstance(status, Status) else status
        if code is StatusCode.ERROR and self.error is None:
            # OpenTelemetry puts an exception's text here: it might quote a prompt.
            told = (status.description if isinstance(status, Status) else description) or ""
            self.error = told.partition(":")[0]

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,  # noqa: ARG002 - the interface has it
        timestamp: int | None = None,
        escaped: bool = False,  # noqa: ARG002
    ) -> None:
        self.error = exception.code if isinstance(exception, BatonError) else type(exception).__name__
        self.add_event("exception", {"exception.type": type(exception).__name__}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        if self.end_ns == 0:
            self.end_ns = end_time or time.time_ns()
            self._recorder.ended(self)

    def discard(self) -> None:
        """End it, and tell nobody."""
        self.end_ns = self.end_ns or time.time_ns()


def _span_context(trace_id: int, span_id: int, *, sampled: bool, owner: str, remote: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return SpanContext(trace_id, span_id, remote, flags, TraceState([(STATE_KEY, owner)] if owner else None))


class Current(Generic[S]):
    """Within, the span is the current one; then it has ended. `use_span` of OpenTelemetry takes three times as long."""

    __slots__ = ("_records", "_span", "_token")

    def __init__(self, span: S, records: type[BaseException] = BaseException) -> None:
        """`records`: errors that the span has failed with."""
        self._span = span
        self._records = records
        self._token: Any = None

    def __enter__(self) -> S:
        self._token = contexts.attach(trace.set_span_in_context(self._span))
        return self._span

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        contexts.detach(self._token)
        if isinstance(error, self._records):
            self._span.record_exception(error)
        self._span.end()


class Recorder(trace.Tracer):
    """Makes this process's spans and gives them, ended, to whom they concern. May be called from any thread."""

    def __init__(self) -> None:
        self.enabled = True
        self.begins = False  # what has no parent begins a trace of its own, as in a test
        self.gateways: dict[str, Callable[[Span], None]] = {}  # owners in this process
        self.others: Callable[[Span], None] | None = None  # takes what belongs to gateways elsewhere
        self.watchers: list[Callable[[Span], None]] = []

    def request(self, name: str, gateway: str, parent: Parent, *, sampled: bool) -> Span:
        """The root of a request; `parent` is the client's span."""
        span = Span(self, name, parent, kind=SpanKind.SERVER, start_ns=time.time_ns(), owner=gateway)
        span.sampled = sampled
        return span

    def start_span(  # noqa: PLR0917 - the interface's
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Any = None,  # noqa: ARG002
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: ARG002
        set_status_on_exception: bool = True,  # noqa: ARG002
    ) -> trace.Span:
        if not self.enabled:
            return trace.INVALID_SPAN
        parent = ours(trace.get_current_span(context))
        owner = ""
        if parent is None or not parent.owner:
            if not self.begins:
                return trace.INVALID_SPAN
            owner = "nobody"
        span = Span(self, name, parent, kind=kind, start_ns=start_time or time.time_ns(), owner=owner)
        if attributes:
            span.attributes.update(attributes)
        return span

    def add(self, name: str, parent: Span, start_ns: int, end_ns: int) -> None:
        """One that is over already. Times since the epoch."""
        Span(self, name, parent, kind=SpanKind.INTERNAL, start_ns=start_ns, owner="").end(end_ns)

    def start_as_current_span(self, name: str, *args: Any, **options: Any) -> Current[trace.Span]:  # type: ignore[override]
        # A job that is cancelled has not failed.
        return Current(self.start_span(name, *args, **options), Exception)

    def ended(self, span: Span) -> None:
        for watch in self.watchers:
            watch(span)
        take = self.gateways.get(span.owner[:-17], self.others)
        if take is not None:
            take(span)


class Provider(trace.TracerProvider):
    """For libraries that ask OpenTelemetry for a tracer: theirs are spans like ours."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def get_tracer(self, *_: Any, **__: Any) -> trace.Tracer:
        return self._recorder


def ours(span: trace.Span) -> Span | Parent | None:
    """None where there is no span. A library may have read the headers itself."""
    if isinstance(span, (Span, Parent)):
        return span
    context = span.get_span_context()
    if not context.is_valid:
        return None
    owner = context.trace_state.get(STATE_KEY) or ""
    return Parent(context.trace_id, context.span_id, sampled=context.trace_flags.sampled, owner=owner)


def headers(span: Span | Parent) -> dict[str, str]:
    """W3C's, for whoever goes on with the trace."""
    if isinstance(span, Span):
        span.headers = span.headers or _headers(span)
        return span.headers.copy()
    return _headers(span)


def _headers(span: Span | Parent) -> dict[str, str]:
    found = {"traceparent": f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.sampled):02x}"}
    if span.owner:
        found["tracestate"] = f"{STATE_KEY}={span.owner}"
    return found


def parent_of(traceparent: str, tracestate: str) -> Parent:
    """What the headers say; headers that cannot be read name nobody."""
    match = PARENT.fullmatch(traceparent.strip())
    if match is None or traceparent.startswith("ff"):
        return Parent(0, 0, sampled=False, owner="")
    owner = OWNER.search(tracestate)
    trace_id, span_id, flags = (int(group, 16) for group in match.groups())
    if not (trace_id and span_id):
        return Parent(0, 0, sampled=False, owner="")
    return Parent(trace_id, span_id, sampled=bool(flags & 1), owner=owner[1] if owner else "")


def in_context(span: Span | Parent) -> Context:
    return trace.set_span_in_context(span, contexts.Context())


def record(span: Span, service: str, instance: str) -> wire.SpanRecord:
    """For the wire, and for being kept."""
    return wire.SpanRecord(
        name=span.name,
        trace_id=f"{span.trace_id:032x}",
        span_id=f"{span.span_id:016x}",
        parent_id=f"{span.parent_id:016x}" if span.parent_id else "",
        root=span.root,
        service=service,
        instance=instance,
        kind=span.kind.value,
        start_unix_ns=span.start_ns,
        duration_ns=max(0, span.end_ns - span.start_ns),
        attributes={key: _plain(value) for key, value in span.attributes.items()},
        events=[
            wire.SpanEvent(name=name, unix_ns=at_ns, attributes={key: _plain(one) for key, one in attributes.items()})
            for name, at_ns, attributes in span.events
        ],
        status="ok" if span.error is None else "error",
        error=span.error or "",
    )


def _plain(value: AttributeValue) -> wire.Attribute:
    if isinstance(value, str | bool | int | float):
        return value
    return [str(one) for one in value] if isinstance(value, Sequence) else str(value)
