"""The line of waiting requests."""

import asyncio

import pytest

from services.gateway.placement import Placement, Wish
from services.gateway.queue import Queue, Seat
from shared.errors import DeadlineInfeasible


class Room:
    """So many seats; remembers who got one."""

    def __init__(self, seats: int = 0) -> None:
        self.seats = seats
        self.served: list[int] = []
        self.queue = Queue(self.seat, self.unseat)

    def seat(self, waiting) -> Seat | None:
        if self.seats == 0 or "d" in waiting.avoid:
            return None
        self.seats -= 1
        self.served.append(waiting.wish.tokens)
        return Seat(Placement(decode="d", prefill=None, reason="test"), {})

    def unseat(self, _: Seat) -> None:
        self.seats += 1

    def take(self, number: int, *, avoid=None, wait_s=5.0) -> "asyncio.Task[Seat]":
        return asyncio.create_task(
            self.queue.take(
                Wish(tokens=number), avoid or {}, wait_s=wait_s, refusal=lambda: DeadlineInfeasible("no room")
            )
        )


async def until_waiting(room: Room, count: int) -> None:
    async with asyncio.timeout(5):
        while len(room.queue) != count:  # noqa: ASYNC110 - one step of the loop at a time
            await asyncio.sleep(0)


async def test_a_seat_at_once():
    room = Room(1)
    assert (await room.take(1)).placement.decode == "d"
    assert len(room.queue) == 0


async def test_first_come_first_served():
    room = Room()
    tasks = [room.take(number) for number in range(5)]
    await until_waiting(room, 5)
    room.seats = 2
    room.queue.pump()
    await asyncio.gather(*tasks[:2])
    room.seats = 3
    room.queue.pump()
    await asyncio.gather(*tasks)
    assert room.served == [0, 1, 2, 3, 4]


async def test_one_that_avoids_the_worker_holds_up_nobody():
    room = Room()
    picky = room.take(1, avoid={"d": 1})
    easy = room.take(2)
    await until_waiting(room, 2)
    room.seats = 1
    room.queue.pump()
    await easy
    picky.cancel()
    await asyncio.wait({picky})
    assert len(room.queue) == 0


async def test_cancelled_leaves_at_once():
    room = Room()
    task = room.take(1)
    await until_waiting(room, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(room.queue) == 0


async def test_a_seat_given_in_the_step_of_the_cancel_goes_to_the_next():
    room = Room()
    first, second = room.take(1), room.take(2)
    await until_waiting(room, 2)
    room.seats = 1
    room.queue.pump()
    first.cancel()
    assert (await second).placement.decode == "d"
    assert room.served == [1, 2]
    assert room.seats == 0


async def test_the_deadline_is_a_refusal():
    room = Room()
    with pytest.raises(DeadlineInfeasible):
        await room.take(1, wait_s=0.01)
    assert len(room.queue) == 0
