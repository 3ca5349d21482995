"""Requests wait here for workers, first come first served, and are bound to workers as late as possible.

Invariants: bounded by admission; a cancelled request leaves at once; nobody overtakes, except that a request which
avoids a worker (it has just refused it) holds up nobody else; a seat is charged to its workers in the same step in
which it is given, so that the next in line sees it; a seat that nobody takes up is given back.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from services.gateway.fleet import Charge
from services.gateway.placement import Placement, Wish
from shared.errors import Refused


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A placement and what it costs its workers."""

    placement: Placement
    charges: dict[str, Charge]  # by worker


@dataclass(slots=True, eq=False)
class Waiting:
    """One request in line. `avoid`: worker -> its beat count when it refused; the next beat lifts it."""

    wish: Wish
    avoid: dict[str, int]
    seat: asyncio.Future[Seat] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Queue:
    def __init__(self, seat: Callable[[Waiting], Seat | None], unseat: Callable[[Seat], None]) -> None:
        """`seat` places one request and charges its workers, None when there is no room; `unseat` takes it back."""
        self._seat = seat
        self._unseat = unseat
        self._line: dict[Waiting, None] = {}  # in order of arrival

    def __len__(self) -> int:
        return len(self._line)

    async def take(self, wish: Wish, avoid: dict[str, int], *, wait_s: float, refusal: Callable[[], Refused]) -> Seat:
        """Wait for a place. Raises `refusal()` when the time is up, or what `refuse` was given."""
        waiting = Waiting(wish, avoid)
        self._line[waiting] = None
        try:
            self.pump()
            async with asyncio.timeout(max(0.0, wait_s)):
                return await waiting.seat
        except BaseException as error:
            self._abandon(waiting)
            if isinstance(error, TimeoutError):
                raise refusal() from None
            raise

    def pump(self) -> None:
        """Seat whoever fits, in order; called when the fleet changes or a job ends."""
        for waiting in list(self._line):
            if waiting.seat.done():  # cancelled, and its coroutine has not run yet
                continue
            seat = self._seat(waiting)
            if seat is not None:
                waiting.seat.set_result(seat)
                del self._line[waiting]
            elif not waiting.avoid:
                return

    def refuse(self, refusal: Callable[[], Refused]) -> None:
        """Nobody in line will ever be seated: each gets its own error now."""
        line, self._line = list(self._line), {}
        for waiting in line:
            if not waiting.seat.done():
                waiting.seat.set_exception(refusal())

    def _abandon(self, waiting: Waiting) -> None:
        self._line.pop(waiting, None)
        # The seat may have been given in the very step in which the wait ended.
        if waiting.seat.done() and not waiting.seat.cancelled() and waiting.seat.exception() is None:
            self._unseat(waiting.seat.result())
        self.pump()
