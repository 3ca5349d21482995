"""Who gets workers, when, and who is told that it would be too late: the line with its placement and its targets.

The decisions are pure and elsewhere (placement.py, order.py, admission.py); here they meet the fleet and the clock.
Invariants: what is placed is charged in the same step; a prompt that could start while the line is blocked wakes it.
"""

import asyncio
import time
from dataclasses import replace
from random import Random

from services.gateway import admission
from services.gateway.admission import Appointments, Correction, Speeds
from services.gateway.crowd import Crowd
from services.gateway.fleet import Charge, Fleet
from services.gateway.order import Ahead
from services.gateway.placement import Placement, Rules, other_prefiller, place, takes_at
from services.gateway.queue import Queue, Seat, Waiting
from shared.access.key import TIERS
from shared.errors import DeadlineInfeasible, KvMemory, NoCapacity, Refused
from shared.settings import GatewaySettings, Target

LEAST_WAKE_S = 0.001


class Seating:
    def __init__(self, settings: GatewaySettings, fleet: Fleet) -> None:
        self._fleet = fleet
        self._queue_s = settings.queue_s
        self._refuses = settings.admission == "on"
        self._works = ("decode",) if settings.arrangement == "unsplit" else ("prefill", "decode")
        self._targets: dict[str, Target] = {tier: settings.target(tier) for tier in TIERS}
        self._rules = {
            tier: Rules(
                arrangement=settings.arrangement,
                strategy=settings.placement,
                local_prefill_tokens=settings.local_prefill_tokens,
                itl_s=target.itl_s if self._refuses else float("inf"),
            )
            for tier, target in self._targets.items()
        }
        self._crowded_rules = {tier: replace(rules, crowded=True) for tier, rules in self._rules.items()}
        self._crowd = Crowd()
        # What a client reads already goes on, even if it reads a little slower.
        self._urgent_rules = replace(self._rules["default"], itl_s=float("inf"))
        self._random = Random()  # noqa: S311 - breaks ties between workers
        self._appointments = Appointments()
        self._timer: asyncio.TimerHandle | None = None
        self._waits, self._services, self._promises = Correction(), Correction(), Correction()
        self.queue = Queue(
            {tier: getattr(settings.tier_weights, tier) for tier in TIERS},
            seat=self._seat,
            unseat=self.unseat,
            until=self._until,
        )

    async def take(self, waiting: Waiting, last_busy: str) -> Seat:
        """Raises Refused."""
        return await self.queue.take(waiting, refusal=lambda: self._out_of_time(waiting, last_busy))

    def unseat(self, seat: Seat) -> None:
        for charge in seat.charges.values():
            self._fleet.settle(charge)

    def saw(self, waiting: Waiting, first_token_at: float) -> None:
        """The first token has come from the workers that it was seated with."""
        if waiting.left_s is not None:
            self._services.see(waiting.left_s, first_token_at - waiting.seated)

    def kept(self, promised_s: float, measured_s: float) -> None:
        """What a request was told of its time to first token, and what it was."""
        self._promises.see(promised_s, measured_s)

    @property
    def promise_ratio(self) -> float:
        """Measured over promised time to first token, of late."""
        return self._promises.ratio

    def _out_of_time(self, waiting: Waiting, last_busy: str) -> Refused:
        self._waited(waiting, time.monotonic())
        return self.refusal(last_busy)

    def _waited(self, waiting: Waiting, now: float) -> None:
        """Also who waited in vain: if only those did that came in time, the forecast would stay too bright."""
        if waiting.wait_s is not None:
            self._waits.see(waiting.wait_s, now - waiting.entered)

    def answered(self, tier: str, tenant: str, tokens: int) -> None:
        self._fleet.answered(tokens)
        self.queue.serve(tier, tenant, tokens)

    def other_prefiller(self, tried: set[str], decode: str) -> str | None:
        """Who could take over a prefill job now."""
        return other_prefiller(
            self._fleet.pools(), decode, avoid=tried | {decode}, random=self._random, now=time.monotonic()
        )

    def refusal(self, last_busy: str) -> Refused:
        """Why a request that waited for its full time got no place."""
        again = self.retry_after_s(0)
        if not self._fleet.has("decode"):
            return NoCapacity("no decode worker is alive", retry_after_s=again)
        if last_busy == KvMemory.code:
            return KvMemory("no worker has memory for this prompt now", retry_after_s=again)
        return DeadlineInfeasible("no worker had room in time", retry_after_s=again)

    def retry_after_s(self, tokens: int, missing_s: float | None = None) -> float:
        """When one with so many tokens should ask again; `missing_s`: None: until the line has gone."""
        now = time.monotonic()
        speeds = self._fleet.speeds(now, self._targets["default"].itl_s)
        if missing_s is None:
            missing_s = admission.wait_s(speeds, len(self.queue), self.queue.tokens)
        cost_s = max(
            tokens / speeds.prefill_tokens_per_s if speeds.prefill_tokens_per_s else 0.0,
            1 / speeds.requests_per_s if speeds.requests_per_s else 0.0,
        )
        return self._appointments.next_s(now, missing_s=missing_s, cost_s=cost_s)

    # ---- for the queue -------------------------------------------------------------------------------------

    def _until(self, waiting: Waiting, ahead: Ahead) -> float:
        """Raises DeadlineInfeasible when it need not wait at all."""
        now = time.monotonic()
        latest = waiting.entered + self._queue_s
        speeds = self._fleet.speeds(now, self._targets[waiting.tier].itl_s)
        alone_s = admission.empty_s(speeds, waiting.tokens)
        if alone_s is not None:
            service_s = self._services(alone_s)
            if waiting.fresh:
                waiting.wait_s = self._wait_s(waiting, ahead, speeds, now)
                self._check(waiting, speeds, self._waits(waiting.wait_s) + service_s, now)
            if not waiting.urgent and self._refuses:
                latest = min(latest, waiting.since + self._target_s(waiting, speeds) - service_s)
        return asyncio.get_running_loop().time() + max(0.0, latest - now)

    def _wait_s(self, waiting: Waiting, ahead: Ahead, speeds: Speeds, now: float) -> float:
        """Other gateways' lines are served side by side with this one."""
        requests, tokens = self._fleet.lines_elsewhere(now)
        return admission.wait_s(
            speeds,
            ahead.requests + min(requests, ahead.requests + 1),
            ahead.tokens + min(tokens, ahead.tokens + waiting.tokens),
        )

    def _seat(self, waiting: Waiting) -> Seat | None:
        now, fleet = time.monotonic(), self._fleet
        avoid = {worker for worker, beats in waiting.avoid.items() if fleet.beats(worker) == beats}
        rules = self._rules_for(waiting, now)
        placement = place(fleet.pools(), waiting.wish, rules, avoid=avoid, random=self._random, now=now)
        if placement is None:
            self._wake_later(now, rules)
            return None
        self._waited(waiting, now)
        if not self._has_line(waiting):
            self._crowd.served(waiting.tenant, now)
        if placement.predicted_ttft_s is not None:
            # Its turn has come: is there still time?
            speeds = fleet.speeds(now, self._targets[waiting.tier].itl_s)
            self._check(waiting, speeds, self._services(placement.predicted_ttft_s), now)
        waiting.fresh, waiting.left_s, waiting.seated = False, placement.predicted_ttft_s, now
        return Seat(placement, self._charges(placement, waiting.tokens, now))

    def _rules_for(self, waiting: Waiting, now: float) -> Rules:
        if waiting.urgent:
            return self._urgent_rules
        if self._has_line(waiting) and self._crowd.has_other(waiting.tenant, now):
            return self._crowded_rules[waiting.tier]
        return self._rules[waiting.tier]

    def _has_line(self, waiting: Waiting) -> bool:
        """Whether its tenant waits with more than this one."""
        return self.queue.waits(waiting.tier, waiting.tenant) > 1

    def _charges(self, placement: Placement, tokens: int, now: float) -> dict[str, Charge]:
        whole, fleet = placement.prefill is None, self._fleet
        charges = {placement.decode: fleet.charge(placement.decode, jobs=1, tokens=tokens if whole else 0, now=now)}
        if placement.prefill is not None:
            charges[placement.prefill] = fleet.charge(placement.prefill, jobs=1, tokens=tokens, now=now)
        return charges

    # ---- targets -------------------------------------------------------------------------------------------

    def _check(self, waiting: Waiting, speeds: Speeds, left_s: float, now: float) -> None:
        """`left_s`: predicted from now, corrected. Raises DeadlineInfeasible."""
        expected_s = now - waiting.since + left_s
        if waiting.expected_s is None:
            waiting.expected_s = expected_s  # the first one stands: it is what the client was promised
        if waiting.urgent or not self._refuses:
            return
        target_s = self._target_s(waiting, speeds)
        if admission.feasible(expected_s=expected_s, target=target_s, waits=len(self.queue) > 1, idle=speeds.idle):
            return
        raise DeadlineInfeasible(
            f"the first token would come after {expected_s:.1f} s, and its target is {target_s:.1f} s",
            retry_after_s=self.retry_after_s(waiting.tokens, expected_s - target_s),
        )

    def _target_s(self, waiting: Waiting, speeds: Speeds) -> float:
        alone_s = admission.empty_s(speeds, waiting.tokens)
        return admission.target_s(self._targets[waiting.tier].ttft_s, self._services(alone_s or 0.0))

    def _wake_later(self, now: float, rules: Rules) -> None:
        """A worker takes its next prompt before anything is heard of it."""
        if self._timer is not None:
            return
        pools = self._fleet.pools()
        takes = [takes_at(one, rules, now) for work in self._works for one in pools.with_room(work)]
        in_s = min((at for at in takes if at >= now), default=-1.0) - now
        if in_s >= 0:
            self._timer = asyncio.get_running_loop().call_later(max(in_s, LEAST_WAKE_S), self._wake)

    def _wake(self) -> None:
        self._timer = None
        self.queue.pump()
