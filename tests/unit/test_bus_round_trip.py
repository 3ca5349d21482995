"""A cancellation that comes with the bus's answer."""

import asyncio

import pytest

from shared.bus import Bus


class Client:
    """Waits as nats-py does."""

    def __init__(self) -> None:
        self.pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waits = asyncio.Event()

    async def flush(self, timeout: float) -> None:  # noqa: ASYNC109 - nats-py's
        self.waits.set()
        await asyncio.wait_for(self.pong, timeout)


async def test_it_is_not_lost() -> None:
    client = Client()
    trip = asyncio.create_task(Bus(client, inbox="_INBOX", max_handlers=1).round_trip())
    await client.waits.wait()
    client.pong.set_result(None)
    trip.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trip


async def test_what_the_client_raises_is_raised() -> None:
    client = Client()
    client.pong.set_exception(OSError("away"))
    with pytest.raises(OSError, match="away"):
        await Bus(client, inbox="_INBOX", max_handlers=1).round_trip()
