"""SIGKILL of workers under load: the right text or one clear error, no orphan process, no slot lost.

Two prefill workers and one decode worker with real vLLM; each test leaves the cluster whole again, because the
launcher starts a killed worker anew.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.support.cluster import Cluster, running_cluster
from tests.support.exact import (
    ENGINE,
    MAX_LEN,
    MODEL,
    assert_idle,
    complete,
    engine_options,
    greedy,
    prompt_of,
    tokens_of,
)
from tests.support.reference import run_reference
from tests.support.sensitive_model import make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = 6
LENGTH = 1900
OUTPUT = 8
SMALL_STEPS = {"max_num_batched_tokens": 32}  # a prompt takes sixty steps: there is a middle to be killed in
RESTART_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(tmp_path_factory.mktemp("model") / "sensitive", max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Seed -> greedy output of the prompt with that seed."""
    seeds = range(3 * PROMPTS)
    batches: list[list[dict[str, Any]]] = [
        [{"tokens": tokens_of(prompt_of(LENGTH, seed)), "params": greedy(OUTPUT)}] for seed in seeds
    ]
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 1 << 28}
    results = run_reference(tmp_path_factory.mktemp("reference"), engine, batches)
    return {seed: answers[0][0]["token_ids"] for seed, answers in zip(seeds, results, strict=True)}


@pytest.fixture(scope="module")
def cluster(
    model: Path, reference: dict[int, list[int]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        f"--model={model}",
        f"--served-model-name={MODEL}",
        "--arrangement=split",
        "--prefill=2",
        "--kv-gib=0.25",
        "--arena-gib=0.25",
        *engine_options(**SMALL_STEPS),
    ) as cluster:
        yield cluster


def until(reached: Callable[[], bool], what: str, timeout_s: float = RESTART_S) -> None:
    """Look at the cluster until it is so."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def whole_again(cluster: Cluster) -> bool:
    services = cluster.status()["services"]
    return all(service["state"] == "ready" for service in services)


def family(cluster: Cluster, *service_ids: str) -> list[psutil.Process]:
    """These services' processes and all that they have started, hosts first."""
    hosts = [psutil.Process(cluster.pid(service_id)) for service_id in service_ids]
    return [*hosts, *(child for host in hosts for child in host.children(recursive=True))]


def kill(doomed: list[psutil.Process], hosts: int) -> None:
    """SIGKILL the hosts; everything that they had started goes too."""
    for process in doomed[:hosts]:
        process.kill()
    _, alive = psutil.wait_procs(doomed, timeout=10)
    orphans = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not orphans, f"left behind: {orphans}"


async def under_way(cluster: Cluster, seeds: range) -> list["asyncio.Task[Any]"]:
    """Requests whose prefill has begun and is far from its end."""
    written = cluster.meter("kv", "baton_kv_written_bytes_total")
    before = written()
    tasks = [
        asyncio.create_task(asyncio.to_thread(complete, cluster, prompt_of(LENGTH, seed), greedy(OUTPUT)))
        for seed in seeds
    ]
    await asyncio.to_thread(until, lambda: written() > before, "prefill has not begun")
    return tasks


async def test_prefill_killed_with_another_alive(cluster: Cluster, reference: dict[int, list[int]]) -> None:
    seeds = range(PROMPTS)
    doomed = family(cluster, "prefill-0")
    tasks = await under_way(cluster, seeds)
    await asyncio.to_thread(kill, doomed, 1)
    answers = await asyncio.gather(*tasks)
    for seed, (response, receipt) in zip(seeds, answers, strict=True):
        assert response.choices[0].model_extra["token_ids"] == reference[seed]
        assert receipt["path"] == "split"
    moved = [receipt["prefill"] for _, receipt in answers if receipt["retries"]]
    assert moved, "nothing had to move: the kill came too late"
    assert set(moved) == {"prefill-1"}
    await asyncio.to_thread(until, lambda: whole_again(cluster), "prefill-0 was not started again")
    assert_idle(cluster)


async def test_last_prefill_killed(cluster: Cluster, reference: dict[int, list[int]]) -> None:
    seeds = range(PROMPTS, 2 * PROMPTS)
    doomed = family(cluster, "prefill-0", "prefill-1")
    tasks = await under_way(cluster, seeds)
    await asyncio.to_thread(kill, doomed, 2)
    answers = await asyncio.gather(*tasks)
    for seed, (response, _) in zip(seeds, answers, strict=True):
        assert response.choices[0].model_extra["token_ids"] == reference[seed]
    assert "whole" in {receipt["path"] for _, receipt in answers}
    await asyncio.to_thread(until, lambda: whole_again(cluster), "the prefill workers were not started again")
    assert_idle(cluster)


async def test_decode_killed_mid_stream(cluster: Cluster, reference: dict[int, list[int]]) -> None:
    doomed = family(cluster, "decode-0")
    client = cluster.async_client()
    stream = await client.completions.create(
        model=MODEL,
        prompt="a stream that will not see its end",
        max_tokens=1900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = aiter(stream)
    for _ in range(5):
        await anext(chunks)
    await asyncio.to_thread(kill, doomed, 1)
    with pytest.raises(openai.APIError) as caught:
        async for _ in chunks:
            pass
    assert caught.value.code == "worker_lost"
    await asyncio.to_thread(until, lambda: whole_again(cluster), "decode-0 was not started again")
    assert_idle(cluster)
    seed = 2 * PROMPTS
    response, _ = await asyncio.to_thread(complete, cluster, prompt_of(LENGTH, seed), greedy(OUTPUT))
    assert response.choices[0].model_extra["token_ids"] == reference[seed]
