"""The line of waiting requests. In which order is test_gateway_order.py's."""

import asyncio

import pytest

from services.gateway.placement import Placement, Wish
from services.gateway.queue import Queue, Seat, Waiting
from shared.errors import DeadlineInfeasible, NoCapacity


class Room:
    """So many seats; remembers who got one."""

    def __init__(self, seats: int = 0) -> None:
        self.seats = seats
        self.served: list[int] = []
        self.wait_s = 5.0
        self.late: set[int] = set()  # who is refused when its turn comes
        self.hopeless: set[int] = set()  # who need not even wait
        self.queue = Queue({"default": 1.0}, seat=self.seat, unseat=self.unseat, until=self.until)

    def seat(self, waiting) -> Seat | None:
        if self.seats == 0 or "d" in waiting.avoid:
            return None
        if waiting.tokens in self.late:
            raise DeadlineInfeasible("late")
        self.seats -= 1
        self.served.append(waiting.tokens)
        return Seat(Placement(decode="d", prefill=None, reason="test"), {})

    def unseat(self, _: Seat) -> None:
        self.seats += 1

    def until(self, waiting, ahead) -> float:
        if waiting.tokens in self.hopeless:
            raise DeadlineInfeasible("hopeless")
        return asyncio.get_running_loop().time() + self.wait_s

    def take(self, number: int, *, avoid=None) -> "asyncio.Task[Seat]":
        waiting = Waiting(
            tier="default",
            tenant="t",
            tokens=number,
            deadline=0.0,
            wish=Wish(tokens=number),
            avoid=avoid or {},
            since=0.0,
            entered=0.0,
        )
        return asyncio.create_task(self.queue.take(waiting, refusal=lambda: DeadlineInfeasible("no room")))


async def until_waiting(room: Room, count: int) -> None:
    async with asyncio.timeout(5):
        while len(room.queue) != count:  # noqa: ASYNC110 - one step of the loop at a time
            await asyncio.sleep(0)


async def test_a_seat_at_once():
    room = Room(1)
    assert (await room.take(1)).placement.decode == "d"
    assert len(room.queue) == room.queue.tokens == 0


async def test_as_many_as_there_are_seats():
    room = Room()
    tasks = [room.take(number) for number in range(1, 6)]
    await until_waiting(room, 5)
    assert room.queue.tokens == 15
    room.seats = 2
    room.queue.pump()
    await asyncio.gather(*tasks[:2])
    room.seats = 3
    room.queue.pump()
    await asyncio.gather(*tasks)
    assert room.served == [1, 2, 3, 4, 5]


async def test_one_that_comes_does_not_pass_those_who_wait():
    room = Room()
    first = room.take(1)
    await until_waiting(room, 1)
    room.seats = 1
    second = room.take(2)
    await until_waiting(room, 2)
    room.queue.pump()
    await first
    second.cancel()
    await asyncio.wait({second})
    assert room.served == [1]


async def test_one_that_avoids_the_worker_holds_up_nobody():
    room = Room()
    picky = room.take(1, avoid={"d": 1})
    easy = room.take(2)
    await until_waiting(room, 2)
    room.seats = 1
    room.queue.pump()
    await easy
    assert len(room.queue) == 1
    picky.cancel()
    await asyncio.wait({picky})
    assert len(room.queue) == 0


async def test_one_whose_turn_comes_too_late_holds_up_nobody():
    room = Room()
    late, fine = room.take(1), room.take(2)
    await until_waiting(room, 2)
    room.late, room.seats = {1}, 1
    room.queue.pump()
    await fine
    with pytest.raises(DeadlineInfeasible, match="late"):
        await late
    assert room.seats == len(room.queue) == 0


async def test_one_without_hope_does_not_wait():
    room = Room()
    room.hopeless = {1}
    with pytest.raises(DeadlineInfeasible, match="hopeless"):
        await room.take(1)
    assert len(room.queue) == room.queue.tokens == 0


async def test_cancelled_leaves_at_once():
    room = Room()
    task = room.take(1)
    await until_waiting(room, 1)
    task.cancel()
    await asyncio.wait({task})
    assert len(room.queue) == 0


async def test_the_wait_has_an_end():
    room = Room()
    room.wait_s = 0.01
    with pytest.raises(DeadlineInfeasible, match="no room"):
        await room.take(1)
    assert len(room.queue) == 0


async def test_a_seat_given_to_one_that_has_just_left_is_given_back():
    room = Room()
    task, other = room.take(1), room.take(2)
    await until_waiting(room, 2)
    task.cancel()
    room.seats = 1
    room.queue.pump()
    await other
    await asyncio.wait({task})
    assert room.seats == 0


async def test_everybody_can_be_refused():
    room = Room()
    tasks = [room.take(number) for number in range(3)]
    await until_waiting(room, 3)
    room.queue.refuse(lambda: NoCapacity("nobody is left"))
    for task in tasks:
        with pytest.raises(NoCapacity):
            await task
    assert len(room.queue) == room.queue.tokens == 0


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
