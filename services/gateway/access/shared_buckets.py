"""The buckets in Redis: whoever asks while an answer is awaited goes with the next batch, so one connection serves all.

`baton:{cluster}:quota:{key id}`  hash  what is left of requests and tokens, and when that was; expires KEEP_S after its
last use, long after it is full and long after the prefix index's keys, which therefore are evicted first.

Invariants: answers come in the order in which Redis made them; the clock is Redis' own; a batch is answered within
ASK_S, by None when Redis is away; what was taken for a request that has gone meanwhile is given back.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, NamedTuple, TypeVar

from redis.asyncio import Redis

from services.gateway.access.buckets import Amount
from services.gateway.background import BackgroundTasks
from shared.access.connection import AWAY

T = TypeVar("T")

ASK_S = 0.5
KEEP_S = 86_400
MAX_BATCH = 256

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


class BucketAnswer(NamedTuple):
    allowed: bool
    left: Amount


class BucketQuestion(NamedTuple):
    key_id: str
    limits: Amount
    amount: Amount
    gives: bool
    answer: "asyncio.Future[BucketAnswer | None]"


def bucket_name(cluster: str, key_id: str) -> str:
    return f"baton:{cluster}:quota:{key_id}"


class SharedBuckets:
    def __init__(self, redis: Redis, cluster: str) -> None:
        self._redis = redis
        self._cluster = cluster
        self._waiting: list[BucketQuestion] = []  # bounded by the requests that this gateway lets in
        self._asking = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def ask(
        self, background: BackgroundTasks, key_id: str, limits: Amount, amount: Amount, *, gives: bool = False
    ) -> BucketAnswer | None:
        """Take `amount`, or give it back. None: Redis is away."""
        answer: asyncio.Future[BucketAnswer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(BucketQuestion(key_id, limits, amount, gives, answer))
        if not self._asking:
            background.start(self._ask_all())
            self._asking = True
        return await answer

    async def _ask_all(self) -> None:
        """Until nobody waits."""
        batch: list[BucketQuestion] = []
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                for question, answer in zip(batch, await self._ask(batch), strict=True):
                    self._tell(question, answer)
        finally:
            self._asking = False
            cut_off, self._waiting = [*batch, *self._waiting], []
            for question in cut_off:
                if not question.answer.done():
                    question.answer.set_result(None)

    async def _ask(self, batch: list[BucketQuestion]) -> list[BucketAnswer | None]:
        pipe = self._redis.pipeline(transaction=False)
        for one in batch:
            what = "give" if one.gives else "take"
            name = bucket_name(self._cluster, one.key_id)
            pipe.eval(SCRIPT, 1, name, *one.limits, *one.amount, what, KEEP_S)
        try:
            return [_answer(found) for found in await patiently(pipe.execute(raise_on_error=False), ASK_S)]
        except AWAY:
            return [None] * len(batch)

    def _tell(self, question: BucketQuestion, answer: BucketAnswer | None) -> None:
        if not question.answer.done():
            question.answer.set_result(answer)
        elif answer is not None and answer.allowed and not question.gives:
            nobody: asyncio.Future[BucketAnswer | None] = asyncio.get_running_loop().create_future()
            self._waiting.append(question._replace(gives=True, answer=nobody))


def _answer(found: Any) -> BucketAnswer | None:
    if isinstance(found, Exception):  # Redis lives and cannot: it is full, or only a replica
        return None
    allowed, requests, tokens = found
    return BucketAnswer(bool(allowed), Amount(float(requests), float(tokens)))


async def patiently(work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The work, or TimeoutError. Two looks: after a loop stood still, the first finds what came meanwhile unread."""
    task = asyncio.ensure_future(work)
    try:
        for _ in range(2):
            done, _ = await asyncio.wait({task}, timeout=seconds / 2)
            if done:
                return task.result()
        raise TimeoutError
    finally:
        task.cancel()
