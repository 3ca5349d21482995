"""A stream whose decode worker is lost goes on elsewhere: nothing lost, nothing twice, usage as if nothing had been."""

import asyncio

import openai
import pytest

from services.gateway.request.pipeline import MAX_ATTEMPTS
from shared import wire
from tests.support.fake_workers import Script, announce_loss
from tests.support.gateway_cluster import assert_nothing_left, receipt
from tests.support.running_gateway import MODEL

GREEDY = {"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 6, "temperature": 0}


async def lose(cluster, worker):
    await worker.die()
    await announce_loss(cluster.url, worker.id)


async def test_a_stream_goes_on_after_its_last_token(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=2)
        stream = await running.client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
        chunks = [await anext(stream) for _ in range(2)]
        (second,) = await cluster.add(running, "decode-1")
        await lose(cluster, first)
        chunks += [chunk async for chunk in stream]
        *told, last = chunks
        assert [chunk.choices[0].text for chunk in told] == [f" {step}" for step in range(6)]
        assert [chunk.choices[0].finish_reason for chunk in told] == [None] * 5 + ["length"]
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 6)
        (job,) = second.jobs
        assert (job.attempt, wire.unpack_tokens(job.tokens), job.sampling.max_tokens) == (1, [1, 2, 3, 100, 101], 4)
        assert running.sample("baton_retries_total", phase="resume") == 1
        await assert_nothing_left(running)


async def test_an_answer_in_one_piece_is_resumed_too(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(fail_after=(3, wire.Failure(code="draining", message="this worker is shutting down")))
        asking = asyncio.create_task(
            running.client.completions.with_raw_response.create(**GREEDY, extra_body={"return_token_ids": True})
        )
        await first.until(lambda w: w.jobs)
        await cluster.add(running, "decode-1")
        raw = await asking
        (choice,) = raw.parse().choices
        assert choice.text == " 0 1 2 3 4 5"
        assert choice.model_extra["token_ids"] == [100, 101, 102, 103, 104, 105]
        assert raw.parse().usage.completion_tokens == 6
        assert (receipt(raw)["decode"], receipt(raw)["retries"]) == ("decode-1", 1)


async def test_text_that_was_held_back_is_made_again(cluster):
    """The client has the token of half a character, and not its text."""
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=3, held=frozenset({2}))
        stream = await running.client.completions.create(
            **GREEDY, stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True}
        )
        chunks = [await anext(stream) for _ in range(3)]
        (second,) = await cluster.add(running, "decode-1")
        second.script = Script(held=frozenset({2}))
        await lose(cluster, first)
        chunks += [chunk async for chunk in stream]
        *told, last = chunks
        assert "".join(chunk.choices[0].text for chunk in told) == " 0 1 2 3 4 5"
        ids = [token for chunk in told for token in chunk.choices[0].model_extra.get("token_ids") or []]
        assert ids == [100, 101, 102, 103, 104, 105]
        assert last.usage.completion_tokens == 6
        assert wire.unpack_tokens(second.jobs[0].tokens) == [1, 2, 3, 100, 101]


async def test_lost_twice(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=1)
        stream = await running.client.completions.create(**GREEDY, stream=True)
        texts = [(await anext(stream)).choices[0].text]
        (second,) = await cluster.add(running, "decode-1")
        second.script = Script(stall_after=2)
        await lose(cluster, first)
        texts += [(await anext(stream)).choices[0].text for _ in range(2)]
        (third,) = await cluster.add(running, "decode-2")
        await lose(cluster, second)
        texts += [chunk.choices[0].text async for chunk in stream]
        assert texts == [f" {step}" for step in range(6)]
        assert third.jobs[0].sampling.max_tokens == 3


async def test_a_hole_is_a_resume(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(hole_after=2)
        asking = asyncio.create_task(running.client.completions.create(**GREEDY))
        await decode.until(lambda w: w.cancels)
        decode.script = Script()
        assert (await asking).choices[0].text == " 0 1 2 3 4 5"


async def test_nobody_to_go_on_with(cluster):
    """The client hears what happened to its stream, not what happened to the attempt to save it."""
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(stall_after=1)
        stream = await running.client.completions.create(**GREEDY, stream=True)
        await anext(stream)
        await lose(cluster, decode)
        with pytest.raises(openai.APIError) as failed:
            async for _ in stream:
                pass
        assert failed.value.code == "worker_lost"
        await assert_nothing_left(running)


# ---- by forcing ------------------------------------------------------------------------------------------------------

SEEDED = {**GREEDY, "temperature": 0.8, "seed": 5}


def replay_of(job):
    return [wire.unpack_tokens(tokens) for tokens in job.replay]


@pytest.mark.parametrize("held", [frozenset(), frozenset({2}), frozenset({0, 2})], ids=["whole", "held", "held twice"])
async def test_a_seeded_stream_is_repeated_and_told_once(cluster, held):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=3, held=held)
        stream = await running.client.completions.create(
            **SEEDED,
            logprobs=1,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"return_token_ids": True},
        )
        chunks = [await anext(stream) for _ in range(3)]
        (second,) = await cluster.add(running, "decode-1")
        second.script = Script(held=held)
        await lose(cluster, first)
        chunks += [chunk async for chunk in stream]
        *told, last = chunks
        assert "".join(chunk.choices[0].text for chunk in told) == " 0 1 2 3 4 5"
        ids = [token for chunk in told for token in chunk.choices[0].model_extra.get("token_ids") or []]
        assert ids == [100, 101, 102, 103, 104, 105]
        assert [token for chunk in told for token in chunk.choices[0].logprobs.tokens] == [f" {n}" for n in range(6)]
        assert [chunk.choices[0].finish_reason for chunk in told] == [None] * 5 + ["length"]
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 6)
        (job,) = second.jobs
        assert (wire.unpack_tokens(job.tokens), job.sampling.max_tokens) == ([1, 2, 3], 6)
        assert replay_of(job) == [[100, 101, 102]]
        assert running.sample("baton_retries_total", phase="resume") == 1
        await assert_nothing_left(running)


async def test_every_choice_is_repeated(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(fail_after=(2, wire.Failure(code="draining", message="this worker is shutting down")))
        asking = asyncio.create_task(running.client.completions.with_raw_response.create(**SEEDED, n=2))
        await first.until(lambda w: w.jobs)
        (second,) = await cluster.add(running, "decode-1")
        raw = await asking
        assert [choice.text for choice in raw.parse().choices] == [" 0 1 2 3 4 5"] * 2
        assert raw.parse().usage.completion_tokens == 12
        assert receipt(raw)["retries"] == 1
        assert replay_of(second.jobs[0]) == [[100, 101]] * 2


async def test_a_sample_goes_on_by_prompt_but_for_what_was_held(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=3, held=frozenset({2}))
        stream = await running.client.completions.create(
            **{**GREEDY, "temperature": 0.8}, stream=True, extra_body={"return_token_ids": True}
        )
        chunks = [await anext(stream) for _ in range(3)]
        (second,) = await cluster.add(running, "decode-1")
        second.script = Script(held=frozenset({2}))
        await lose(cluster, first)
        chunks += [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks) == " 0 1 2 3 4 5"
        (job,) = second.jobs
        assert (wire.unpack_tokens(job.tokens), replay_of(job)) == ([1, 2, 3, 100, 101], [[102]])
        assert job.sampling.max_tokens == 4


async def test_nobody_can_repeat(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=1)
        stream = await running.client.completions.create(**SEEDED, stream=True)
        await anext(stream)
        (second,) = await cluster.add(running, "decode-1", forces=False)
        await lose(cluster, first)
        with pytest.raises(openai.APIError) as failed:
            async for _ in stream:
                pass
        assert failed.value.code == "resume_inexact"
        assert not second.jobs
        await assert_nothing_left(running)


async def test_the_one_that_can_repeat_is_found(cluster):
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=1)
        stream = await running.client.completions.create(**SEEDED, stream=True)
        texts = [(await anext(stream)).choices[0].text]
        busy = [f"decode-{number}" for number in range(1, 6)]
        old = await cluster.add(running, *busy, forces=False)
        (able,) = await cluster.add(running, "decode-6")
        await lose(cluster, first)
        texts += [chunk.choices[0].text async for chunk in stream]
        assert texts == [f" {step}" for step in range(6)]
        assert len(able.jobs) == 1
        assert not any(worker.jobs for worker in old)


async def test_who_ignores_the_replay_is_found_out(cluster):
    """A worker that begins anew says other tokens than those that were sent."""
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=2)
        stream = await running.client.completions.create(**SEEDED, stream=True)
        texts = [(await anext(stream)).choices[0].text for _ in range(2)]
        (second,) = await cluster.add(running, "decode-1")
        second.script = Script(says_first=50, stall_after=4)
        await lose(cluster, first)
        with pytest.raises(openai.APIError) as failed:
            await anext(stream)
        assert failed.value.code == "resume_inexact"
        assert texts == [" 0", " 1"]
        await second.until(lambda w: w.cancels)


# ---- long streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["by prompt", "by forcing"])
async def test_a_stream_that_gets_on_outlives_any_number_of_workers(cluster, params):
    async with cluster.gateway() as running:
        _, worker = await cluster.add(running, "prefill-0", "decode-0")
        worker.script = Script(stall_after=1)
        stream = await running.client.completions.create(**{**params, "max_tokens": 4 * MAX_ATTEMPTS}, stream=True)
        texts = []
        for number in range(1, 2 * MAX_ATTEMPTS):
            texts.append((await anext(stream)).choices[0].text)
            (other,) = await cluster.add(running, f"decode-{number}")
            # By prompt each says one token more; by forcing it repeats all the others first.
            last = number == 2 * MAX_ATTEMPTS - 1
            other.script = Script(stall_after=None if last else 1 if params is GREEDY else number + 1)
            await lose(cluster, worker)
            worker = other
        texts += [chunk.choices[0].text async for chunk in stream]
        assert texts == [f" {step}" for step in range(4 * MAX_ATTEMPTS)]
        assert running.sample("baton_retries_total", phase="resume") == 2 * MAX_ATTEMPTS - 1


async def test_a_stream_that_gets_nowhere_ends(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(fail_after=(2, wire.Failure(code="engine_failed", message="the engine has died")))
        with pytest.raises(openai.InternalServerError) as failed:
            await running.client.completions.create(**SEEDED)
        assert failed.value.code == "engine_failed"
        assert [job.attempt for job in decode.jobs] == list(range(MAX_ATTEMPTS))


async def test_a_paused_worker_that_comes_back_is_cancelled(cluster):
    """Its rows are those of an attempt that is over."""
    async with cluster.gateway() as running:
        _, first = await cluster.add(running, "prefill-0", "decode-0")
        go = asyncio.Event()
        first.script = Script(pause_after=(2, go), deaf=True)
        stream = await running.client.completions.create(**SEEDED, stream=True)
        texts = [(await anext(stream)).choices[0].text for _ in range(2)]
        (second,) = await cluster.add(running, "decode-1")
        hold = asyncio.Event()
        second.script = Script(pause_after=(4, hold))
        await announce_loss(cluster.url, first.id)
        texts += [(await anext(stream)).choices[0].text for _ in range(2)]
        await first.until(lambda w: w.cancels)
        first.script.deaf = False
        go.set()
        await first.until(lambda w: len(w.cancels) > 1)
        hold.set()
        texts += [chunk.choices[0].text async for chunk in stream]
        assert texts == [f" {step}" for step in range(6)]
        assert set(first.cancels) == {(first.jobs[0].request, 0)}
        await assert_nothing_left(running)
