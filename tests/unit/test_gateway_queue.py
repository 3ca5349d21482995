"""Prompts get workers at once, or wait for them. In which order is test_gateway_order.py's."""

import asyncio

import pytest

from services.gateway.scheduling.fleet import Fleet
from services.gateway.scheduling.order import ACTIVE_S
from services.gateway.scheduling.placement import Wish
from services.gateway.scheduling.queue import Queue, Waiting
from shared import wire
from shared.errors import DeadlineInfeasible, NoCapacity
from shared.settings import GatewaySettings, Target, Targets


class Line:
    """A queue before one decode worker with so much room."""

    def __init__(self, room: int = 0, **settings) -> None:
        values = {"arrangement": "unsplit", "queue_s": 5.0, "admission": "off", **settings}
        self.fleet = Fleet("m", arrangement="unsplit")
        self.queue = Queue(GatewaySettings(id="g", model="m", **values), self.fleet)
        self.placed: list[int] = []
        self.has(room)

    def has(self, room: int, **beat) -> None:
        """As the worker says: that many more."""
        busy = wire.Backlog(running=8 - room)
        self.fleet.hear(
            wire.Heartbeat(
                role="decode", id="d", incarnation="1", takes=["decode"], max_running=8, backlog=busy, **beat
            ),
            asyncio.get_event_loop().time(),
        )

    def take(self, number: int, *, avoids: bool = False, tenant: str = "t") -> "asyncio.Task[None]":
        now = asyncio.get_running_loop().time()
        avoid = {"d": self.fleet.beats("d")} if avoids else {}
        waiting = Waiting(
            tier="default",
            tenant=tenant,
            tokens=number,
            deadline=0.0,
            wish=Wish(tokens=number),
            avoid=avoid,
            since=now,
            entered=now,
        )
        return asyncio.create_task(self._take(waiting))

    async def _take(self, waiting: Waiting) -> Waiting:
        await self.queue.take(waiting, "")
        self.placed.append(waiting.tokens)
        return waiting

    async def until_waiting(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.queue) != count:  # noqa: ASYNC110 - one step of the loop at a time
                await asyncio.sleep(0)


async def test_workers_at_once_and_charged_for_it():
    line = Line(1)
    waiting = await line.take(1)
    assert waiting.placement.decode == "d"
    assert len(line.queue) == line.queue.tokens == 0
    assert not line.fleet.pools().with_room("decode")
    line.queue.release(waiting)
    assert line.fleet.pools().with_room("decode")


async def test_as_many_as_there_is_room_for():
    line = Line()
    tasks = [line.take(number) for number in range(1, 6)]
    await line.until_waiting(5)
    assert line.queue.tokens == 15
    line.has(2)
    line.queue.pump()
    waitings = await asyncio.gather(*tasks[:2])
    for waiting in waitings:
        line.queue.release(waiting)
    line.has(3)
    line.queue.pump()
    await asyncio.gather(*tasks)
    assert line.placed == [1, 2, 3, 4, 5]


async def test_one_that_comes_does_not_pass_those_who_wait():
    line = Line()
    first = line.take(1)
    await line.until_waiting(1)
    line.has(1)
    second = line.take(2)
    await line.until_waiting(2)
    line.queue.pump()
    await first
    second.cancel()
    await asyncio.wait({second})
    assert line.placed == [1]


async def test_one_that_avoids_the_worker_holds_up_nobody():
    line = Line()
    line.has(1)
    picky = line.take(1, avoids=True)
    await line.until_waiting(1)
    easy = line.take(2)
    await line.until_waiting(2)
    line.queue.pump()
    await easy
    assert len(line.queue) == 1
    picky.cancel()
    await asyncio.wait({picky})
    assert len(line.queue) == 0


async def test_one_without_hope_does_not_wait():
    line = Line(admission="on", targets=Targets(default=Target(ttft_s=0.1)))
    slow = {"prefill_tokens_per_s": 1.0}
    line.has(0, **slow)
    line.fleet.report(
        "d", wire.Backlog(running=8, queued_tokens=1000, queued_prompts=1), asyncio.get_running_loop().time()
    )
    with pytest.raises(DeadlineInfeasible, match="first token would come"):
        await line.take(1)
    assert len(line.queue) == line.queue.tokens == 0


async def test_cancelled_leaves_at_once():
    line = Line()
    task = line.take(1)
    await line.until_waiting(1)
    task.cancel()
    await asyncio.wait({task})
    assert len(line.queue) == 0


async def test_the_wait_has_an_end():
    line = Line(queue_s=0.01)
    with pytest.raises(DeadlineInfeasible, match="no worker had room"):
        await line.take(1)
    assert len(line.queue) == 0


async def test_a_place_given_in_the_step_of_the_cancel_goes_to_the_next():
    line = Line()
    first, second = line.take(1), line.take(2)
    await line.until_waiting(2)
    line.has(1)
    line.queue.pump()
    first.cancel()
    await second
    assert line.placed == [2]


async def test_everybody_can_be_refused():
    line = Line()
    tasks = [line.take(number) for number in range(3)]
    await line.until_waiting(3)
    line.queue.refuse(lambda: NoCapacity("nobody is left"))
    for task in tasks:
        with pytest.raises(NoCapacity):
            await task
    assert len(line.queue) == line.queue.tokens == 0


async def test_who_has_a_line_gets_nothing_ahead_beside_another():
    line = Line()
    tasks = [line.take(9, tenant=tenant) for tenant in ("flood", "flood", "single")]
    await line.until_waiting(3)
    lines = line.queue._order.everybody()
    assert not any(line.queue._rules_for(one, 1.0).crowded for one in lines)
    for tenant in ("flood", "single"):
        line.queue._recent.served(tenant, 1.0)
    crowded = {one.tenant: line.queue._rules_for(one, 1.0).crowded for one in lines}
    assert crowded == {"flood": True, "single": False}
    assert not any(line.queue._rules_for(one, 1.0 + ACTIVE_S).crowded for one in lines)
    for task in tasks:
        task.cancel()
