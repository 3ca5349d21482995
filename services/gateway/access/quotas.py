"""Limits over all gateways: token buckets in Redis, changed by one script; shares of them here while Redis is away.

`baton:{cluster}:quota:{key id}`  hash  what is left of requests and tokens, and when that was; expires KEEP_S after its
last use, long after it is full and long after the prefix index's keys, which therefore are evicted first.

Invariants: requests and tokens are taken both or neither; the clock of the shared buckets is Redis' own; no request
waits longer than ASK_S for Redis, and while Redis is away only one asks at a time, after a back-off; a share begins
with what Redis last said was left.
"""

import asyncio
import logging
import random
import time
from dataclasses import dataclass

from redis.asyncio import Redis

from services.gateway.access.buckets import Amount, Bucket, wait_s
from services.gateway.access.client import Client
from services.gateway.access.figures import Figures
from services.gateway.access.gateways import Gateways
from shared.access.connection import AWAY

log = logging.getLogger(__name__)

ASK_S = 0.25
KEEP_S = 86_400
FIRST_BACKOFF_S = 0.5
LAST_BACKOFF_S = 5.0
MAX_BUCKETS = 20_000  # kept here; who was not seen for longest is forgotten, and begins with a full share

# ARGV: limits of requests and tokens, costs of both, "give" or "take", KEEP_S.
SCRIPT = """
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local state = redis.call('HMGET', KEYS[1], 'at', 'requests', 'tokens')
local span = math.max(0, now - (tonumber(state[1]) or now))
local left, cost, allowed = {}, {}, 1
for i = 1, 2 do
  local limit = tonumber(ARGV[i])
  cost[i] = tonumber(ARGV[i + 2])
  left[i] = math.min(limit, (tonumber(state[i + 1]) or limit) + limit * span / 60)
  if ARGV[5] == 'give' then
    left[i] = math.min(limit, left[i] + cost[i])
    cost[i] = 0
  elseif limit > 0 and left[i] < math.min(cost[i], limit) then
    allowed = 0
  end
end
for i = 1, 2 do
  left[i] = string.format('%.17g', left[i] - allowed * cost[i])
end
redis.call('HSET', KEYS[1], 'at', string.format('%.6f', now), 'requests', left[1], 'tokens', left[2])
redis.call('EXPIRE', KEYS[1], ARGV[6])
return {allowed, left[1], left[2]}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """`limits`: by which it was decided; `shared`: by Redis. `left`: after it. `wait_s`: until it would be allowed."""

    allowed: bool
    limits: Amount
    left: Amount
    wait_s: float
    shared: bool


def bucket_name(cluster: str, key_id: str) -> str:
    return f"baton:{cluster}:quota:{key_id}"


class Quotas:
    def __init__(self, redis: Redis, cluster: str, gateways: Gateways, figures: Figures) -> None:
        self._cluster = cluster
        self._gateways = gateways
        self._figures = figures
        self._script = redis.register_script(SCRIPT)
        self._buckets: dict[str, Bucket] = {}  # by key id, this gateway's share; the longest unused first
        self._away_until: float | None = None
        self._backoff_s = FIRST_BACKOFF_S
        self._probing = False

    def __len__(self) -> int:
        return len(self._buckets)

    async def take(self, client: Client, cost: Amount) -> Taken:
        if self._may_ask():
            answer = await self._ask(client, cost, "take")
            if answer is not None:
                allowed, left = answer
                self._remember(client, left)
                return _taken(client.limits, cost, left, allowed=allowed, shared=True)
        return self._take_share(client, cost)

    async def give(self, client: Client, back: Amount, *, shared: bool) -> None:
        """What was taken and not used. Negative: used beyond what was taken. Lost while Redis is away."""
        if not shared:
            self._bucket(client).give(client.limits / self._gateways.count(), back, time.monotonic())
        elif self._may_ask():
            await self._ask(client, back, "give")

    # ---- Redis ---------------------------------------------------------------------------------------------

    def _may_ask(self) -> bool:
        return self._away_until is None or (not self._probing and time.monotonic() >= self._away_until)

    async def _ask(self, client: Client, cost: Amount, what: str) -> tuple[bool, Amount] | None:
        """None: Redis is away."""
        probes = self._probing = self._away_until is not None
        try:
            async with asyncio.timeout(ASK_S):
                allowed, *left = await self._script(
                    keys=[bucket_name(self._cluster, client.key_id)], args=[*client.limits, *cost, what, KEEP_S]
                )
        except AWAY as error:
            self._went_away(type(error).__name__, probed=probes)
            return None
        finally:
            if probes:
                self._probing = False
        self._came_back()
        return bool(allowed), Amount(float(left[0]), float(left[1]))

    def _went_away(self, why: str, *, probed: bool) -> None:
        if self._away_until is None:
            log.warning("quotas: Redis is away (%s): this gateway takes its share of every limit", why)
            self._backoff_s = FIRST_BACKOFF_S
        elif probed:
            self._backoff_s = min(2 * self._backoff_s, LAST_BACKOFF_S)
        else:
            return  # it was asked before
        self._figures.fallback.set(1)
        self._away_until = time.monotonic() + self._backoff_s * random.uniform(0.75, 1.25)  # noqa: S311 - no secret

    def _came_back(self) -> None:
        if self._away_until is not None:
            log.info("quotas: Redis is back: limits are shared again")
            self._away_until = None
            self._figures.fallback.set(0)

    # ---- shares --------------------------------------------------------------------------------------------

    def _take_share(self, client: Client, cost: Amount) -> Taken:
        self._figures.shares.inc()
        limits = client.limits / self._gateways.count()
        bucket = self._bucket(client)
        allowed = bucket.take(limits, cost, time.monotonic())
        return _taken(limits, cost, bucket.left, allowed=allowed, shared=False)

    def _remember(self, client: Client, left: Amount) -> None:
        bucket = self._bucket(client)
        bucket.left, bucket.at = left / self._gateways.count(), time.monotonic()

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
