"""A thousand clients that leave at random moments, over two gateways: nothing is left behind, the next text is right.

Two prefill and two decode workers with real vLLM. Where each request was when its client left is counted by the
gateways (`baton_cancelled_total`): every stage must have been hit.
"""

import asyncio
import contextlib
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.support.cluster import Cluster, free_port, read_metrics
from tests.support.exact import MODEL, arguments, assert_idle, exact_cluster, greedy, prompt_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

CANCELS = int(os.environ.get("TEST_CANCELS", "1000"))
CROWD = 24
LINE = 96  # far more long prompts than the workers take at once
STAGES = {"queued", "reserving", "handoff", "streaming"}
SETTLE_S = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with exact_cluster(
        tmp_path_factory,
        "--prefill=2",
        "--decode=2",
        "--kv-gib=0.06",
        "--arena-gib=0.1",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def gateways(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The cluster's own and a second one beside it, with the same settings."""
    port = free_port()
    environ = psutil.Process(cluster.pid("gateway-0")).environ()
    environ |= {"BATON_ID": "gateway-1", "BATON_PORT": str(port)}
    log = tmp_path_factory.mktemp("gateway-1") / "gateway-1.log"
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "services.gateway"], env=environ, stdout=out, stderr=out)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while not answers(url):
            assert time.monotonic() < deadline, "the second gateway did not start"
            time.sleep(0.05)
        yield [cluster.url, url]
    finally:
        process.terminate()
        assert process.wait(timeout=40) == 0


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/ready").status_code == 200
    return False


def body_of(index: int, rng: random.Random) -> dict[str, Any]:
    request = arguments(prompt_of(rng.randrange(1, 1800), index), greedy(rng.randrange(1, 200)))
    return {**{k: v for k, v in request.items() if k != "extra_body"}, **request["extra_body"], "stream": index % 3 > 0}


async def leave_early(client: httpx.AsyncClient, url: str, body: dict[str, Any], after_s: float) -> str:
    """What the client saw: `left` when it did not wait for the end, else the answer's status."""
    try:
        async with asyncio.timeout(after_s):
            answer = await client.post(f"{url}/v1/completions", json=body)
    except TimeoutError:
        return "left"
    return str(answer.status_code) if answer.status_code in (200, 429, 503) else answer.text


async def leave_mid_stream(client: httpx.AsyncClient, url: str, body: dict[str, Any], events: int) -> str:
    """Leave after so many events of the stream, which may be more than it has."""
    async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            return str(answer.status_code)
        async for line in answer.aiter_lines():
            events -= line.startswith("data: ")
            if not events:
                return "left"
    return "200"


async def crowd(gateways: list[str]) -> Counter[str]:
    """Returns what the clients saw."""
    rng = random.Random(3)
    todo = iter(range(CANCELS))
    seen: Counter[str] = Counter()
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:

        async def one_after_another() -> None:
            for index in todo:
                # Many leave within the first tenths of a second, where the stages are short.
                body, url = body_of(index, rng), gateways[index % 2]
                if index % 3 == 1:
                    seen[await leave_mid_stream(client, url, body, rng.randrange(1, 60))] += 1
                else:
                    after_s = rng.choice((0.05, 0.3, 1.0, 3.0)) * rng.random()
                    seen[await leave_early(client, url, body, after_s)] += 1

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CROWD):
                tasks.create_task(one_after_another())
    return seen


async def leave_the_queue(url: str) -> None:
    """More long prompts at once than prefill takes; all leave as soon as some are seen waiting in line."""
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        bodies = [{**body_of(0, random.Random(0)), "prompt": prompt_of(1900, 20_000 + n)} for n in range(LINE)]
        posts = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for body in bodies]
        try:
            deadline = time.monotonic() + SETTLE_S
            while not (await asyncio.to_thread(read_metrics, url))["baton_queue_depth"]:
                assert time.monotonic() < deadline, f"{LINE} prompts at once and none of them had to wait"
        finally:
            for post in posts:
                post.cancel()
            await asyncio.gather(*posts, return_exceptions=True)


def busy(cluster: Cluster, gateways: list[str]) -> dict[str, float]:
    """Everything that should be zero when nobody is there, and is not."""
    found: dict[str, float] = {}
    store, workers = cluster.metrics("kv"), [cluster.metrics("prefill"), cluster.metrics("decode")]
    found["leases"] = store["baton_kv_leases"]
    for state in ("reserved", "pinned", "revoked"):
        found[state] = store[f'baton_kv_slots{{state="{state}"}}']
    for name in ("baton_worker_jobs", "baton_engine_running", "baton_engine_waiting", "baton_engine_kv_usage"):
        found[name] = sum(worker[name] for worker in workers)
    for url in gateways:
        metrics = read_metrics(url)
        found[f"active {url}"] = metrics[f'baton_active_requests{{model="{MODEL}"}}']
        found[f"queued {url}"] = metrics["baton_queue_depth"]
    return {name: value for name, value in found.items() if value}


def sizes(cluster: Cluster, gateways: list[str]) -> dict[str, tuple[float, float]]:
    """Process -> (tasks, open descriptors)."""
    urls = {s["id"]: s["metrics_url"] for s in cluster.status()["services"] if s["role"] in ("kv", "prefill", "decode")}
    urls |= {f"gateway-{number}": url for number, url in enumerate(gateways)}
    metrics = {name: read_metrics(url, name) for name, url in urls.items()}
    return {name: (m["baton_tasks"], m["process_open_fds"]) for name, m in metrics.items()}


async def test_a_thousand_cancels(cluster: Cluster, gateways: list[str]) -> None:
    probe = {**body_of(9999, random.Random(1)), "prompt": prompt_of(900, 7), "max_tokens": 30, "stream": False}
    async with httpx.AsyncClient(timeout=120) as client:
        expected = (await client.post(f"{gateways[0]}/v1/completions", json=probe)).json()["choices"]
    before = await asyncio.to_thread(sizes, cluster, gateways)
    seen = await crowd(gateways)
    await asyncio.gather(*(leave_the_queue(url) for url in gateways))
    print(f"what {CANCELS} clients saw: {dict(seen)}")
    assert set(seen) <= {"left", "200", "429", "503"}, seen
    assert seen["left"] > CANCELS / 2, seen  # the rest was done before its client left

    deadline = time.monotonic() + SETTLE_S
    while left_over := await asyncio.to_thread(busy, cluster, gateways):
        assert time.monotonic() < deadline, f"not idle after {SETTLE_S} s: {left_over}"
    hit = {
        name.split('"')[1]
        for url in gateways
        for name, value in read_metrics(url).items()
        if name.startswith("baton_cancelled_total") and value
    }
    assert hit >= STAGES, f"never cancelled while {STAGES - hit}"
    # A new prompt, so that it takes the whole way again.
    async with httpx.AsyncClient(timeout=120) as client:
        for url in gateways:
            answer = (await client.post(f"{url}/v1/completions", json=probe)).json()
            assert answer["choices"] == expected
    after = await asyncio.to_thread(sizes, cluster, gateways)
    for name, (tasks, descriptors) in after.items():
        assert tasks <= before[name][0] + 2, f"{name} has {tasks} tasks, before {before[name][0]}"
        assert descriptors <= before[name][1] + 8, f"{name} has {descriptors} descriptors, before {before[name][1]}"
    assert_idle(cluster)
