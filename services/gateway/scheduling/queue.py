"""Where a prompt gets its workers: at once while nobody waits, else in line, bound to workers as late as possible.

The decisions are pure and elsewhere (placement.py, order.py, admission.py); here they meet the fleet and the clock.
Invariants: bounded by admission; what is placed is charged to its workers in the same step, so that the next in line
sees it; a cancelled request leaves at once; nobody is passed over, except that one which avoids a worker (it has just
refused it) holds up nobody else; nobody waits beyond the moment from which it could not be served in time; a place that
nobody takes up is given back; a prompt that could start while the line is blocked wakes it.
"""

import asyncio
import time
from collections.abc import Callable
from random import Random

import msgspec

from services.gateway.scheduling import admission
from services.gateway.scheduling.admission import Appointments, Correction, Speeds
from services.gateway.scheduling.fleet import Fleet
from services.gateway.scheduling.order import Ahead, Entry, Order, RecentTenants
from services.gateway.scheduling.placement import Placement, Rules, Wish, other_prefiller, place, takes_at
from services.gateway.scheduling.predict import Charge
from shared.access.key import TIERS
from shared.errors import DeadlineInfeasible, KvMemory, NoCapacity, Refused
from shared.settings import GatewaySettings, Target

LEAST_WAKE_S = 0.001


class Waiting(Entry, kw_only=True):
    """One prompt as scheduling sees it, over all its attempts. Its request sets the first group, the queue the rest."""

    wish: Wish
    since: float  # when its request came; its target counts from there
    entered: float = 0.0  # when it came in line
    # Worker -> its beat count when it refused; the next beat lifts it.
    avoid: dict[str, int] = msgspec.field(default_factory=dict)

    placement: Placement | None = None  # the latest
    charges: dict[str, Charge] = msgspec.field(default_factory=dict)  # of that placement, by worker
    fresh: bool = True  # it has had no place yet
    # Predictions as they come from the workers' figures, before what was measured has corrected them:
    wait_s: float | None = None  # from `entered` to its place; None: it got one at once, or nothing is known
    left_s: float | None = None  # from its place to the first token
    placed_at: float = 0.0
    expected_s: float | None = None  # what its time to first token, from `since`, was first expected to be
    turn: asyncio.Future[None] | None = None  # while it waits


class Queue:
    def __init__(self, settings: GatewaySettings, fleet: Fleet) -> None:
        self._fleet = fleet
        self._queue_s = settings.queue_s
        self._refuses = settings.admission == "on"
        self._works = ("decode",) if settings.arrangement == "unsplit" else ("prefill", "decode")
        self._targets: dict[str, Target] = {tier: settings.target(tier) for tier in TIERS}

        def rules(itl_s: float, *, crowded: bool = False) -> Rules:
            return Rules(
                arrangement=settings.arrangement,
                strategy=settings.placement,
                local_prefill_tokens=settings.local_prefill_tokens,
                itl_s=itl_s if self._refuses else float("inf"),
                crowded=crowded,
            )

        self._rules = {tier: rules(target.itl_s) for tier, target in self._targets.items()}
        self._crowded_rules = {tier: rules(target.itl_s, crowded=True) for tier, target in self._targets.items()}
        # What a client reads already goes on, even if it reads a little slower.
        self._urgent_rules = rules(float("inf"))
        self._recent = RecentTenants()
        self._random = Random()  # noqa: S311 - breaks ties between workers
        self._appointments = Appointments()
        self._timer: asyncio.TimerHandle | None = None
        self._waits, self._services, self._promises = Correction(), Correction(), Correction()
        self._order = Order({tier: getattr(settings.tier_weights, tier) for tier in TIERS})

    def __len__(self) -> int:
        return len(self._order)

    @property
    def tokens(self) -> int:
        return self._order.tokens

    @property
    def promise_ratio(self) -> float:
        """Measured over promised time to first token, of late."""
        return self._promises.ratio

    # ---- for a request -------------------------------------------------------------------------------------

    async def take(self, waiting: Waiting, last_busy: str) -> Placement:
        """Give it workers, charged for it; `release` gives them back. Raises Refused.

        `last_busy`: why a worker refused it last.
        """
        waiting.wait_s = None
        if not self._order and self._place(waiting):
            self._order.serve(waiting.tier, waiting.tenant, waiting.tokens)
        else:
            await self._wait(waiting, last_busy)
        assert waiting.placement is not None  # noqa: S101 - for the type checker
        return waiting.placement

    def release(self, waiting: Waiting) -> None:
        """Give back what its workers are still charged for it."""
        for charge in waiting.charges.values():
            self._fleet.settle(charge)

    def answered(self, tier: str, tenant: str, tokens: int) -> None:
        """An answer of so many tokens has ended."""
        self._fleet.answered(tokens)
        self._order.serve(tier, tenant, tokens)

    def record_ttft(self, waiting: Waiting, first_token_at: float) -> None:
        """The first token has come from the workers that it was placed at first."""
        if waiting.left_s is not None:
            self._services.see(waiting.left_s, first_token_at - waiting.placed_at)
        if waiting.expected_s is not None:
            self._promises.see(waiting.expected_s, first_token_at - waiting.since)

    def other_prefiller(self, avoid: set[str], decode: str) -> str | None:
        """Who could take over a prefill job now."""
        return other_prefiller(
            self._fleet.pools(), decode, avoid=avoid | {decode}, random=self._random, now=time.monotonic()
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
            missing_s = admission.wait_s(speeds, len(self), self.tokens)
        cost_s = max(
            tokens / speeds.prefill_tokens_per_s if speeds.prefill_tokens_per_s else 0.0,
            1 / speeds.requests_per_s if speeds.requests_per_s else 0.0,
        )
        return self._appointments.next_s(now, missing_s=missing_s, cost_s=cost_s)

    # ---- the line ------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Place whoever fits, in order; called when there may be room."""
        if not self._order:
            return
        aside: list[Waiting] = []
        while isinstance(waiting := self._order.first(), Waiting) and self._settled(waiting, aside):
            self._order.remove(waiting)
        for waiting in aside:
            self._order.add(waiting)

    def refuse(self, refusal: Callable[[], Refused]) -> None:
        """Nobody in line will ever be placed: each gets its own error now."""
        for waiting in self._order.everybody():
            self._order.remove(waiting)
            if isinstance(waiting, Waiting) and waiting.turn is not None and not waiting.turn.done():
                waiting.turn.set_exception(refusal())

    async def _wait(self, waiting: Waiting, last_busy: str) -> None:
        ahead = self._order.ahead(waiting.tier, waiting.tenant, waiting.tokens)
        waiting.turn = asyncio.get_running_loop().create_future()
        self._order.add(waiting)
        try:
            if self._order.first() is waiting:
                self.pump()
            if waiting.turn.done():
                waiting.turn.result()
                return
            async with asyncio.timeout_at(self._until(waiting, ahead)):
                await waiting.turn
        except BaseException as error:
            self._abandon(waiting)
            if isinstance(error, TimeoutError):
                self._waited(waiting, time.monotonic())
                raise self.refusal(last_busy) from None
            raise
        finally:
            waiting.turn = None

    def _settled(self, waiting: Waiting, aside: list[Waiting]) -> bool:
        """Whether the next may be looked at."""
        turn = waiting.turn
        if turn is None or turn.done():  # cancelled, and its coroutine has not run yet
            return True
        try:
            placed = self._place(waiting)
        except Refused as refused:
            turn.set_exception(refused)
            return True
        if placed:
            self._order.serve(waiting.tier, waiting.tenant, waiting.tokens)
            turn.set_result(None)
            return True
        if waiting.avoid:
            aside.append(waiting)
            return True
        return False

    def _abandon(self, waiting: Waiting) -> None:
        self._order.remove(waiting)
        # The place may have been given in the very step in which the wait ended.
        turn = waiting.turn
        if turn is not None and turn.done() and not turn.cancelled() and turn.exception() is None:
            self.release(waiting)
        self.pump()

    def _until(self, waiting: Waiting, ahead: Ahead) -> float:
        """How long it may wait, as loop time. Raises DeadlineInfeasible when it need not wait at all."""
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

    def _waited(self, waiting: Waiting, now: float) -> None:
        """Also who waited in vain: if only those did that came in time, the forecast would stay too bright."""
        if waiting.wait_s is not None:
            self._waits.see(waiting.wait_s, now - waiting.entered)

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
        self.pump()

    # ---- placing, and the target it must keep ----------------------------------------------------------------

    def _place(self, waiting: Waiting) -> bool:
        """Choose its workers and charge them; False: nobody has room now. Raises DeadlineInfeasible."""
        now, fleet = time.monotonic(), self._fleet
        avoid = [worker for worker, beats in waiting.avoid.items() if fleet.beats(worker) == beats]
        rules = self._rules_for(waiting, now)
        placement = place(fleet.pools(), waiting.wish, rules, avoid=avoid, random=self._random, now=now)
        if placement is None:
            self._wake_later(now, rules)
            return False
        self._waited(waiting, now)
        if not self._has_line(waiting):
            self._recent.served(waiting.tenant, now)
        if placement.predicted_ttft_s is not None:
            # Its turn has come: is there still time?
            speeds = fleet.speeds(now, self._targets[waiting.tier].itl_s)
            self._check(waiting, speeds, self._services(placement.predicted_ttft_s), now)
        waiting.fresh, waiting.left_s, waiting.placed_at = False, placement.predicted_ttft_s, now
        waiting.placement = placement
        prefill, decode = placement.prefill, placement.decode
        waiting.charges = {decode: fleet.charge(decode, jobs=1, tokens=0 if prefill else waiting.tokens, now=now)}
        if prefill is not None:
            waiting.charges[prefill] = fleet.charge(prefill, jobs=1, tokens=waiting.tokens, now=now)
        return True

    def _rules_for(self, waiting: Waiting, now: float) -> Rules:
        if waiting.urgent:
            return self._urgent_rules
        if self._has_line(waiting) and self._recent.has_other(waiting.tenant, now):
            return self._crowded_rules[waiting.tier]
        return self._rules[waiting.tier]

    def _has_line(self, waiting: Waiting) -> bool:
        """Whether its tenant waits with more than this one."""
        return self._order.waits(waiting.tier, waiting.tenant) > 1

    def _check(self, waiting: Waiting, speeds: Speeds, left_s: float, now: float) -> None:
        """`left_s`: predicted from now, corrected. Raises DeadlineInfeasible."""
        expected_s = now - waiting.since + left_s
        if waiting.expected_s is None:
            waiting.expected_s = expected_s  # the first one stands: it is what the client was promised
        if waiting.urgent or not self._refuses:
            return
        target_s = self._target_s(waiting, speeds)
        if admission.feasible(expected_s=expected_s, target=target_s, waits=len(self) > 1, idle=speeds.idle):
            return
        raise DeadlineInfeasible(
            f"the first token would come after {expected_s:.1f} s, and its target is {target_s:.1f} s",
            retry_after_s=self.retry_after_s(waiting.tokens, expected_s - target_s),
        )

    def _target_s(self, waiting: Waiting, speeds: Speeds) -> float:
        alone_s = admission.empty_s(speeds, waiting.tokens)
        return admission.target_s(self._targets[waiting.tier].ttft_s, self._services(alone_s or 0.0))
