"""The account of what was used: summed up in memory, written to Redis each second.

Invariants: a request never waits for it; what waits is bounded, and what does not fit is counted; while Redis is away
sums are kept, and written later. A write whose answer is lost is written again, so after a failure a sum may be too
large by what one second held, never too small.
"""

import asyncio
import logging

from redis.asyncio import Redis

from services.gateway.access.figures import AccessFigures
from shared.access import usage_table
from shared.access.connection import AWAY
from shared.access.usage_table import Place, Used

log = logging.getLogger(__name__)

FLUSH_S = 1.0
MAX_PENDING = 10_000


class UsageLog:
    def __init__(self, redis: Redis, cluster: str, figures: AccessFigures, *, max_pending: int = MAX_PENDING) -> None:
        self._redis = redis
        self._cluster = cluster
        self._figures = figures
        self._max_pending = max_pending
        self._pending: dict[Place, Used] = {}
        self._away = False

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, tenant: str, model: str, used: Used) -> None:
        self._put((usage_table.today(), tenant, model), used)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def flush(self) -> bool:
        """False: Redis is away, and it is all still here."""
        if not self._pending:
            return True
        pending, self._pending = self._pending, {}
        try:
            await usage_table.write(self._redis, self._cluster, pending)
        except AWAY as error:
            self._restore(pending)
            if not self._away:
                log.warning("usage: Redis is away (%s); sums are kept until it is back", type(error).__name__)
            self._away = True
            return False
        except asyncio.CancelledError:
            self._restore(pending)
            raise
        self._away = False
        return True

    def _restore(self, pending: dict[Place, Used]) -> None:
        newer, self._pending = self._pending, pending
        for place, used in newer.items():
            self._put(place, used)

    def _put(self, place: Place, used: Used) -> None:
        known = self._pending.get(place)
        if known is not None:
            known.add(used)
        elif len(self._pending) < self._max_pending:
            self._pending[place] = used
        else:
            self._figures.dropped.inc(max(1, used.requests))
