"""The prefix index in a real Redis: written by stores, read by a gateway."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.kv_transfer.index import BATCH, IndexWriter
from shared.prefix_index import (
    KEY_TTL_S,
    NUMBER_TTL_S,
    PrefixReader,
    block_name,
    nodes_name,
    number_name,
    open_redis,
)
from tests.support.redis import RedisServer

DEADLINE_S = 10.0
C = "test"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def redis(server: RedisServer) -> AsyncIterator[Redis]:
    client = open_redis(server.url)
    yield client
    await client.aclose()


def keys(count: int, kind: int = 1) -> list[bytes]:
    return [bytes([kind]) + number.to_bytes(15, "big") for number in range(count)]


class Node:
    """What a store holds, and its writer."""

    def __init__(self, redis: Redis, name: str, incarnation: str = "1", max_backlog: int = 1000) -> None:
        self.held: dict[bytes, None] = {}
        self.dropped = 0
        self.writer = IndexWriter(
            redis,
            cluster=C,
            node=name,
            incarnation=incarnation,
            held_keys=lambda: self.held,
            holds=self.held.__contains__,
            dropped=self._drop,
            max_backlog=max_backlog,
        )

    def _drop(self) -> None:
        self.dropped += 1

    def bind(self, *names: bytes) -> None:
        for key in names:
            self.held[key] = None
            self.writer.note(key, True)

    def evict(self, *names: bytes) -> None:
        for key in names:
            del self.held[key]
            self.writer.note(key, False)

    async def settled(self) -> None:
        await until(lambda: self.writer.is_settled)


async def until(reached: Callable[[], bool]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + DEADLINE_S
    while not reached():
        assert loop.time() < deadline
        await asyncio.sleep(0.001)


@asynccontextmanager
async def running(*nodes: Node) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(node.writer.run()) for node in nodes]
    try:
        for node in nodes:
            await node.settled()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_reader_sees_how_long_a_prefix_each_node_holds(redis: Redis) -> None:
    prompt = keys(5)
    one, two = Node(redis, "a"), Node(redis, "b")
    one.bind(*prompt[:2])  # before it runs: found in the first announcement
    async with running(one, two):
        one.bind(prompt[2], prompt[4])
        two.bind(prompt[0])
        await one.settled()
        await two.settled()
        reader = PrefixReader(redis, C)
        assert await reader.holders(prompt) == {"a": 3, "b": 1}
        assert await reader.holders(keys(3, kind=2)) == {}
        assert await reader.holders([]) == {}
        one.evict(prompt[1])
        await one.settled()
        assert await reader.holders(prompt) == {"a": 1, "b": 1}


async def test_numbers_are_leased_and_keys_expire(redis: Redis) -> None:
    one, two = Node(redis, "a"), Node(redis, "b")
    async with running(one, two):
        one.bind(*keys(1))
        await one.settled()
        assert one.writer.number != two.writer.number
        assert one.writer.number is not None
        assert NUMBER_TTL_S - 10 < await redis.ttl(number_name(C, one.writer.number)) <= NUMBER_TTL_S
        assert KEY_TTL_S - 10 < await redis.ttl(block_name(C, keys(1)[0])) <= KEY_TTL_S


async def test_a_restarted_store_does_not_inherit_what_its_predecessor_held(redis: Redis) -> None:
    before = Node(redis, "a", "1")
    async with running(before):
        before.bind(*keys(3))
        await before.settled()
    after = Node(redis, "a", "2")
    async with running(after):
        assert after.writer.number != before.writer.number
        assert await PrefixReader(redis, C).holders(keys(3)) == {}


async def test_an_announcement_clears_bits_of_numbers_that_nobody_has(redis: Redis) -> None:
    await redis.setbit(block_name(C, keys(1)[0]), 77, 1)
    node = Node(redis, "a")
    node.bind(*keys(1))
    node.writer._backlog.clear()  # only the announcement speaks
    async with running(node):
        assert await redis.getbit(block_name(C, keys(1)[0]), 77) == 0
        assert await redis.getbit(block_name(C, keys(1)[0]), node.writer.number) == 1


async def test_a_retired_node_is_named_no_more_and_its_number_not_given_again(redis: Redis) -> None:
    node = Node(redis, "a")
    async with running(node):
        node.bind(*keys(1))
        await node.settled()
        await node.writer.retire()
    assert await PrefixReader(redis, C).holders(keys(1)) == {}
    other = Node(redis, "b")
    async with running(other):
        assert other.writer.number != node.writer.number


async def test_a_node_that_did_not_renew_leaves_the_hash_before_its_number_is_free(redis: Redis) -> None:
    node, dead = Node(redis, "a"), Node(redis, "dead")
    async with running(node, dead):
        pass
    await redis.expire(number_name(C, dead.writer._leased), NUMBER_TTL_S // 2 - 1)
    assert await node.writer._renew()
    assert set(await redis.hgetall(nodes_name(C))) == {b"a"}
    await redis.delete(number_name(C, node.writer._leased))
    assert not await node.writer._renew()


async def test_when_redis_comes_back_empty_everything_is_announced_again(server: RedisServer, redis: Redis) -> None:
    prompt = keys(3 * BATCH)
    node = Node(redis, "a", max_backlog=10)
    async with running(node):
        node.bind(*prompt[:5])
        await node.settled()
        server.stop()
        node.bind(prompt[5])
        await until(lambda: node.writer.number is None)
        node.bind(*prompt[6:])  # more than the backlog takes
        node.evict(prompt[2])
        assert node.dropped > 0
        assert node.writer.backlog <= 10
        with pytest.raises((RedisError, OSError)):
            await PrefixReader(redis, C).holders(prompt)
        server.start()
        await node.settled()
        assert await PrefixReader(redis, C).holders(prompt) == {"a": 2}
        assert await PrefixReader(redis, C).holders(prompt[3:]) == {"a": len(prompt) - 3}
