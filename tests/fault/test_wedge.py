"""An engine that stands still (EngineCore under SIGSTOP): its worker says so, ends clearly and comes back."""

import asyncio
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.disturbed import engine_core, metrics_page, until, whole_again
from tests.support.exact import (
    arguments,
    assert_idle,
    complete,
    exact_cluster,
    greedy,
    prompt_of,
    stream,
    token_ids,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

WEDGE_S = 6
PROMPT = prompt_of(700, 1)
OUTPUT = 24


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with exact_cluster(
        tmp_path_factory,
        "--kv-gib=0.25",
        "--arena-gib=0.25",
        engine={"enable_prefix_caching": False},
        BATON_WEDGE_S=str(WEDGE_S),
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[int]:
    response, receipt = complete(cluster, PROMPT, greedy(OUTPUT))
    assert receipt["path"] == "split"
    return token_ids(response.choices[0])


def why_not_ready(cluster: Cluster, worker: str) -> str:
    """Of a worker's own /ready; empty while it answers 200 or nobody answers."""
    try:
        answer = httpx.get(metrics_page(cluster, worker).removesuffix("/metrics") + "/ready", timeout=5)
    except httpx.HTTPError:
        return ""
    return "" if answer.status_code == 200 else str(answer.json()["reason"])


def is_alive(cluster: Cluster, worker: str) -> bool:
    url = metrics_page(cluster, worker).removesuffix("/metrics") + "/health"
    return httpx.get(url, timeout=5).status_code == 200


async def test_a_stream_on_a_wedged_engine_fails_clearly_and_the_worker_comes_back(
    cluster: Cluster, expected: list[int]
) -> None:
    chunks = aiter(
        await cluster.async_client().completions.create(
            stream=True, **arguments("a stream that stands still", greedy(1900))
        )
    )
    for _ in range(5):
        await anext(chunks)
    engine = engine_core(cluster, "decode-0")
    host = psutil.Process(cluster.pid("decode-0"))
    cluster.said()
    engine.suspend()
    await asyncio.to_thread(until, lambda: "wedged" in why_not_ready(cluster, "decode-0"), "/ready says nothing")
    assert await asyncio.to_thread(is_alive, cluster, "decode-0")
    with pytest.raises(openai.InternalServerError) as refused:
        await asyncio.to_thread(complete, cluster, PROMPT, greedy(OUTPUT))
    assert (refused.value.status_code, refused.value.code) == (503, "no_capacity")
    with pytest.raises(openai.APIError) as caught:
        async for _ in chunks:
            pass
    assert caught.value.code == "engine_failed"
    _, alive = await asyncio.to_thread(psutil.wait_procs, [host, engine], 40)
    assert not alive
    said = ""

    def died() -> bool:
        nonlocal said
        said += cluster.said()
        return "decode-0 died" in said

    await asyncio.to_thread(until, died, "the launcher did not notice")
    assert "exit code 1" in said
    await asyncio.to_thread(until, lambda: whole_again(cluster), "decode-0 was not started again")
    assert "the engine is wedged" in cluster.log("decode-0")
    assert await stream(cluster.async_client(), PROMPT, greedy(OUTPUT)) == expected
    assert_idle(cluster)


async def test_a_prompt_on_a_wedged_engine_is_computed_elsewhere(cluster: Cluster, expected: list[int]) -> None:
    engine = engine_core(cluster, "prefill-0")
    engine.suspend()
    response, _ = await asyncio.to_thread(complete, cluster, PROMPT, greedy(OUTPUT))
    assert token_ids(response.choices[0]) == expected
    await asyncio.to_thread(psutil.wait_procs, [engine], 40)
    await asyncio.to_thread(until, lambda: whole_again(cluster), "prefill-0 was not started again")
    response, receipt = await asyncio.to_thread(complete, cluster, prompt_of(700, 2), greedy(OUTPUT))
    assert receipt["path"] == "split"
    assert_idle(cluster)
