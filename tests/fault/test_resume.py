"""One of two decode workers dies or drains under greedy streams: every text is the one of an undisturbed run."""

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.exact import (
    arguments,
    assert_idle,
    complete,
    exact_cluster,
    greedy,
    prompt_of,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

STREAMS = 12
OUTPUT = 600
PROMPTS = [prompt_of(40 + 90 * number, number) for number in range(STREAMS)]
BACK_S = 120


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with exact_cluster(
        tmp_path_factory,
        "--decode=2",
        "--kv-gib=0.1",
        "--arena-gib=0.2",
        BATON_DRAIN_S="0.1",  # shorter than any of the streams
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[tuple[str, list[int]]]:
    """Undisturbed; test_exactness.py shows that these equal unsplit vLLM."""
    with ThreadPoolExecutor(STREAMS) as threads:
        answers = list(threads.map(lambda prompt: complete(cluster, prompt, greedy(OUTPUT))[0], PROMPTS))
    choices = [answer.choices[0] for answer in answers]
    return [(choice.text, choice.model_extra["token_ids"]) for choice in choices]


class Reading:
    """One stream, read to its end."""

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] = []
        self.longest_gap_s = 0.0
        self.begun = asyncio.Event()

    async def read(self, client: openai.AsyncOpenAI, prompt: str) -> None:
        last = None
        async for chunk in await client.completions.create(stream=True, **arguments(prompt, greedy(OUTPUT))):
            now = time.monotonic()
            self.longest_gap_s = max(self.longest_gap_s, now - last if last else 0.0)
            last = now
            for choice in chunk.choices:
                self.text += choice.text
                self.ids += (choice.model_extra or {}).get("token_ids") or []
            if len(self.ids) > 5:
                self.begun.set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "drained"])
async def test_every_stream_reaches_its_end(
    cluster: Cluster, expected: list[tuple[str, list[int]]], number: signal.Signals
) -> None:
    client = cluster.async_client()
    readings = [Reading() for _ in PROMPTS]
    resumed = cluster.meter("gateway", 'baton_retries_total{phase="resume"}')
    before = resumed()
    worker = psutil.Process(cluster.pid("decode-0"))
    async with asyncio.TaskGroup() as tasks:
        for reading, prompt in zip(readings, PROMPTS, strict=True):
            tasks.create_task(reading.read(client, prompt))
        await asyncio.gather(*(reading.begun.wait() for reading in readings))
        worker.send_signal(number)
    assert [(reading.text, reading.ids) for reading in readings] == expected
    moved = resumed() - before
    print(f"{moved:g} of {STREAMS} streams resumed, longest gap {max(one.longest_gap_s for one in readings):.2f} s")
    assert moved > 0, "the signal came too late"
    deadline = time.monotonic() + BACK_S
    while any(service["state"] != "ready" for service in (await asyncio.to_thread(cluster.status))["services"]):
        assert time.monotonic() < deadline, "decode-0 was not started again"
    assert_idle(cluster)
