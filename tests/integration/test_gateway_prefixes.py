"""Prefix hits: what the index says reaches placement, and an index that is away costs nothing but hits."""

import msgspec

from services.gateway.scheduling.prefixes import FIRST_KEYS
from shared import wire
from shared.kv.blocks import block_keys
from shared.prefix_index import block_name, nodes_name, open_redis
from tests.support.gateway_cluster import receipt
from tests.support.redis import RedisServer
from tests.support.running_gateway import MODEL

BLOCK = 4
SHAPE = {"block_size": BLOCK, "fingerprint": "f", "prefill_tokens_per_s": 1000.0}
PROMPT = [7 + number % 50 for number in range(4 * 3 * FIRST_KEYS)]  # more keys than are asked for at first


async def holds(server: RedisServer, node: str, number: int, blocks: int) -> None:
    """The node's store has announced the prompt's first blocks."""
    redis = open_redis(server.url)
    keys = block_keys(wire.pack_tokens(PROMPT), BLOCK, fingerprint="f")
    for key in keys[:blocks]:
        await redis.setbit(block_name("test", key), number, 1)
    await redis.hset(nodes_name("test"), node, str(number))
    await redis.aclose()


async def speak(running, *workers, **beat) -> None:
    for worker in workers:
        worker.beat = msgspec.structs.replace(worker.beat, **beat)
        heard = running.deps.fleet.beats(worker.id)
        await running.until(lambda g, worker=worker, heard=heard: g.fleet.beats(worker.id) > heard + 1)


async def hits(running) -> dict[str, int]:
    return await running.deps.prefixes.hits(wire.pack_tokens(PROMPT))


async def test_the_longest_prefix_of_each_node(cluster, redis_server):
    cluster.settings = {"redis_url": redis_server.url, "index_s": 5.0}
    async with cluster.gateway() as running:
        workers = await cluster.add(running, "prefill-0", "decode-0")
        assert await hits(running) == {}  # nobody has said what KV is like here
        await speak(running, *workers, **SHAPE)
        assert await hits(running) == {}
        await holds(redis_server, "node-0", 0, 2 * FIRST_KEYS + 5)
        await holds(redis_server, "node-1", 9, 3)
        assert await hits(running) == {"node-0": (2 * FIRST_KEYS + 5) * BLOCK, "node-1": 3 * BLOCK}
        await holds(redis_server, "node-1", 9, 3 * FIRST_KEYS)
        assert (await hits(running))["node-1"] == len(PROMPT)


async def test_a_hit_shortens_what_is_predicted(cluster, redis_server):
    cluster.settings = {"redis_url": redis_server.url, "index_s": 5.0}
    async with cluster.gateway() as running:
        workers = await cluster.add(running, "prefill-0", "decode-0")
        await speak(running, *workers, **SHAPE)
        ask = running.client.completions.with_raw_response.create
        cold = receipt(await ask(model=MODEL, prompt=PROMPT, max_tokens=1))["predicted_ttft_ms"]
        await holds(redis_server, "node-0", 0, 3 * FIRST_KEYS)
        warm = receipt(await ask(model=MODEL, prompt=PROMPT, max_tokens=1))["predicted_ttft_ms"]
        assert cold >= len(PROMPT)  # a millisecond a token
        assert warm < cold / 10


async def test_an_index_that_is_away_costs_only_the_hits(cluster, redis_server):
    cluster.settings = {"redis_url": redis_server.url, "index_s": 5.0}
    async with cluster.gateway() as running:
        workers = await cluster.add(running, "prefill-0", "decode-0")
        await speak(running, *workers, **SHAPE)
        redis_server.stop()
        answer = await running.client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1)
        assert answer.usage.completion_tokens == 1
        assert running.sample("baton_prefix_index_failures_total") == 1
        await hits(running)  # left alone for a while
        assert running.sample("baton_prefix_index_failures_total") == 1
