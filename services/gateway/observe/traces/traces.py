"""Where a request's journey, the bus and the book of traces meet.

Invariants: with telemetry off nothing is made; what a request pays is its own spans; workers are asked for spans that
they hold once a beat, for all requests that turned out to be worth it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from random import Random
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge

from services.gateway.observe.traces.book import MAX_ALL_SPANS, MAX_TRACES, TraceBook, ranked
from services.gateway.observe.traces.export import OtlpExport
from services.gateway.observe.traces.sampling import Ending, Sampler
from shared import spans, subjects, telemetry, wire
from shared.bus import Bus
from shared.errors import BatonError, Internal
from shared.settings import GatewaySettings

log = logging.getLogger(__name__)

ASK_S = 1.0  # another gateway for its traces
MAX_WANTED = 1000  # asked for in one message
MOST = 1000  # traces in one listing

M = TypeVar("M", bound=wire.Message)


class Traces:
    def __init__(
        self,
        settings: GatewaySettings,
        bus: Bus,
        registry: CollectorRegistry,
        *,
        others: Callable[[], Iterable[str]],
        export: OtlpExport | None = None,
    ) -> None:
        """`others`: the other gateways that live."""
        self._cluster, self._id = settings.cluster, settings.id
        self._on = settings.telemetry == "on"
        self._bus = bus
        self._others = others
        self._sampler = Sampler(settings.trace_ratio, settings.traces_per_s, Random())  # noqa: S311 - no secret
        self._book = TraceBook(settings.id, export)
        self._wanted: list[str] = []
        decided = Counter(
            "baton_traces", "Requests by why their trace is kept; dropped: it is not", ["kept"], registry=registry
        )
        self._lost = Counter("baton_trace_spans_lost", "Spans that came too late or were too many", registry=registry)
        kinds = ("sampled", "error", "slow", "retried", "dropped")
        self._decided = {kept: decided.labels(kept=kept) for kept in kinds}
        Gauge("baton_traces_kept", "Traces in memory", registry=registry).set_function(lambda: len(self._book))
        Gauge("baton_trace_spans_kept", "Spans in memory", registry=registry).set_function(lambda: self._book.spans)
        self.limits = {"traces": MAX_TRACES, "trace_spans": MAX_ALL_SPANS}

    async def listen(self) -> None:
        recorder = telemetry.start(enabled=self._on)
        recorder.gateways[self._id] = self._book.own
        await self._bus.listen(subjects.spans(self._cluster, self._id), self._arrived)
        await self._bus.serve(subjects.trace(self._cluster, self._id), self._answer)

    def close(self) -> None:
        telemetry.recorder().gateways.pop(self._id, None)

    # ---- a request -------------------------------------------------------------------------------------------

    def request(self, traceparent: str) -> AbstractContextManager[spans.Span | None]:
        """Within, its root span is the current one; None: telemetry is off. Its end is for `keep` and `drop`."""
        if not self._on:
            return nullcontext()
        parent = spans.parent_of(traceparent, "")  # a client names no owner
        sampled = self._sampler.begins(asked=parent.sampled, now=time.monotonic())
        root = telemetry.recorder().request(telemetry.GATEWAY_REQUEST, self._id, parent, sampled=sampled)
        self._book.begin(root)
        return spans.Current(root)

    def decide(self, ending: Ending, *, sampled: bool) -> str | None:
        """Why the trace of a request that has ended is kept; None: it is not."""
        kept = self._sampler.ends(ending, sampled=sampled, now=time.monotonic())
        self._decided[kept or "dropped"].inc()
        return kept

    def drop(self, root: spans.Span) -> None:
        root.discard()
        self._book.forget(root.root)

    def keep(
        self, root: spans.Span, ending: Ending, receipt: Callable[[], dict[str, object]], kept: str, **shown: str | None
    ) -> None:
        """After the root's end. `shown`: request_id, tier, tenant and path of the summary."""
        if not root.sampled and len(self._wanted) < MAX_WANTED:
            self._wanted.append(root.root)
        summary = wire.TraceSummary(
            trace_id=f"{root.trace_id:032x}",
            request_id=shown["request_id"] or "",
            start_unix_ms=root.start_ns // 1_000_000,
            duration_ms=round(ending.duration_s * 1000, 3),
            ttft_ms=None if ending.ttft_s is None else round(ending.ttft_s * 1000, 3),
            outcome=ending.outcome,
            tier=shown["tier"] or "",
            tenant=shown["tenant"] or "",
            path=shown["path"],
            spans=0,
            kept=kept,
            gateway=self._id,
        )
        self._book.keep(root.root, summary, receipt)

    async def ask_for_held(self) -> None:
        """Once a beat: of requests that were not sampled and are kept all the same."""
        if self._wanted:
            roots, self._wanted = self._wanted, []
            await self._bus.publish(subjects.wanted(self._cluster), wire.SpansWanted(gateway=self._id, roots=roots))

    # ---- for readers -----------------------------------------------------------------------------------------

    async def summaries(self, order: str, limit: int) -> list[wire.TraceSummary]:
        """Of every gateway that answers."""
        limit = min(limit, MOST)
        found = self._book.summaries(order, limit)
        for reply in await self._ask_others(wire.TracesAsked(order=order, limit=limit), wire.TraceList):
            found += reply.traces
        return ranked(found, order)[:limit]

    async def find(self, wanted: str) -> wire.TraceFound | None:
        found = self._book.find(wanted)
        if found.summary is not None:
            return found
        replies = await self._ask_others(wire.TraceAsked(id=wanted), wire.TraceFound)
        return next((reply for reply in replies if reply.summary is not None), None)

    async def _ask_others(self, message: wire.Message, expect: type[M]) -> list[M]:
        asked = (self._ask(other, message, expect) for other in self._others())
        return [reply for reply in await asyncio.gather(*asked) if reply is not None]

    async def _ask(self, other: str, message: wire.Message, expect: type[M]) -> M | None:
        try:
            reply = await self._bus.request(subjects.trace(self._cluster, other), message, expect, timeout_s=ASK_S)
        except BatonError as error:
            log.info("%s did not answer for its traces: %s", other, error.code)
            return None
        return None if isinstance(reply, wire.Busy) else reply

    # ---- from the bus ----------------------------------------------------------------------------------------

    def _arrived(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.Spans):
            before = self._book.dropped
            self._book.late(message.spans)
            self._lost.inc(message.dropped + self._book.dropped - before)

    async def _answer(self, message: wire.AnyMessage, _: object) -> wire.Message:
        if isinstance(message, wire.TracesAsked):
            return wire.TraceList(traces=self._book.summaries(message.order, min(message.limit, MOST)))
        if isinstance(message, wire.TraceAsked):
            return self._book.find(message.id)
        raise Internal(f"a gateway's traces do not take {type(message).__name__}")
