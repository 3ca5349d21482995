"""How many workers each pool should have for the load there is: what an autoscaler goes by. Pure, time is an argument.

Busy for as much as BUSY_SHARE of the time is enough; what waits should be gone within the target of the time to first
token. Every gateway hears the same beats and knows of the others' lines, so all say about the same: take the largest.
Invariants: a pool that serves is never told to have none; what is asked for rises at once and falls over MEMORY_S.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.gateway.scheduling.predict import Worker, room_for

BUSY_SHARE = 0.8
MEMORY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingLine:
    """What waits at the gateways."""

    prompts: int
    tokens: int


@dataclass(slots=True)
class _Busy:
    workers: float = 0.0  # as many as would be busy all the time
    at: float = 0.0

    def see(self, now_busy: float, now: float) -> float:
        kept = math.exp(-(now - self.at) / MEMORY_S) if self.at else 0.0
        self.workers, self.at = max(now_busy, now_busy + (self.workers - now_busy) * kept), now
        return self.workers


@dataclass(slots=True)
class Replicas:
    """`see` at every beat of the gateway's own."""

    needs: frozenset[str]  # pools without which nothing is served
    target_ttft_s: float
    target_itl_s: float
    wanted: dict[str, int] = field(default_factory=dict)
    _busy: dict[str, _Busy] = field(default_factory=dict)

    def see(self, heard: Iterable[Worker], line: WaitingLine, now: float) -> None:
        pools: dict[str, list[Worker]] = {role: [] for role in ("prefill", "decode")}
        for one in heard:
            pools.setdefault(one.beat.role, []).append(one)
        amounts = {"prefill": self._prefill(pools["prefill"], line), "decode": self._decode(pools["decode"], line)}
        for role, (busy, at_once) in amounts.items():
            lasting = self._busy.setdefault(role, _Busy()).see(max(busy, at_once * BUSY_SHARE), now) / BUSY_SHARE
            least = 1 if pools[role] or role in self.needs else 0
            self.wanted[role] = max(least, math.ceil(lasting - 1e-6))

    def _prefill(self, pool: list[Worker], line: WaitingLine) -> tuple[float, float]:
        """(workers busy now, workers that what waits calls for)."""
        busy = sum(1 for one in pool if one.backlog.queued_prompts or one.backlog.running)
        rates = [one.beat.prefill_tokens_per_s for one in pool if one.beat.prefill_tokens_per_s]
        if not rates:
            return float(busy), 0.0
        tokens = line.tokens + sum(one.backlog.queued_tokens for one in pool)
        return float(busy), tokens / (sum(rates) / len(rates)) / self.target_ttft_s

    def _decode(self, pool: list[Worker], line: WaitingLine) -> tuple[float, float]:
        jobs = [one.backlog.running + one.backlog.waiting for one in pool]
        rooms = [room_for(one.beat, self.target_itl_s) for one in pool]
        rooms = [room for room in rooms if room < math.inf]
        if not rooms:
            return float(sum(count > 0 for count in jobs)), 0.0
        room = sum(rooms) / len(rooms)
        # KV memory may be short before sequences are.
        busy = sum(max(count / room, one.beat.kv_usage) for count, one in zip(jobs, pool, strict=True))
        return busy, (sum(jobs) + line.prompts) / room
