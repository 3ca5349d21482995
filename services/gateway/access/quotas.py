"""Limits over all gateways: token buckets in Redis; a share of each limit here while Redis is away.

Invariants: requests and tokens are taken both or neither; while Redis is away only one request at a time asks it, after
a back-off; a share begins with what Redis last said was left.
"""

import logging
import time
from dataclasses import dataclass

from services.gateway.access.buckets import Amount, Bucket, wait_s
from services.gateway.access.client import Client
from services.gateway.access.figures import AccessFigures
from services.gateway.access.gateways import GatewayCount
from services.gateway.access.shared_buckets import BucketAnswer, SharedBuckets
from services.gateway.background import BackgroundTasks
from shared.backoff import Backoff

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 5.0
MAX_BUCKETS = 20_000  # kept here; who was not seen for longest is forgotten, and begins with a full share


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """`limits`: by which it was decided; `shared`: by Redis. `left`: after it. `wait_s`: until it would be allowed."""

    allowed: bool
    limits: Amount
    left: Amount
    wait_s: float
    shared: bool


class Quotas:
    def __init__(self, shared: SharedBuckets, gateways: GatewayCount, figures: AccessFigures) -> None:
        self._shared = shared
        self._gateways = gateways
        self._figures = figures
        self._buckets: dict[str, Bucket] = {}  # by key id, this gateway's share; the longest unused first
        self._away_until: float | None = None
        self._backoff = Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S, spread=(0.75, 1.25))
        self._probing = False

    def __len__(self) -> int:
        return len(self._buckets)

    async def take(self, background: BackgroundTasks, client: Client, cost: Amount) -> Taken:
        if self._may_ask():
            answer = await self._ask(background, client, cost)
            if answer is not None:
                bucket = self._bucket(client)
                bucket.left, bucket.at = answer.left / self._gateways.count(), time.monotonic()
                return _taken(client.limits, cost, answer.left, allowed=answer.allowed, shared=True)
        self._figures.shares.inc()
        limits = client.limits / self._gateways.count()
        bucket = self._bucket(client)
        allowed = bucket.take(limits, cost, time.monotonic())
        return _taken(limits, cost, bucket.left, allowed=allowed, shared=False)

    async def give(self, background: BackgroundTasks, client: Client, back: Amount, *, shared: bool) -> None:
        """What was taken and not used. Negative: used beyond what was taken. Lost while Redis is away."""
        if not shared:
            self._bucket(client).give(client.limits / self._gateways.count(), back, time.monotonic())
        elif self._may_ask():
            await self._ask(background, client, back, gives=True)

    # ---- is Redis there? -----------------------------------------------------------------------------------

    def _may_ask(self) -> bool:
        return self._away_until is None or (not self._probing and time.monotonic() >= self._away_until)

    async def _ask(
        self, background: BackgroundTasks, client: Client, amount: Amount, *, gives: bool = False
    ) -> BucketAnswer | None:
        probes = self._probing = self._away_until is not None
        try:
            answer = await self._shared.ask(background, client.key_id, client.limits, amount, gives=gives)
        finally:
            if probes:
                self._probing = False
        if answer is None:
            self._went_away(probed=probes)
        else:
            self._came_back()
        return answer

    def _went_away(self, *, probed: bool) -> None:
        if self._away_until is None:
            log.warning("quotas: Redis is away: this gateway takes its share of every limit")
            self._backoff.reset()
        elif not probed:
            return  # it was asked before
        self._figures.fallback.set(1)
        self._away_until = time.monotonic() + self._backoff.next_s()

    def _came_back(self) -> None:
        if self._away_until is not None:
            log.info("quotas: Redis is back: limits are shared again")
            self._away_until = None
            self._figures.fallback.set(0)

    # ---- shares --------------------------------------------------------------------------------------------

    def _bucket(self, client: Client) -> Bucket:
        bucket = self._buckets.pop(client.key_id, None)
        if bucket is None:
            if len(self._buckets) >= MAX_BUCKETS:
                del self._buckets[next(iter(self._buckets))]
            bucket = Bucket(client.limits / self._gateways.count(), time.monotonic())
        self._buckets[client.key_id] = bucket
        return bucket


def _taken(limits: Amount, cost: Amount, left: Amount, *, allowed: bool, shared: bool) -> Taken:
    again_s = 0.0 if allowed else wait_s(left, limits, cost)
    return Taken(allowed=allowed, limits=limits, left=left, wait_s=again_s, shared=shared)
