"""Workers die, drain or stand still under 32 streams of every kind: each stream is that of an undisturbed run.

Undisturbed runs equal unsplit vLLM: test_exactness.py. Greedy streams go on by prompt, most others by forcing.
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.disturbed import until, whole_again
from tests.support.exact import assert_idle, complete, exact_cluster, greedy, prompt_of
from tests.support.streams import Asked, Reading, read_all

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

OUTPUT = 400
PAUSED_S = 5.0
SEEDED: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "max_tokens": OUTPUT, "ignore_eos": True}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 300, "maxLength": 310}, "size": {"type": "integer"}},
    "required": ["name", "size"],
    "additionalProperties": False,
}
STATEFUL: dict[str, dict[str, Any]] = {
    "penalties": {**greedy(OUTPUT), "presence_penalty": 0.8, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "repetition": {**greedy(OUTPUT), "repetition_penalty": 1.3},
    "seeded": {**SEEDED, "seed": 7},
    "logprobs": {**SEEDED, "seed": 8, "logprobs": 2},
    "stop": {**SEEDED, "seed": 9, "stop": ["qqqqqq", "a never seen end"]},
    "min_tokens": {"temperature": 0.0, "max_tokens": OUTPUT, "min_tokens": OUTPUT - 50},
    "bad_words": {**greedy(OUTPUT), "bad_words": ["a", "e", "th", "ou"]},
    "n": {**SEEDED, "seed": 10, "n": 2},
}
GREEDY = 14
JSON = 2
BY_PROMPT = {"greedy", "repetition"}


def all_streams() -> list[Asked]:
    asked = [Asked("greedy", prompt_of(20 + 12 * number, number), greedy(OUTPUT)) for number in range(GREEDY)]
    for number, (name, params) in enumerate(list(STATEFUL.items()) * 2):
        asked.append(Asked(name, prompt_of(30 + 11 * number, 50 + number), params))
    chats = {"temperature": 0.8, "seed": 11, "max_tokens": OUTPUT + 100}
    return asked + [Asked("json", prompt_of(50 + number, 99), chats, SCHEMA) for number in range(JSON)]


ASKED = all_streams()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with exact_cluster(
        tmp_path_factory,
        "--decode=2",
        "--kv-gib=0.15",
        "--arena-gib=0.3",
        BATON_DRAIN_S="0.1",  # shorter than any of the streams
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[Any]:
    assert len(ASKED) == 32
    readings = asyncio.run(read_all(cluster.async_client(), ASKED))
    assert all(len(said.ids) > OUTPUT // 2 for reading in readings for said in reading.choices.values())
    return [reading.outcome for reading in readings]


@asynccontextmanager
async def disturbed(cluster: Cluster, expected: list[Any], what: str) -> AsyncIterator[None]:
    """Within: every stream has begun. Afterwards: every one has ended as if nothing had been, and nothing is held."""
    client = cluster.async_client()
    readings = [Reading(one) for one in ASKED]
    resumed = cluster.meter("gateway", 'baton_retries_total{phase="resume"}')
    before = resumed()
    async with asyncio.TaskGroup() as tasks:
        for reading in readings:
            tasks.create_task(reading.read(client))
        await asyncio.gather(*(reading.begun.wait() for reading in readings))
        started, live = time.monotonic(), sum(not reading.ended for reading in readings)
        for reading in readings:
            reading.longest_gap_s = 0.0
        yield
    for reading, outcome in zip(readings, expected, strict=True):
        assert reading.outcome == outcome, reading.asked.name
    moved = resumed() - before
    prompt_s, forcing_s = (
        max(one.longest_gap_s for one in readings if (one.asked.name in BY_PROMPT) == by_prompt)
        for by_prompt in (True, False)
    )
    print(
        f"{what}: {moved:g} of {live} live streams resumed, longest gap {prompt_s:.2f} s by prompt, {forcing_s:.2f} s by "
        f"forcing, all over {time.monotonic() - started:.1f} s later"
    )
    assert moved > 0, "it came too late"
    await asyncio.to_thread(until, lambda: whole_again(cluster), "not every process was started again")
    assert_idle(cluster)


@pytest.mark.parametrize(
    "signals",
    [{"decode-0": signal.SIGKILL}, {"decode-0": signal.SIGTERM, "prefill-0": signal.SIGKILL}],
    ids=["decode killed", "decode drained and prefill killed"],
)
async def test_workers_go(
    cluster: Cluster, expected: list[Any], signals: dict[str, signal.Signals], request: pytest.FixtureRequest
) -> None:
    workers = {worker: psutil.Process(cluster.pid(worker)) for worker in signals}
    async with disturbed(cluster, expected, request.node.callspec.id):
        for worker, number in signals.items():
            workers[worker].send_signal(number)


async def test_a_decode_worker_stands_still_and_comes_back(cluster: Cluster, expected: list[Any]) -> None:
    """Its engine goes on meanwhile, so that it comes back with rows for streams that others have taken over."""
    worker = psutil.Process(cluster.pid("decode-0"))
    async with disturbed(cluster, expected, f"decode worker paused for {PAUSED_S:g} s"):
        worker.suspend()
        await asyncio.sleep(PAUSED_S)  # the length of the pause is what is tested
        worker.resume()
    assert cluster.pid("decode-0") == worker.pid, "it was to come back, not to be started anew"
    # It serves again: with the other one standing still nobody else can.
    other = psutil.Process(cluster.pid("decode-1"))
    other.suspend()
    try:
        _, receipt = await asyncio.to_thread(complete, cluster, prompt_of(64, 1), greedy(2))
    finally:
        other.resume()
    assert receipt["decode"] == "decode-0"
    await asyncio.to_thread(until, lambda: whole_again(cluster), "decode-1 was not there again")
    assert_idle(cluster)
