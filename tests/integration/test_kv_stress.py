"""Slow writers whose leases run out under them, beside readers who trust the words: nothing torn, nothing leaked."""

import asyncio
import random
import time
from pathlib import Path

import pytest
import uvloop

from shared.errors import BatonError, KvLost
from shared.kv.client import KvClient
from shared.kv.messages import Reserved
from shared.kv.rank_client import RankClient
from tests.support.running_store import SLOT_BYTES, running_store, small_geometry

TURNS = 150
WRITERS = 6
READERS = 6
KEYS = [bytes([number]) * 16 for number in range(60)]


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return uvloop.EventLoopPolicy()


def write(rank: RankClient, lease: str, names: list[bytes], granted: Reserved, pause_s: float) -> None:
    """Each slot in two halves, so that whoever reads between them reads a torn one."""
    half = SLOT_BYTES // 2
    for position, name in enumerate(names):
        if granted.committed[position]:
            continue
        if not rank.begin_copy(lease):
            return
        view = rank.slot_view(granted.slots[position])
        view[:half] = name * (half // 16)
        time.sleep(pause_s)  # the copy itself takes this long
        view[half:] = name * (half // 16)
        rank.end_copy(lease)
        try:
            rank.commit(lease, [position], [0])
        except KvLost:
            return


async def test_no_torn_read_and_no_leak(tmp_path: Path) -> None:
    dice = random.Random(7)
    reads, torn = 0, 0
    rank = RankClient(str(tmp_path / "kv.sock"), session="w", worker="w", rank=0)

    async def writer(number: int, host: KvClient) -> None:
        for turn in range(TURNS):
            lease, names = f"w{number}-{turn}", dice.sample(KEYS, dice.randint(1, 8))
            ttl_s = dice.choice([0.002, 0.01, 10.0])
            try:
                granted = await host.reserve(lease=lease, request="r", keys=names, write=True, ttl_s=ttl_s, wait_s=0.05)
            except BatonError:
                continue
            await asyncio.to_thread(write, rank, lease, names, granted, dice.random() * 0.002)
            await host.release(lease)

    async def reader(number: int, host: KvClient) -> None:
        nonlocal reads, torn
        for turn in range(TURNS):
            lease, names = f"r{number}-{turn}", dice.sample(KEYS, 6)
            try:
                granted = await host.reserve(
                    lease=lease, request="r", keys=names, write=False, ttl_s=dice.choice([0.002, 10.0]), wait_s=0.05
                )
            except BatonError:
                continue
            await asyncio.sleep(dice.random() * 0.004)  # the engine is busy with something else
            for slot, word, name in zip(granted.slots, granted.words, names, strict=True):
                if slot >= 0 and rank.word(slot) == word:
                    data = bytes(rank.slot_view(slot))
                    if rank.word(slot) == word:
                        reads += 1
                        torn += data != name * (SLOT_BYTES // 16)
            await host.release(lease)

    async with running_store(tmp_path, blocks=48) as store:
        await asyncio.to_thread(rank.attach, small_geometry(), 5.0)
        async with KvClient(store.path, session="w", worker="w") as host:
            await host.connect(5.0)
            async with asyncio.timeout(60), asyncio.TaskGroup() as group:
                for number in range(WRITERS):
                    group.create_task(writer(number, host))
                for number in range(READERS):
                    group.create_task(reader(number, host))
            assert torn == 0
            assert reads > 0
            assert store.metric("baton_kv_evicted_blocks_total") > 0
            assert store.metric("baton_kv_expired_leases_total") > 0
        await asyncio.to_thread(rank.close)
        await store.until(lambda: not any(store.store.gauges().values()), "nothing is held")
        assert not set(store.states()) - {"free", "cached"}
