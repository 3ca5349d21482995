"""Several prompts in one request, echo, prompt log probabilities and usage, with fake workers."""

import asyncio
import json

import httpx
import openai
import pytest

from shared import wire
from shared.errors import EngineFailed
from tests.support.fake_workers import Script
from tests.support.gateway_cluster import assert_nothing_left, receipt
from tests.support.running_gateway import MODEL


async def events_of(running, **body) -> list[dict]:
    async with httpx.AsyncClient() as client:
        response = await client.post(f"{running.url}/v1/completions", json={"model": MODEL, "stream": True, **body})
    assert response.text.endswith("data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("prompt", [["a", "bcd"], [[5], [5, 6, 7]]], ids=["texts", "token ids"])
async def test_a_choice_for_each_prompt_and_n(cluster, prompt):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        raw = await running.client.completions.with_raw_response.create(
            model=MODEL, prompt=prompt, n=2, max_tokens=2, extra_body={"return_token_ids": True}
        )
        answer = raw.parse()
        sent = {job.request.rsplit("-", 1)[1]: wire.unpack_tokens(job.tokens) for job in decode.jobs}
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == [" 0 1"] * 4
        assert [choice.prompt_token_ids for choice in answer.choices] == [sent["0"], sent["0"], sent["1"], sent["1"]]
        assert answer.usage.prompt_tokens == len(sent["0"]) + len(sent["1"])
        assert answer.usage.completion_tokens == 8
        assert receipt(raw)["path"] == "split"
        await assert_nothing_left(running)
        assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="ok") == 1


async def test_one_prompt_in_a_list_is_one_prompt(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "decode-0")
        answer = await running.client.completions.create(model=MODEL, prompt=["a"], max_tokens=1)
        assert [choice.text for choice in answer.choices] == [" 0"]


async def test_streams_interleave_by_index(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        prompts = ["a", "b", "c"]
        events = await events_of(
            running, prompt=prompts, n=2, max_tokens=3, echo=True, stream_options={"include_usage": True}
        )
        texts, ends = dict.fromkeys(range(6), ""), []
        for event in events[:-1]:
            (choice,) = event["choices"]
            texts[choice["index"]] += choice["text"]
            ends += [choice["index"]] if choice["finish_reason"] else []
        assert texts == {index: prompts[index // 2] + " 0 1 2" for index in range(6)}
        assert sorted(ends) == list(range(6))
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 18


async def test_one_failing_ends_all_with_one_error(cluster):
    async with cluster.gateway() as running:
        good, bad = await cluster.add(running, "decode-0", "decode-1")
        good.script = Script(stall_after=1)
        bad.script = Script(fail_after=(1, wire.Failure(code="kv_mismatch", message="nobody can mend this")))
        with pytest.raises(openai.APIError) as failed:
            await running.client.completions.create(model=MODEL, prompt=["a", "b", "c", "d"], max_tokens=9)
        assert failed.value.code == "kv_mismatch"
        # A row that was under way is a stranger's then, and its job is cancelled once more.
        await good.until(lambda w: set(w.cancels) == {(job.request, job.attempt) for job in w.jobs})
        await assert_nothing_left(running)
        assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="error") == 1


async def test_a_prompt_that_fails_before_its_first_token_is_placed_again(cluster):
    async with cluster.gateway() as running:
        _, bad = await cluster.add(running, "decode-0", "decode-1")
        bad.script = Script(refuse=EngineFailed("no"))
        raw = await running.client.completions.with_raw_response.create(model=MODEL, prompt=["a"] * 4, max_tokens=2)
        assert [choice.text for choice in raw.parse().choices] == [" 0 1"] * 4
        assert receipt(raw)["retries"] == len(bad.jobs) > 0


async def test_a_client_that_leaves_cancels_every_prompt(cluster):
    async with cluster.gateway() as running:
        (decode,) = await cluster.add(running, "decode-0")
        decode.script = Script(stall_after=1)
        asking = asyncio.create_task(running.client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=9))
        await decode.until(lambda w: len(w.jobs) == 2)
        asking.cancel()
        await decode.until(lambda w: len(w.cancels) == 2)
        assert sorted(decode.cancels) == sorted((job.request, 0) for job in decode.jobs)
        await assert_nothing_left(running)


async def test_each_prompt_takes_a_place_in_the_gateway(cluster):
    cluster.settings = {"max_requests": 3}
    async with cluster.gateway() as running:
        (decode,) = await cluster.add(running, "decode-0")
        await running.client.completions.create(model=MODEL, prompt=["a"] * 3, max_tokens=1)
        await running.until_idle()
        with pytest.raises(openai.RateLimitError) as refused:
            await running.client.completions.create(model=MODEL, prompt=["a"] * 4, max_tokens=1)
        assert refused.value.code == "queue_full"
        assert len(decode.jobs) == 3
        await running.client.completions.create(model=MODEL, prompt=["a"] * 3, max_tokens=1)


@pytest.mark.parametrize("arrangement", ["split", "auto", "unsplit"])
async def test_prompt_logprobs_are_served_whole(cluster, arrangement):
    cluster.settings = {"arrangement": arrangement}
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        raw = await running.client.completions.with_raw_response.create(
            model=MODEL, prompt=[5, 6], max_tokens=1, n=2, extra_body={"prompt_logprobs": 1}
        )
        assert prefill.jobs == []
        shown = receipt(raw)
        assert (shown["path"], shown["reason"]) == ("whole", "prompt_logprobs")
        expected = [
            None,
            {
                "6": {"logprob": -2.0, "rank": 3, "decoded_token": "<6>"},
                "8": {"logprob": -0.5, "rank": 1, "decoded_token": "<8>"},
            },
        ]
        assert [choice.prompt_logprobs for choice in raw.parse().choices] == [expected] * 2


async def test_prompt_logprobs_of_a_chat(cluster):
    async with cluster.gateway() as running:
        (decode,) = await cluster.add(running, "decode-0")
        answer = await running.client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=1,
            extra_body={"prompt_logprobs": 0},
        )
        tokens = wire.unpack_tokens(decode.jobs[0].tokens)
        shown = answer.prompt_logprobs
        assert shown[0] is None
        assert [list(position) for position in shown[1:]] == [[str(token)] for token in tokens[1:]]


async def test_echo_of_text_is_that_text_and_stays_split(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        raw = await running.client.completions.with_raw_response.create(
            model=MODEL, prompt="né 😀", echo=True, max_tokens=2
        )
        assert raw.parse().choices[0].text == "né 😀 0 1"
        assert raw.parse().choices[0].logprobs is None
        assert receipt(raw)["path"] == "split"


async def test_echo_of_token_ids_is_their_text(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        ids = await running.tokenizer.text("né")
        answer = await running.client.completions.create(model=MODEL, prompt=ids, echo=True, max_tokens=1)
        assert answer.choices[0].text == "<s>né 0"


@pytest.mark.parametrize("streamed", [False, True])
async def test_echo_with_logprobs(cluster, streamed):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        body = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 2}
        if streamed:
            choices = [event["choices"][0] for event in await events_of(running, **body)]
        else:
            answer = await running.client.completions.create(model=MODEL, **body)
            choices = [choice.model_dump() for choice in answer.choices]
        opening = await running.tokenizer.shown([5])
        joined = {
            name: [item for choice in choices if choice["logprobs"] for item in choice["logprobs"][name]]
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        assert joined == {
            "tokens": [opening, "<6>", "<7>", " 0", " 1"],
            "token_logprobs": [None, -2.0, -2.0, -0.5, -0.5],
            "top_logprobs": [None, {"<6>": -2.0, "<8>": -0.5}, {"<7>": -2.0, "<8>": -0.5}, {" 0": -0.5}, {" 1": -0.5}],
            "text_offset": [0, 1, 4, 7, 9],
        }


@pytest.mark.parametrize("streamed", [False, True])
async def test_only_the_prompt(cluster, streamed):
    async with cluster.gateway() as running:
        await cluster.add(running, "decode-0")
        body = {"prompt": "hi", "echo": True, "logprobs": 0, "max_tokens": 0}
        if streamed:
            *events, last = await events_of(running, stream_options={"include_usage": True}, **body)
            text = "".join(event["choices"][0]["text"] for event in events)
            reason, usage = events[-1]["choices"][0]["finish_reason"], last["usage"]["completion_tokens"]
        else:
            answer = await running.client.completions.create(model=MODEL, **body)
            text, reason = answer.choices[0].text, answer.choices[0].finish_reason
            usage = answer.usage.completion_tokens
            assert len(answer.choices[0].logprobs.tokens) == 3  # <s>, h, i
        assert (text, reason, usage) == ("hi", "length", 0)


@pytest.mark.parametrize(
    ("arrangement", "script", "expected"),
    [
        ("split", {"cached_tokens": 2}, 2),  # prefill found two
        ("split", {"cached_tokens": 4}, 3),  # decode's node holds all: the last is computed
        ("split", {"cached_tokens": 2, "usage": wire.DecodeUsage(completion_tokens=1, recomputed_tokens=1)}, 1),
        ("unsplit", {"usage": wire.DecodeUsage(completion_tokens=1, loaded_tokens=1, engine_cached_tokens=1)}, 2),
        ("unsplit", {"usage": wire.DecodeUsage(completion_tokens=1, engine_cached_tokens=4)}, 3),
    ],
)
async def test_usage_shows_what_was_cached(cluster, arrangement, script, expected):
    cluster.settings = {"arrangement": arrangement}
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        prefill.script = decode.script = Script(**script)
        for prompts in (1, 2):
            raw = await running.client.completions.with_raw_response.create(
                model=MODEL, prompt=[[1, 2, 3, 4]] * prompts, max_tokens=1
            )
            assert raw.parse().usage.prompt_tokens_details.cached_tokens == expected * prompts
            assert receipt(raw)["cached_tokens"] == expected * prompts


async def test_usage_of_a_retried_request_is_that_of_the_last_attempt(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(fail_after=(0, wire.Failure(code="engine_failed", message="no")), cached_tokens=2)
        asking = asyncio.create_task(
            running.client.completions.with_raw_response.create(model=MODEL, prompt=[1, 2, 3, 4], max_tokens=1)
        )
        await decode.until(lambda w: w.jobs)
        (second,) = await cluster.add(running, "decode-1")
        second.script = Script(cached_tokens=4)
        raw = await asking
        assert raw.parse().usage.prompt_tokens_details.cached_tokens == 3
        assert receipt(raw)["retries"] >= 1
