"""A stream whose decode worker is lost goes on elsewhere: nothing lost, nothing twice, usage as if nothing had been."""

import asyncio

import openai
import pytest

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
