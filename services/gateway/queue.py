"""Requests wait here for workers, in the order that order.py says, and are bound to workers as late as possible.

Invariants: bounded by admission; a cancelled request leaves at once; nobody is passed over, except that a request which
avoids a worker (it has just refused it) holds up nobody else; nobody waits beyond the moment from which it could not be
served in time; a seat is charged to its workers in the same step in which it is given, so that the next in line sees
it; a seat that nobody takes up is given back.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from services.gateway.fleet import Charge
from services.gateway.order import Ahead, Entry, Order
from services.gateway.placement import Placement, Wish
from shared.errors import Refused


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A placement and what it costs its workers."""

    placement: Placement
    charges: dict[str, Charge]  # by worker


@dataclass(slots=True, eq=False, kw_only=True)
class Waiting(Entry):
    """One prompt in line. `avoid`: worker -> its beat count when it refused; the next beat lifts it."""

    wish: Wish
    avoid: dict[str, int] = field(default_factory=dict)
    since: float  # when its request came; its target counts from there
    entered: float  # when it came here
    fresh: bool = True  # it has had no seat yet
    # Predictions as they come from the workers' figures, before what was measured has corrected them:
    wait_s: float | None = None  # from `entered` to its seat; None: it got one at once, or nothing is known
    left_s: float | None = None  # from its seat to the first token
    seated: float = 0.0  # when it got one
    expected_s: float | None = None  # what its time to first token, from `since`, was first expected to be
    seat: asyncio.Future[Seat] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Queue:
    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        seat: Callable[[Waiting], Seat | None],
        unseat: Callable[[Seat], None],
        until: Callable[[Waiting, Ahead], float],
    ) -> None:
        """`seat` places one and charges its workers, None when there is no room; `unseat` takes it back.

        `until` says how long one that finds no seat at once may wait, as loop time. `seat` and `until` may raise
        Refused.
        """
        self._seat = seat
        self._unseat = unseat
        self._until = until
        self._order = Order(weights)

    def __len__(self) -> int:
        return len(self._order)

    @property
    def tokens(self) -> int:
        return self._order.tokens

    async def take(self, waiting: Waiting, *, refusal: Callable[[], Refused]) -> Seat:
        """Wait for a place. Raises `refusal()` when the time is up, or what it was refused with."""
        ahead = self._order.ahead(waiting.tier, waiting.tenant, waiting.tokens)
        self._order.add(waiting)
        try:
            if self._order.first() is waiting:
                self.pump()
            if waiting.seat.done():
                return waiting.seat.result()
            async with asyncio.timeout_at(self._until(waiting, ahead)):
                return await waiting.seat
        except BaseException as error:
            self._abandon(waiting)
            if isinstance(error, TimeoutError):
                raise refusal() from None
            raise

    def pump(self) -> None:
        """Seat whoever fits, in order; called when there may be room."""
        aside: list[Waiting] = []
        while isinstance(waiting := self._order.first(), Waiting) and self._settled(waiting, aside):
            self._order.remove(waiting)
        for waiting in aside:
            self._order.add(waiting)

    def _settled(self, waiting: Waiting, aside: list[Waiting]) -> bool:
        """Whether the next may be looked at."""
        if waiting.seat.done():  # cancelled, and its coroutine has not run yet
            return True
        try:
            seat = self._seat(waiting)
        except Refused as refused:
            waiting.seat.set_exception(refused)
            return True
        if seat is not None:
            self._order.serve(waiting.tier, waiting.tenant, waiting.tokens)
            waiting.seat.set_result(seat)
            return True
        if waiting.avoid:
            aside.append(waiting)
            return True
        return False

    def waits(self, tier: str, tenant: str) -> int:
        """How many of a tenant do."""
        return self._order.waits(tier, tenant)

    def serve(self, tier: str, tenant: str, tokens: int) -> None:
        """Output counts as well, when it is known."""
        self._order.serve(tier, tenant, tokens)

    def refuse(self, refusal: Callable[[], Refused]) -> None:
        """Nobody in line will ever be seated: each gets its own error now."""
        for waiting in self._order.everybody():
            self._order.remove(waiting)
            if isinstance(waiting, Waiting) and not waiting.seat.done():
                waiting.seat.set_exception(refusal())

    def _abandon(self, waiting: Waiting) -> None:
        self._order.remove(waiting)
        # The seat may have been given in the very step in which the wait ended.
        if waiting.seat.done() and not waiting.seat.cancelled() and waiting.seat.exception() is None:
            self._unseat(waiting.seat.result())
        self.pump()
