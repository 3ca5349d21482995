"""The traces of this gateway: those that run, and the last that were worth keeping. Pure, and bounded in every way.

Invariants: a trace is open from its request's start to its end, then kept or forgotten; late spans reach a trace as
long as it is kept; requests that were turned away take a fifth of the places at most, so that a flood of them leaves
the others.
"""

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from shared import wire
from shared.spans import Span, record

MAX_TRACES = 1000
MAX_REFUSED = 200  # of those
MAX_SPANS = 512  # of one trace
MAX_ALL_SPANS = 40_000
SERVICE = "gateway"
REFUSED = frozenset({"shed", "client_error"})


@dataclass(slots=True)
class _Open:
    own: list[Span] = field(default_factory=list)
    others: list[wire.SpanRecord] = field(default_factory=list)


@dataclass(slots=True)
class Kept:
    summary: wire.TraceSummary
    receipt: Callable[[], dict[str, object]]
    spans: list[Span | wire.SpanRecord]  # the gateway's own as they were made: few are ever looked at


class TraceBook:
    def __init__(self, gateway: str, export: Callable[[Iterable[wire.SpanRecord]], None] | None) -> None:
        """`export` gets every span of a kept trace once; None: nobody wants them."""
        self.dropped = 0  # spans that came too late or were too many
        self._gateway = gateway
        self._export = export
        self._open: dict[str, _Open] = {}  # by root, like the next; one a request in flight
        self._kept: collections.OrderedDict[str, Kept] = collections.OrderedDict()
        self._refused: dict[str, None] = {}  # of the kept ones, oldest first
        self._spans = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def spans(self) -> int:
        return self._spans

    def begin(self, root: Span) -> None:
        self._open[root.root] = _Open()

    def own(self, span: Span) -> None:
        """One of this gateway's has ended."""
        trace = self._open.get(span.root)
        if trace is None:
            self.late([record(span, SERVICE, self._gateway)])
        elif len(trace.own) < MAX_SPANS:
            trace.own.append(span)
        else:
            self.dropped += 1

    def late(self, spans: Iterable[wire.SpanRecord]) -> None:
        """From workers and stores, before the request's end or after it."""
        for span in spans:
            held: list[wire.SpanRecord] | list[Span | wire.SpanRecord]
            if (trace := self._open.get(span.root)) is not None:
                held = trace.others
            elif (kept := self._kept.get(span.root)) is not None:
                held = kept.spans
            else:
                self.dropped += 1
                continue
            if len(held) >= MAX_SPANS:
                self.dropped += 1
                continue
            held.append(span)
            if trace is None:
                self._spans += 1
                if self._export is not None:
                    self._export((span,))
        self._evict()

    def forget(self, root: str) -> None:
        self._open.pop(root, None)

    def keep(self, root: str, summary: wire.TraceSummary, receipt: Callable[[], dict[str, object]]) -> None:
        """The request has ended, and its own spans with it. `receipt` is asked when somebody looks."""
        trace = self._open.pop(root, None)
        if trace is None:
            return
        spans: list[Span | wire.SpanRecord] = [*trace.own, *trace.others]
        self._kept[root] = Kept(summary, receipt, spans)
        self._spans += len(spans)
        if summary.outcome in REFUSED:
            self._refused[root] = None
        if self._export is not None:
            self._export(self._records(spans))
        self._evict()

    def _evict(self) -> None:
        if len(self._refused) > MAX_REFUSED:
            self._drop(next(iter(self._refused)))
        while len(self._kept) > MAX_TRACES or self._spans > MAX_ALL_SPANS:
            self._drop(next(iter(self._kept)))

    def _drop(self, root: str) -> None:
        kept = self._kept.pop(root)
        self._spans -= len(kept.spans)
        self._refused.pop(root, None)

    # ---- for readers -----------------------------------------------------------------------------------------

    def summaries(self, order: str, limit: int) -> list[wire.TraceSummary]:
        return ranked((self._summary(kept) for kept in reversed(self._kept.values())), order)[:limit]

    def find(self, wanted: str) -> wire.TraceFound:
        """By trace or request id; the latest of several."""
        for kept in reversed(self._kept.values()):
            if wanted in (kept.summary.trace_id, kept.summary.request_id):
                spans = self._records(kept.spans)
                return wire.TraceFound(summary=self._summary(kept), receipt=kept.receipt(), spans=spans)
        return wire.TraceFound()

    def _records(self, spans: Iterable[Span | wire.SpanRecord]) -> list[wire.SpanRecord]:
        return [record(span, SERVICE, self._gateway) if isinstance(span, Span) else span for span in spans]

    def _summary(self, kept: Kept) -> wire.TraceSummary:
        return msgspec.structs.replace(kept.summary, spans=len(kept.spans))


def ranked(summaries: Iterable[wire.TraceSummary], order: str) -> list[wire.TraceSummary]:
    """`slowest`: by time to the first token, or to the end where none came; else the last one first."""
    if order == "slowest":
        return sorted(summaries, key=lambda one: -(one.duration_ms if one.ttft_ms is None else one.ttft_ms))
    return sorted(summaries, key=lambda one: -(one.start_unix_ms + one.duration_ms))
