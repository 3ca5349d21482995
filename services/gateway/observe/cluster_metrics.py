"""The gateway's /metrics: its own and, over the bus, those of every service that lives.

Invariants: all are asked at once and each has ASK_S; who does not answer is left out and counted; however many ask at
a time, services are asked once.
"""

import asyncio
import logging
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter

from services.gateway.scheduling.members import Member
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BatonError
from shared.exposition import labelled, merged

log = logging.getLogger(__name__)

ASK_S = 1.0


class ClusterMetrics:
    def __init__(
        self, bus: Bus, cluster: str, own_id: str, registry: CollectorRegistry, live: Callable[[], list[Member]]
    ) -> None:
        """`live`: every service that has beaten lately, this one too."""
        self._bus, self._cluster, self._id, self._registry, self._live = bus, cluster, own_id, registry, live
        self._running: asyncio.Task[str] | None = None
        self._missing = Counter(
            "baton_metrics_unanswered",
            "Services left out of a merged page: no answer in time",
            ["role"],
            registry=registry,
        )

    async def page(self) -> str:
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._gather())
        return await asyncio.shield(self._running)

    async def _gather(self) -> str:
        others = [member for member in self._live() if member.id != self._id]
        answers = await asyncio.gather(*(self._ask(member) for member in others))
        own = labelled(self._registry, "gateway", self._id)
        # Of a hundred services it is megabytes of text: not on the loop.
        return await asyncio.to_thread(merged, [own, *(text for text in answers if text is not None)])

    async def _ask(self, member: Member) -> str | None:
        subject = subjects.metrics(self._cluster, member.id)
        try:
            reply = await self._bus.request(subject, wire.MetricsAsked(), wire.MetricsText, timeout_s=ASK_S)
        except BatonError as error:
            log.debug("metrics of %s: %s", member.id, error.code)
            reply = None
        if isinstance(reply, wire.MetricsText):
            return reply.text
        self._missing.labels(role=member.role).inc()
        return None
