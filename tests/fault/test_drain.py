"""SIGTERM of each service while a stream runs: what fits into the grace period ends exactly, the rest says why; exit 0.

The gateway's own cut-off is in tests/integration/test_gateway_process.py, with fakes. Here: one prefill and one decode
worker with real vLLM; each test leaves the cluster whole again, because the launcher starts anew whatever ends.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import psutil
import pytest

from tests.support.cluster import Cluster
from tests.support.disturbed import until, whole_again
from tests.support.exact import (
    arguments,
    assert_idle,
    complete,
    exact_cluster,
    greedy,
    prompt_of,
    token_ids,
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

DRAIN_S = 5
SHORT, FEW = 30, 8  # tokens: a fraction of the grace period
LONG = {"temperature": 1.0, "n": 4, "max_tokens": 1900, "ignore_eos": True}  # many times of it
PROMPT = prompt_of(100, 1)
BIG_PROMPT = prompt_of(1900, 2)
HAND_OFFS = {"prefill-0": prompt_of(1900, 3), "kv-0": prompt_of(1900, 4)}
SMALL_STEPS = {"max_num_batched_tokens": 32}  # a prompt takes sixty steps: there is a middle to be asked to end in


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with exact_cluster(
        tmp_path_factory,
        "--kv-gib=0.25",
        # Two prompts of maximum length: the store forgets the hand-offs' blocks before they are asked for again.
        "--arena-gib=0.017",
        engine={"enable_prefix_caching": False, **SMALL_STEPS},
        BATON_DRAIN_S=str(DRAIN_S),
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> dict[str, list[int]]:
    """Undisturbed; test_exactness.py shows that these equal unsplit vLLM."""
    answers = {}
    prompts = [*HAND_OFFS.values(), prompt_of(1900, 5), BIG_PROMPT, PROMPT]
    for prompt in prompts:
        response, receipt = complete(cluster, prompt, greedy(SHORT if prompt == PROMPT else FEW))
        assert receipt["path"] == "split"
        answers[prompt] = token_ids(response.choices[0])
    return answers


async def begun(cluster: Cluster, prompt: str, params: dict[str, Any]) -> tuple[list[int], AsyncIterator[Any]]:
    """A stream that has given its first token."""
    events = aiter(await cluster.async_client().completions.create(stream=True, **arguments(prompt, params)))
    return [*tokens_in(await anext(events))], events


def tokens_in(chunk: Any) -> list[int]:
    return [token for choice in chunk.choices for token in (choice.model_extra or {}).get("token_ids") or []]


async def rest_of(events: AsyncIterator[Any]) -> list[int]:
    return [token async for chunk in events for token in tokens_in(chunk)]


def terminate(cluster: Cluster, service_id: str) -> psutil.Process:
    process = psutil.Process(cluster.pid(service_id))
    cluster.said()
    process.send_signal(signal.SIGTERM)
    return process


def is_draining(cluster: Cluster, service_id: str) -> bool:
    return bool(cluster.service(service_id)["state"] == "draining")


async def ended_with_0(cluster: Cluster, service_id: str) -> None:
    """The launcher says so, and makes the cluster whole again."""
    said = ""

    def died() -> bool:
        nonlocal said
        said += cluster.said()
        return f"{service_id} died" in said

    await asyncio.to_thread(until, died, f"{service_id} has not ended", 60)
    assert f"{service_id} died (exit code 0;" in said
    await asyncio.to_thread(until, lambda: whole_again(cluster), f"{service_id} was not started again")


@pytest.mark.parametrize("service_id", ["decode-0", "gateway-0", "prefill-0", "kv-0"])
async def test_a_stream_within_the_grace_period_ends_exactly(
    cluster: Cluster, expected: dict[str, list[int]], service_id: str
) -> None:
    tokens, events = await begun(cluster, PROMPT, greedy(SHORT))
    terminate(cluster, service_id)
    tokens += await rest_of(events)
    assert tokens == expected[PROMPT]
    await ended_with_0(cluster, service_id)

    def is_split() -> bool:
        """Then the workers have attached to the new store; until then prompts are computed where they are decoded."""
        response, receipt = complete(cluster, BIG_PROMPT, greedy(FEW))
        assert token_ids(response.choices[0]) == expected[BIG_PROMPT]
        return bool(receipt["path"] == "split")

    await asyncio.to_thread(until, is_split, "prompts are not handed over again")
    assert_idle(cluster)


@pytest.mark.parametrize(("service_id", "refusal"), [("decode-0", "no_capacity"), ("gateway-0", "draining")])
async def test_a_longer_one_ends_in_one_clear_error(cluster: Cluster, service_id: str, refusal: str) -> None:
    _, events = await begun(cluster, PROMPT, LONG)
    terminate(cluster, service_id)
    await asyncio.to_thread(until, lambda: is_draining(cluster, service_id), "it does not say so")
    with pytest.raises(openai.InternalServerError) as refused:
        await asyncio.to_thread(complete, cluster, PROMPT, greedy(SHORT))
    assert (refused.value.status_code, refused.value.code) == (503, refusal)
    with pytest.raises(openai.APIError) as cut:
        await rest_of(events)
    assert cut.value.code == "draining"
    await ended_with_0(cluster, service_id)
    assert_idle(cluster)


@pytest.mark.parametrize("service_id", ["prefill-0", "kv-0"])
async def test_a_hand_off_under_way_is_finished_or_computed_anew(
    cluster: Cluster, expected: dict[str, list[int]], service_id: str
) -> None:
    written = cluster.meter("kv", "baton_kv_written_bytes_total")
    before = written()
    task = asyncio.create_task(asyncio.to_thread(complete, cluster, HAND_OFFS[service_id], greedy(FEW)))
    await asyncio.to_thread(until, lambda: written() > before, "prefill has not begun")
    terminate(cluster, service_id)
    response, _ = await task
    assert token_ids(response.choices[0]) == expected[HAND_OFFS[service_id]]
    await ended_with_0(cluster, service_id)
    assert_idle(cluster)
