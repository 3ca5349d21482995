"""A gateway that dies: its workers stop what it had asked for, and hold nothing for it."""

import asyncio
import contextlib
import time
from collections.abc import Iterator

import openai
import psutil
import pytest

from tests.support.cluster import Cluster, running_cluster
from tests.support.exact import assert_idle

pytestmark = pytest.mark.timeout(300)

STREAMS = 6
TOKENS = 3000  # at 30 ms each: nobody waits for their end
BACK_S = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--engine=sim",
        "--arrangement=split",
        "--arena-gib=0.1",
        "--kv-gib=0.25",
        "--engine-arg=max_model_len=4096",
    ) as cluster:
        yield cluster


async def read(client: openai.AsyncOpenAI, number: int, begun: asyncio.Event) -> None:
    with contextlib.suppress(openai.APIError):  # the connection breaks with the gateway
        async for _ in await client.completions.create(
            model="baton-demo", prompt=[number] * 100, max_tokens=TOKENS, temperature=0, stream=True
        ):
            begun.set()


async def test_its_jobs_end_with_it(cluster: Cluster) -> None:
    gateway = psutil.Process(cluster.pid("gateway-0"))
    begun = [asyncio.Event() for _ in range(STREAMS)]
    client = cluster.async_client()
    async with asyncio.TaskGroup() as tasks:
        for number, event in enumerate(begun):
            tasks.create_task(read(client, 10 + number, event))
        await asyncio.gather(*(event.wait() for event in begun))
        gateway.kill()
    deadline = time.monotonic() + BACK_S
    while (metrics := await asyncio.to_thread(cluster.metrics, "decode"))["baton_worker_jobs"]:
        assert time.monotonic() < deadline, "the jobs of the dead gateway go on"
    assert metrics["baton_orphaned_jobs_total"] == STREAMS
    while any(service["state"] != "ready" for service in (await asyncio.to_thread(cluster.status))["services"]):
        assert time.monotonic() < deadline, "gateway-0 was not started again"
    answer = await client.completions.create(model="baton-demo", prompt=[1] * 100, max_tokens=5, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert_idle(cluster)
