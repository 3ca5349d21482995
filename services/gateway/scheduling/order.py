"""In which order those who wait are served: tier by weight, tenant with the least served tokens, earliest deadline.

Tiers share by weighted fair queueing: each has a clock that runs slower the more it weighs, and the one that is behind
is next, so that none starves. Tenants share by the virtual token counter of "Fairness in Serving Large Language
Models" (Sheng et al., OSDI 2024): who comes is lifted to the least of those who are there, or, where nobody waits, to
where the others had got, so that nobody saves up a right: neither by staying away, nor by being new. What already
streams to a client, and must go on elsewhere, is before all. Pure. Invariant: tokens and requests are counted exactly
over every way out.
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count

import msgspec

MOST_TENANTS = 10_000  # remembered while they have nothing here


class Entry(msgspec.Struct, eq=False, kw_only=True):
    """One that waits."""

    tier: str
    tenant: str
    tokens: int
    deadline: float = 0.0
    urgent: bool = False
    here: bool = False  # in line


@dataclass(frozen=True, slots=True)
class Ahead:
    """What should be served before one that comes now."""

    requests: int
    tokens: float


@dataclass(slots=True)
class _Tenant:
    served: float
    entries: list[tuple[float, int, Entry]] = field(default_factory=list)  # heap, by deadline; some have left
    requests: int = 0
    tokens: int = 0


@dataclass(slots=True)
class _Tier:
    weight: float
    clock: float = 0.0  # served tokens by weight
    tenants: dict[str, _Tenant] = field(default_factory=dict)  # those who wait
    idle: dict[str, float] = field(default_factory=dict)  # served tokens of those who do not, oldest first
    level: float = 0.0  # the most that any of those was served
    requests: int = 0


class Order:
    def __init__(self, weights: Mapping[str, float]) -> None:
        self._tiers = {name: _Tier(weight) for name, weight in weights.items()}
        self._urgent: dict[Entry, None] = {}
        self._numbers = count()
        self._size = 0
        self.tokens = 0  # of all who wait

    def __len__(self) -> int:
        return self._size

    def add(self, entry: Entry) -> None:
        """Also one that has been here before: its deadline is its own."""
        entry.here = True
        self._size += 1
        self.tokens += entry.tokens
        if entry.urgent:
            self._urgent[entry] = None
            return
        tier = self._tiers[entry.tier]
        if not tier.requests:
            everybody = self._tiers.values()
            clocks = [one.clock for one in everybody if one.requests]
            tier.clock = max(tier.clock, min(clocks) if clocks else max(one.clock for one in everybody))
        tier.requests += 1
        tenant = self._tenant(tier, entry.tenant)
        tenant.requests += 1
        tenant.tokens += entry.tokens
        heapq.heappush(tenant.entries, (entry.deadline, next(self._numbers), entry))

    def remove(self, entry: Entry) -> None:
        """Served, refused or gone; nothing when it is not here."""
        if not entry.here:
            return
        entry.here = False
        self._size -= 1
        self.tokens -= entry.tokens
        if entry.urgent:
            del self._urgent[entry]
            return
        tier = self._tiers[entry.tier]
        tier.requests -= 1
        tenant = tier.tenants[entry.tenant]
        tenant.requests -= 1
        tenant.tokens -= entry.tokens
        if not tenant.requests:
            del tier.tenants[entry.tenant]
            self._rest(tier, entry.tenant, tenant.served)

    def first(self) -> Entry | None:
        """Who is next."""
        if self._urgent:
            return next(iter(self._urgent))
        waiting = [tier for tier in self._tiers.values() if tier.requests]
        if not waiting:
            return None
        tier = min(waiting, key=lambda one: one.clock)
        tenant = min(tier.tenants.values(), key=lambda one: (one.served, one.requests))
        while not tenant.entries[0][2].here:
            heapq.heappop(tenant.entries)
        return tenant.entries[0][2]

    def waits(self, tier: str, tenant: str) -> int:
        """How many of a tenant do."""
        known = self._tiers[tier].tenants.get(tenant)
        return known.requests if known is not None else 0

    def everybody(self) -> list[Entry]:
        named = [
            item[2] for tier in self._tiers.values() for tenant in tier.tenants.values() for item in tenant.entries
        ]
        return [*self._urgent, *(entry for entry in named if entry.here)]

    def serve(self, tier: str, tenant: str, tokens: int) -> None:
        """These have been, or are now, computed for them."""
        served = self._tiers[tier]
        served.clock += tokens / served.weight
        if tenant in served.tenants:
            served.tenants[tenant].served += tokens
        else:
            self._rest(served, tenant, served.idle.pop(tenant, 0.0) + tokens)

    def ahead(self, tier: str, tenant: str, tokens: int) -> Ahead:
        """Its own tenant's all; of others as much as is served while that is, by fair shares."""
        mine = self._tiers[tier]
        own = mine.tenants.get(tenant)
        turn = (own.tokens if own else 0) + tokens
        requests, before = (own.requests if own else 0), float(turn - tokens)
        for name, other in mine.tenants.items():
            if name != tenant:
                share = min(1.0, turn / max(1, other.tokens))
                requests += round(other.requests * share)
                before += other.tokens * share
        round_ = before + tokens
        for other_tier in self._tiers.values():
            waiting = sum(one.tokens for one in other_tier.tenants.values())
            if other_tier is not mine and waiting:
                share = min(1.0, round_ * other_tier.weight / mine.weight / waiting)
                requests += round(other_tier.requests * share)
                before += waiting * share
        urgent = sum(entry.tokens for entry in self._urgent)
        return Ahead(requests + len(self._urgent), before + urgent)

    @staticmethod
    def _rest(tier: _Tier, tenant: str, served: float) -> None:
        """It has no line (any more)."""
        tier.idle[tenant] = served
        tier.level = max(tier.level, served)
        if len(tier.idle) > MOST_TENANTS:
            del tier.idle[next(iter(tier.idle))]

    def _tenant(self, tier: _Tier, name: str) -> _Tenant:
        known = tier.tenants.get(name)
        if known is None:
            least = min((one.served for one in tier.tenants.values()), default=tier.level)
            known = tier.tenants[name] = _Tenant(max(tier.idle.pop(name, 0.0), least))
        return known


ACTIVE_S = 2.0  # since a tenant was served last


class RecentTenants:
    """Which tenants without a line were served of late: beside them, who has one gets no head start.

    What is bound ahead of its time is out of the line: nobody can pass it any more, and a tenant that asks one at a
    time would find a prompt of the other's before it at every worker. Tenants that all have lines take turns as it is,
    and keep the head start. Invariant: what is remembered is bounded.
    """

    MOST = 1000

    def __init__(self) -> None:
        self._served_at: dict[str, float] = {}  # oldest first

    def served(self, tenant: str, now: float) -> None:
        self._served_at.pop(tenant, None)
        self._served_at[tenant] = now
        while self._served_at:
            oldest = next(iter(self._served_at))
            if len(self._served_at) <= self.MOST and now - self._served_at[oldest] < ACTIVE_S:
                break
            del self._served_at[oldest]

    def has_other(self, tenant: str, now: float) -> bool:
        """Was anybody else served of late?"""
        return any(now - at < ACTIVE_S for other, at in self._served_at.items() if other != tenant)
