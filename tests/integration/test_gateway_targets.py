"""Targets, the line and its order, seen by clients: a gateway among fake workers that say how fast and how busy they are."""

import asyncio

import msgspec
import openai
import pytest

from shared import wire
from shared.settings import Target, Targets
from tests.support.gateway_cluster import assert_nothing_left, receipt
from tests.support.running_gateway import MODEL

FAST = {"prefill_tokens_per_s": 1000.0}
BUSY = wire.Backlog(running=1, queued_prompts=1, queued_tokens=10_000)  # ten seconds of work


async def speaks(running, worker, **beat) -> None:
    """From now on the worker says this of itself, and the gateway has heard it."""
    worker.beat = msgspec.structs.replace(worker.beat, **beat)
    heard = running.deps.fleet.beats(worker.id)
    await running.until(lambda g: g.fleet.beats(worker.id) > heard + 1)


def ask(running, words: int = 20, tier: str = "default"):
    return running.client.completions.with_raw_response.create(
        model=MODEL, prompt=[7] * words, max_tokens=2, temperature=0, extra_body={"service_tier": tier}
    )


async def waiting(running, count: int) -> None:
    async with asyncio.timeout(10):
        while len(running.deps.queue) != count:
            await running.deps.fleet.change()


async def test_an_idle_cluster_refuses_no_long_prompt(cluster):
    cluster.settings = {"targets": Targets(default=Target(ttft_s=0.001))}
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, prefill_tokens_per_s=10.0)
        answer = await ask(running, words=200)
        assert receipt(answer)["predicted_ttft_ms"] >= 20_000
        assert receipt(answer)["actual_ttft_ms"] < 20_000
        await assert_nothing_left(running)


async def test_what_would_be_late_is_refused_at_once(cluster):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, **FAST, backlog=BUSY)
        told = []
        for _ in range(3):
            with pytest.raises(openai.RateLimitError) as refused:
                await ask(running)
            assert refused.value.code == "deadline_infeasible"
            told.append(int(refused.value.response.headers["retry-after"]))
            assert receipt(refused.value.response)["stages_ms"].keys() == {"queue"}
        assert 5 <= told[0] <= 12  # ten seconds of work, and a target of two
        assert running.sample("baton_shed_total", reason="deadline_infeasible") == 3
        assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="shed") == 3
        assert not decode.jobs
        # As soon as the backlog has gone, so has the refusal.
        await speaks(running, prefill, backlog=wire.Backlog())
        assert (await ask(running)).status_code == 200
        await assert_nothing_left(running)


async def test_the_target_is_the_tier_s(cluster):
    cluster.settings = {"targets": Targets(flex=Target(ttft_s=100.0))}
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, **FAST, backlog=BUSY)
        with pytest.raises(openai.RateLimitError):
            await ask(running, tier="priority")
        patient = asyncio.create_task(ask(running, tier="flex"))
        await waiting(running, 1)
        await speaks(running, prefill, backlog=wire.Backlog())
        assert (await patient).status_code == 200


async def test_before_speeds_are_known_nobody_is_refused(cluster):
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, backlog=BUSY, max_running=1, max_waiting=0)
        task = asyncio.create_task(ask(running))
        await waiting(running, 1)
        await speaks(running, prefill, backlog=wire.Backlog())
        assert (await task).status_code == 200


async def test_nobody_waits_beyond_its_target(cluster):
    """The forecast was wrong: a second of work never ends. The answer comes when it would be too late to begin."""
    cluster.settings = {"targets": Targets(default=Target(ttft_s=1.2)), "queue_s": 600.0}
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        second = wire.Backlog(running=1, queued_prompts=1, queued_tokens=1000)
        await speaks(running, prefill, **FAST, backlog=second)
        with pytest.raises(openai.RateLimitError, match="no worker had room in time") as refused:
            await ask(running)
        assert refused.value.code == "deadline_infeasible"
        assert receipt(refused.value.response)["stages_ms"]["queue"] > 0
        assert not decode.jobs
        await assert_nothing_left(running)


async def test_without_admission_everybody_waits(cluster):
    cluster.settings = {"admission": "off", "queue_s": 0.5}
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, **FAST, backlog=BUSY)
        tasks = [asyncio.create_task(ask(running)) for _ in range(3)]
        await waiting(running, 3)
        for task in tasks:
            with pytest.raises(openai.RateLimitError, match="no worker had room in time"):
                await task
        await assert_nothing_left(running)


async def test_the_line_is_bounded_in_tokens(cluster):
    cluster.settings = {"max_queued_tokens": 100, "admission": "off"}
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, **FAST, backlog=BUSY)
        first = asyncio.create_task(ask(running, words=80))
        await waiting(running, 1)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(running, words=30)
        assert refused.value.code == "queue_full"
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert running.sample("baton_queue_tokens") == 80
        await speaks(running, prefill, backlog=wire.Backlog())
        assert (await first).status_code == 200


async def test_decode_workers_are_given_no_more_than_their_gap_allows(cluster):
    cluster.settings = {"arrangement": "unsplit", "queue_s": 0.5}
    async with cluster.gateway() as running:
        slow, fine = await cluster.add(running, "decode-0", "decode-1")
        await speaks(running, slow, decode_step_s=0.2, backlog=wire.Backlog(running=1))
        await speaks(running, fine, decode_step_s=0.05, backlog=wire.Backlog(running=7))
        for _ in range(6):
            await ask(running)
        assert not slow.jobs
        await speaks(running, fine, decode_step_s=0.2)
        with pytest.raises(openai.RateLimitError):
            await ask(running)


async def test_priority_goes_first(cluster):
    cluster.settings = {"admission": "off"}
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        await speaks(running, prefill, **FAST, backlog=BUSY)
        tasks = []
        for words, tier in ((31, "flex"), (32, "flex"), (33, "default"), (34, "priority"), (35, "priority")):
            tasks.append(asyncio.create_task(ask(running, words=words, tier=tier)))
            await waiting(running, len(tasks))
        await speaks(running, prefill, backlog=wire.Backlog())
        await asyncio.gather(*tasks)
        order = [len(job.tokens) // wire.TOKEN_BYTES for job in decode.jobs]
        assert set(order) == {31, 32, 33, 34, 35}
        assert order.index(34) < order.index(32)
        assert order.index(33) < order.index(32)
