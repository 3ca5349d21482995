"""Two `python -m services.kv_transfer` as the launcher starts them: they find each other, and notice each other's end."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.nats import nats_server
from tests.support.two_stores import WAIT_S, arrived, hand_over, keys_of, two_stores, until_known


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "nats"
    folder.mkdir()
    with nats_server(folder) as url:
        yield url


@pytest.mark.parametrize("which", ["source", "target"])
async def test_a_store_that_stands_still_is_an_error_within_its_deadline(
    tmp_path: Path, nats_url: str, which: str
) -> None:
    """`peer_s` is one second here; the wait itself would take a minute."""
    async with two_stores(tmp_path, nats_url) as (p, d):
        await hand_over(p, d, "first")
        keys = keys_of("second", 4)
        await d.want("d", keys)
        waiting = asyncio.create_task(d.host.wait("d", WAIT_S))
        slots = await until_known(p, d, "p", keys, "d")
        await p.write("p", slots, keys, 0)
        stopped = p.store if which == "source" else d.store
        if which == "source":
            await arrived(d, keys[0])
            stopped.send_signal(signal.SIGSTOP)
            ready = await waiting
            assert ready.committed == [True, False, False, False]
        else:
            stopped.send_signal(signal.SIGSTOP)
            waiting.cancel()  # the store that would answer stands still, too
            lost = keys_of("third", 4)
            await p.produce("lost", lost, d.node, "none")
            assert not (await p.host.wait("lost", WAIT_S)).complete
            await p.host.release("lost")
        stopped.send_signal(signal.SIGCONT)
        await p.host.release("p")
        await d.host.release("d")
        await hand_over(p, d, "fourth")


async def test_a_store_that_dies_is_noticed_at_once(tmp_path: Path, nats_url: str) -> None:
    async with two_stores(tmp_path, nats_url, peer_s=600) as (p, d):
        keys = keys_of("first", 4)
        await d.want("d", keys)
        waiting = asyncio.create_task(d.host.wait("d", WAIT_S))
        slots = await until_known(p, d, "p", keys, "d")
        await p.write("p", slots, keys, 0)
        await arrived(d, keys[0])
        p.store.kill()
        assert (await waiting).committed == [True, False, False, False]
        await d.host.release("d")


async def test_stores_of_different_secrets_exchange_nothing(tmp_path: Path, nats_url: str) -> None:
    async with two_stores(tmp_path, nats_url, settings=({}, {"peer_secret": "another"})) as (p, d):
        keys = keys_of("first", 2)
        await d.want("d", keys)
        await until_known(p, d, "p", keys, "d")
        assert not (await p.host.wait("p", WAIT_S)).complete
        await p.host.release("p")
        await d.host.release("d")
