"""Finished spans on their way from a worker or store to the gateways whose requests they belong to.

Sampled ones are sent at once; the others are held for a while, in case their gateway finds in the end that the request
was slow or failed and asks for them. Invariants: whoever ends a span only appends to a bounded queue, from any thread;
what does not fit is dropped and counted; nothing here is waited for by a job.
"""

import asyncio
import collections
import logging

from prometheus_client import CollectorRegistry, Counter, Gauge

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BatonError
from shared.spans import Span, record

log = logging.getLogger(__name__)

FLUSH_S = 0.1
MAX_FRESH = 8192  # ended since the last flush
MAX_HELD = 8192  # of traces that are not sampled; the oldest go first
MAX_BATCH = 256  # in one message: some 100 KB


class SpanSender:
    """Give `take` to the recorder; `run` is a task of the service."""

    def __init__(self, service: str, instance: str, registry: CollectorRegistry) -> None:
        self._service, self._instance = service, instance
        self._fresh: collections.deque[Span] = collections.deque()
        self._held: collections.OrderedDict[str, list[Span]] = collections.OrderedDict()  # by root
        self._held_count = 0
        self._unsaid = 0  # dropped, and no gateway has been told
        self._sent = Counter("baton_spans_sent", "Finished spans sent to gateways", registry=registry)
        self._dropped = Counter("baton_spans_dropped", "Finished spans lost", ["reason"], registry=registry)
        for reason in ("too_many", "bus"):
            self._dropped.labels(reason=reason)
        Gauge("baton_spans_held", "Finished spans that may still be asked for", registry=registry).set_function(
            lambda: self._held_count + len(self._fresh)
        )

    def take(self, span: Span) -> None:
        """Of the recorder, from any thread."""
        if len(self._fresh) >= MAX_FRESH:
            self._drop(1, "too_many")
        else:
            self._fresh.append(span)

    async def run(self, bus: Bus, cluster: str) -> None:
        """Until cancelled."""
        await bus.listen(subjects.wanted(cluster), self._wanted)
        while True:
            await asyncio.sleep(FLUSH_S)
            if self._fresh:
                await self.flush(bus, cluster)

    async def flush(self, bus: Bus, cluster: str) -> None:
        by_gateway: dict[str, list[Span]] = {}
        for _ in range(len(self._fresh)):
            span = self._fresh.popleft()
            if span.sampled:
                by_gateway.setdefault(span.owner[:-17], []).append(span)
            else:
                self._hold(span)
        for gateway, spans in by_gateway.items():
            for start in range(0, len(spans), MAX_BATCH):
                await self._send(bus, subjects.spans(cluster, gateway), spans[start : start + MAX_BATCH])

    async def _send(self, bus: Bus, subject: str, spans: list[Span]) -> None:
        message = wire.Spans(
            instance=self._instance,
            spans=[record(span, self._service, self._instance) for span in spans],
            dropped=self._unsaid,
        )
        try:
            await bus.publish(subject, message)
        except BatonError as error:
            log.debug("spans lost: %s", error.message)
            self._drop(len(spans), "bus")
        else:
            self._unsaid = 0
            self._sent.inc(len(spans))

    def _hold(self, span: Span) -> None:
        self._held.setdefault(span.root, []).append(span)
        self._held_count += 1
        while self._held_count > MAX_HELD:
            _, spans = self._held.popitem(last=False)  # nobody asked: not a loss
            self._held_count -= len(spans)

    def _wanted(self, message: wire.AnyMessage) -> None:
        """Sampled after all, and so is what ends later."""
        if not isinstance(message, wire.SpansWanted):
            return
        wanted = set(message.roots)
        for span in self._fresh:
            if span.root in wanted:
                span.sampled = True
        for root in wanted & self._held.keys():
            spans = self._held.pop(root)
            self._held_count -= len(spans)
            for span in spans:
                span.sampled = True
                self.take(span)

    def _drop(self, count: int, reason: str) -> None:
        self._unsaid += count
        self._dropped.labels(reason=reason).inc(count)
