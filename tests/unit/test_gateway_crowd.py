"""Who was served of late, beside a tenant."""

import asyncio

from services.gateway.crowd import ACTIVE_S, MOST_TENANTS, Crowd
from services.gateway.fleet import Fleet
from services.gateway.placement import Wish
from services.gateway.queue import Waiting
from services.gateway.seating import Seating
from shared.settings import GatewaySettings


def test_only_others_count_and_only_for_a_while():
    crowd = Crowd()
    crowd.served("flood", 0.0)
    assert not crowd.has_other("flood", 0.0)
    assert crowd.has_other("single", 0.0)
    crowd.served("single", 1.0)
    assert crowd.has_other("flood", 1.0 + ACTIVE_S * 0.99)
    assert not crowd.has_other("flood", 1.0 + ACTIVE_S)


def test_who_comes_again_is_young_again():
    crowd = Crowd()
    crowd.served("a", 0.0)
    crowd.served("b", ACTIVE_S * 0.9)
    crowd.served("a", ACTIVE_S * 0.95)
    crowd.served("c", ACTIVE_S * 1.5)
    assert crowd.has_other("c", ACTIVE_S * 1.5)


def test_it_forgets():
    crowd = Crowd()
    for number in range(MOST_TENANTS + 5):
        crowd.served(str(number), 0.0)
    assert len(crowd._served_at) == MOST_TENANTS
    crowd.served("new", ACTIVE_S)
    assert list(crowd._served_at) == ["new"]


async def test_who_has_a_line_gets_nothing_ahead_beside_another():
    seating = Seating(GatewaySettings(id="g", model="m"), Fleet("m"))

    def asks(tenant: str) -> Waiting:
        wish = Wish(tokens=9)
        return Waiting(tier="default", tenant=tenant, tokens=9, wish=wish, since=0.0, entered=0.0)

    async with asyncio.TaskGroup() as group:
        lines = [asks(tenant) for tenant in ("flood", "flood", "single")]
        tasks = [group.create_task(seating.take(one, "")) for one in lines]  # nobody is there to serve them
        await asyncio.sleep(0)
        assert not any(seating._rules_for(one, 1.0).crowded for one in lines)
        assert [seating._has_line(one) for one in lines] == [True, True, False]
        for tenant in ("flood", "single"):
            seating._crowd.served(tenant, 1.0)
        assert [seating._rules_for(one, 1.0).crowded for one in lines] == [True, True, False]
        assert not seating._rules_for(lines[0], 1.0 + ACTIVE_S).crowded
        for task in tasks:
            task.cancel()
