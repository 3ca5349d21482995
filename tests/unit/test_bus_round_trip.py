"""The way to the bus's server and back, and who is cancelled on it."""

import asyncio

import pytest

from shared.bus import Bus
from shared.errors import BusUnavailable


class Client:
    """Waits as nats-py does, which sets the result of whoever waits, cancelled or not."""

    is_connected = True

    def __init__(self) -> None:
        self.pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waits = asyncio.Event()

    async def flush(self, timeout: float) -> None:  # noqa: ASYNC109 - nats-py's
        self.waits.set()
        await asyncio.wait_for(self.pong, timeout)

    async def close(self) -> None:
        pass


def bus_of(client: Client) -> Bus:
    return Bus(client, inbox="_INBOX", max_handlers=1)


async def test_a_cancellation_that_comes_with_the_answer_is_not_lost() -> None:
    client = Client()
    trip = asyncio.create_task(bus_of(client).round_trip())
    await client.waits.wait()
    client.pong.set_result(None)
    trip.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trip


async def test_an_answer_to_who_was_cancelled_breaks_nothing() -> None:
    """The client's reading would end with the InvalidStateError, without a word."""
    client = Client()
    bus = bus_of(client)
    trip = asyncio.create_task(bus.round_trip())
    await client.waits.wait()
    trip.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trip
    client.pong.set_result(None)
    await bus.close()


async def test_the_end_of_the_bus_is_that_of_trips() -> None:
    client = Client()
    bus = bus_of(client)
    trip = asyncio.create_task(bus.round_trip())
    await client.waits.wait()
    trip.cancel()
    await bus.close()
    assert client.pong.cancelled()


@pytest.mark.parametrize("away", [True, False])
async def test_a_bus_that_is_away_is_said_to_be(away: bool) -> None:
    client = Client()
    client.is_connected = not away
    if not away:
        client.pong.set_exception(OSError("away"))
    with pytest.raises(BusUnavailable):
        await bus_of(client).round_trip()
