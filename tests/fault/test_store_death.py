"""kv_transfer killed under load and started again: texts stay right, engines attach to the new arena, nothing leaks.

And an arena too small for the load: requests wait their turn, none is wrong, none hangs.
"""

import asyncio
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.exact import (
    assert_idle,
    complete,
    exact_cluster,
    greedy,
    prompt_of,
    stream,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = [(n, seed) for seed in range(4) for n in (900, 300, 1500)]
OUTPUT = 60
BACK_S = 90


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with exact_cluster(
        tmp_path_factory,
        "--kv-gib=0.25",
        # Two prompts of maximum length: the least that a store accepts.
        "--arena-gib=0.017",
        engine={"enable_prefix_caching": False},
    ) as cluster:
        yield cluster


async def texts(cluster: Cluster) -> list[list[int]]:
    client = cluster.async_client()
    return list(await asyncio.gather(*(stream(client, prompt_of(n, seed), greedy(OUTPUT)) for n, seed in PROMPTS)))


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[list[int]]:
    """One at a time, undisturbed; test_exactness.py shows that these equal unsplit vLLM."""
    answers = [complete(cluster, prompt_of(n, seed), greedy(OUTPUT)) for n, seed in PROMPTS]
    assert {receipt["path"] for _, receipt in answers} == {"split"}
    return [answer.choices[0].model_extra["token_ids"] for answer, _ in answers]


async def test_an_arena_too_small_for_the_load(cluster: Cluster, expected: list[list[int]]) -> None:
    """Twelve prompts at once need five times the arena."""
    assert await texts(cluster) == expected
    assert cluster.metrics("kv")["baton_kv_evicted_blocks_total"] > 0
    assert_idle(cluster)


async def test_killed_under_load(cluster: Cluster, expected: list[list[int]]) -> None:
    store = psutil.Process(cluster.pid("kv-0"))
    written = cluster.meter("kv", "baton_kv_written_bytes_total")
    before = written()
    load = asyncio.create_task(texts(cluster))
    deadline = time.monotonic() + BACK_S
    while await asyncio.to_thread(written) == before:
        assert time.monotonic() < deadline, "the load has not begun"
    store.kill()
    assert await load == expected
    while not await asyncio.to_thread(attached, cluster):
        assert time.monotonic() < deadline, "the workers did not attach to the new store"
    answer, receipt = await asyncio.to_thread(complete, cluster, prompt_of(700, 50), greedy(OUTPUT))
    assert receipt["path"] == "split"
    again, _ = await asyncio.to_thread(complete, cluster, prompt_of(700, 50), greedy(OUTPUT))
    assert answer.choices[0].model_extra["token_ids"] == again.choices[0].model_extra["token_ids"]
    recomputed = cluster.metrics("decode")["baton_kv_recomputed_tokens_total"]
    await asyncio.to_thread(complete, cluster, prompt_of(701, 51), greedy(OUTPUT))
    assert cluster.metrics("decode")["baton_kv_recomputed_tokens_total"] == recomputed, "hand-offs do not work again"
    assert_idle(cluster)


def attached(cluster: Cluster) -> bool:
    """Both workers have found the new store."""
    status = cluster.status()
    if any(service["state"] != "ready" for service in status["services"]):
        return False
    return cluster.metrics("kv").get("baton_kv_sessions", 0) == 2
