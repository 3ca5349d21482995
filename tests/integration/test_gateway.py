"""The whole journey through a real HTTP server and a real NATS, with fake workers and the official client."""

import asyncio
import json

import httpx
import openai
import pytest

from services.gateway.gateway import drain
from services.gateway.request.pipeline import MAX_ATTEMPTS
from shared import wire
from shared.errors import EngineFailed
from tests.support.fake_workers import Script, announce_loss
from tests.support.gateway_cluster import assert_nothing_left, receipt
from tests.support.running_gateway import MODEL
from tests.support.tracing import watch_spans

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def tracing():
    return watch_spans()


async def test_chat_answers_whole(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        raw = await running.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=HELLO, max_tokens=3, n=2, seed=1
        )
        answer = raw.parse()
        assert [choice.message.content for choice in answer.choices] == [" 0 1 2"] * 2
        assert [choice.finish_reason for choice in answer.choices] == ["length"] * 2
        prompt = len(cluster.workers["decode-0"].jobs[0].tokens) // 4
        assert answer.usage.prompt_tokens == prompt
        assert answer.usage.completion_tokens == 6
        assert answer.usage.prompt_tokens_details.cached_tokens == 0
        shown = receipt(raw)
        assert (shown["path"], shown["prefill"], shown["decode"]) == ("split", "prefill-0", "decode-0")
        assert shown["retries"] == 0
        assert shown["actual_ttft_ms"] > 0
        assert shown["stages_ms"].keys() == {"edge", "queue", "reserve", "prefill", "handoff"}
        assert sum(shown["stages_ms"].values()) == pytest.approx(shown["actual_ttft_ms"], abs=1)
        await assert_nothing_left(running)
        assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="ok") == 1
        assert running.sample("baton_tokens_total", tenant="anonymous", model=MODEL, kind="completion") == 6


async def test_an_answer_that_comes_in_one_batch_has_a_first_token(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        raw = await running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=1)
        assert receipt(raw)["actual_ttft_ms"] > 0


async def test_chat_streams(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        stream = await running.client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=3, n=2, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", "assistant"]
        texts = dict.fromkeys(range(2), "")
        for chunk in chunks[2:-1]:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == {0: " 0 1 2", 1: " 0 1 2"}
        reasons = [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason]
        assert reasons == ["length", "length"]
        assert all(chunk.usage is None for chunk in chunks[:-1])
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 6
        await assert_nothing_left(running)


async def test_the_bytes_of_a_stream(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        async with httpx.AsyncClient() as client:
            response = await client.post(
                f"{running.url}/v1/completions",
                json={"model": MODEL, "prompt": [1, 2, 3], "max_tokens": 2, "stream": True},
                headers={"x-request-id": "abc-1"},
            )
        assert response.headers["x-request-id"] == "abc-1"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["content-type"].startswith("text/event-stream")
        assert receipt(response)["path"] == "split"
        events = response.text.split("\n\n")
        assert events[-1] == ""
        assert events[-2] == "data: [DONE]"
        assert events[-3].startswith(': baton-receipt {"path":"split"')
        first = json.loads(events[0].removeprefix("data: "))
        assert first["choices"] == [{"index": 0, "text": " 0", "logprobs": None, "finish_reason": None}]


async def test_completions_with_logprobs_and_token_ids(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        answer = await running.client.completions.create(
            model=MODEL, prompt="hi", max_tokens=2, logprobs=1, extra_body={"return_token_ids": True}
        )
        choice = answer.choices[0]
        assert choice.logprobs.tokens == [" 0", " 1"]
        assert choice.logprobs.text_offset == [0, 2]
        assert choice.logprobs.top_logprobs == [{" 0": -0.5}, {" 1": -0.5}]
        assert choice.token_ids == [100, 101]
        assert choice.prompt_token_ids == wire.unpack_tokens(cluster.workers["decode-0"].jobs[0].tokens)


async def test_chat_logprobs(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        answer = await running.client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=1, logprobs=True, top_logprobs=2
        )
        (token,) = answer.choices[0].logprobs.content
        assert (token.token, token.logprob, token.bytes) == (" 0", -0.5, [32, 48])
        assert [top.token for top in token.top_logprobs] == [" 0", " 0x"]


async def test_disconnect_cancels_on_both_workers(cluster):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        prefill.script = Script(hang=True)
        asking = asyncio.create_task(
            running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, stream=True)
        )
        await prefill.until(lambda w: w.jobs)
        asking.cancel()
        await decode.until(lambda w: w.cancels)
        await prefill.until(lambda w: w.cancels)
        assert decode.cancels == prefill.cancels == [(decode.jobs[0].request, 0)]
        await assert_nothing_left(running)
        assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="cancelled") == 1


async def test_disconnect_before_decode_has_accepted(cluster):
    """It may have asked for the prompt already, so both are told; a cancel that comes before its job bars it."""
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        prefill.script, decode.script = Script(hang=True), Script(silent=True)
        asking = asyncio.create_task(
            running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2, stream=True)
        )
        await prefill.until(lambda w: w.jobs)
        asking.cancel()
        await decode.until(lambda w: w.cancels)
        await prefill.until(lambda w: w.cancels)
        assert decode.cancels == prefill.cancels == [(decode.jobs[0].request, 0)]
        await assert_nothing_left(running)


async def test_disconnect_while_streaming(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(stall_after=1)
        stream = await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, stream=True)
        await anext(stream)
        await stream.close()
        await decode.until(lambda w: w.cancels)
        await assert_nothing_left(running)


@pytest.mark.parametrize("is_old", [False, True], ids=["by decode", "by the gateway, of an older decode"])
async def test_prefill_is_asked_once(cluster, is_old):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(is_old=is_old)
        raw = await running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
        assert raw.parse().choices[0].message.content == " 0 1"
        assert (receipt(raw)["path"], receipt(raw)["prefill"]) == ("split", "prefill-0")
        ((asked,), (job,)) = prefill.jobs, decode.jobs
        assert (job.prefill_worker, asked.request, asked.tokens) == ("prefill-0", job.request, job.tokens)
        await assert_nothing_left(running)


async def test_busy_goes_elsewhere_and_asks_no_prefill_before(cluster):
    async with cluster.gateway() as running:
        prefill, first, second = await cluster.add(running, "prefill-0", "decode-0", "decode-1")
        first.script = second.script = Script(busy=1)
        answer = await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
        assert answer.choices[0].message.content == " 0 1"
        assert sorted(job.attempt for job in first.jobs + second.jobs) == [0, 1]
        assert [job.attempt for job in prefill.jobs] == [1]
        assert not prefill.cancels


async def test_always_busy_is_a_refusal(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(busy=99, busy_reason="kv_memory")
        with pytest.raises(openai.RateLimitError) as failed:
            await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2)
        assert failed.value.code == "kv_memory"
        assert int(failed.value.response.headers["retry-after"]) >= 1
        assert running.sample("baton_shed_total", reason="kv_memory") == 1


async def test_prefill_error_goes_to_another(cluster):
    async with cluster.gateway() as running:
        one, two, decode = await cluster.add(running, "prefill-0", "prefill-1", "decode-0")
        shared = Script(refuse=EngineFailed("no"))
        one.script = shared
        answers = [
            await running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
            for _ in range(4)
        ]
        assert all(answer.parse().choices[0].message.content == " 0 1" for answer in answers)
        assert all(receipt(answer)["prefill"] == "prefill-1" for answer in answers)
        assert len(two.jobs) == 4
        assert [job.attempt for job in decode.jobs] == [0] * 4  # decode only waited
        assert running.sample("baton_retries_total", phase="prefill") == len(one.jobs)


@pytest.mark.parametrize("announced", [True, False], ids=["its store says so", "pings find nobody"])
async def test_prefill_death_mid_prompt(cluster, announced):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        prefill.script = Script(hang=True)
        asking = asyncio.create_task(
            running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
        )
        await prefill.until(lambda w: w.jobs)
        (spare,) = await cluster.add(running, "prefill-1")
        await prefill.die()
        if announced:
            await announce_loss(cluster.url, "prefill-0")
        answer = await asking
        assert answer.parse().choices[0].message.content == " 0 1"
        assert (receipt(answer)["prefill"], receipt(answer)["retries"]) == ("prefill-1", 1)
        assert spare.jobs[0].lease == prefill.jobs[0].lease
        assert len(decode.jobs) == 1


async def test_a_prefill_worker_that_has_left_unheard(cluster):
    """NATS tells the decode worker alone that nobody listens; the gateway finds it as it finds any loss."""
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        await prefill.die()
        answer = await running.client.chat.completions.with_raw_response.create(
            model=MODEL, messages=HELLO, max_tokens=2
        )
        assert answer.parse().choices[0].message.content == " 0 1"
        assert receipt(answer)["path"] == "whole"
        assert not prefill.jobs
        await assert_nothing_left(running)


async def test_last_prefill_dies_and_decode_serves_whole(cluster):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        prefill.script = Script(hang=True)
        asking = asyncio.create_task(
            running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
        )
        await prefill.until(lambda w: w.jobs)
        await prefill.die()
        await announce_loss(cluster.url, "prefill-0")
        answer = await asking
        assert answer.parse().choices[0].message.content == " 0 1"
        assert receipt(answer)["path"] == "whole"
        assert [(job.attempt, job.prefill) for job in decode.jobs] == [(0, True), (1, False)]
        await decode.until(lambda w: w.cancels)
        assert decode.cancels == [(decode.jobs[0].request, 0)]


async def test_prefill_fails_after_decode_went_on_without_it(cluster):
    """A store that dies takes the hand-off from both sides: decode computes the prompt, and no error may reach it."""
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        go = asyncio.Event()
        prefill.script, decode.script = Script(hang=True), Script(pause_after=(1, go))
        stream = asyncio.create_task(
            running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, stream=True)
        )
        await prefill.until(lambda w: w.jobs)
        cluster.handoffs.lease(prefill.jobs[0].lease).set()
        chunks = await stream
        await anext(chunks)
        await prefill.die()
        await announce_loss(cluster.url, "prefill-0")
        await running.until(lambda _: running.sample("baton_retries_total", phase="prefill") == 1)
        go.set()
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])
        assert text == " 0 1 2"
        assert len(decode.jobs) == 1
        await assert_nothing_left(running)


async def test_decode_death_before_the_first_token(cluster):
    async with cluster.gateway() as running:
        prefill, first = await cluster.add(running, "prefill-0", "decode-0")
        first.script = Script(stall_after=0)
        asking = asyncio.create_task(
            running.client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, max_tokens=2)
        )
        await prefill.until(lambda w: w.jobs)
        (second,) = await cluster.add(running, "decode-1")
        await first.die()
        await announce_loss(cluster.url, "decode-0")
        answer = await asking
        assert answer.parse().choices[0].message.content == " 0 1"
        assert (receipt(answer)["decode"], receipt(answer)["retries"]) == ("decode-1", 1)
        assert second.jobs[0].attempt == 1
        assert running.sample("baton_retries_total", phase="decode") == 1


async def test_decode_death_mid_stream_is_one_clear_error(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(stall_after=1)
        stream = await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, stream=True)
        await anext(stream)
        await decode.die()
        with pytest.raises(openai.APIError) as failed:
            async for _ in stream:
                pass
        assert failed.value.code == "worker_lost"
        await assert_nothing_left(running)


async def test_stalled_stream(cluster):
    cluster.settings = {"progress_s": 0.5}
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(stall_after=1)
        with pytest.raises(openai.APIError) as failed:
            # With a seed its token is repeated, and that is no progress.
            await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, seed=1)
        assert failed.value.code == "worker_stalled"
        await decode.until(lambda w: len(w.cancels) == MAX_ATTEMPTS)


async def test_hole_and_strangers(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(wrong_attempt=True)
        answer = await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
        assert answer.choices[0].message.content == " 0 1 2"
        await decode.until(lambda w: (w.jobs[0].request, 7) in w.cancels)
        decode.script = Script(hole_after=1)
        with pytest.raises(openai.InternalServerError):
            await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, seed=1)


async def test_failure_row_before_and_after_the_first_token(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        failure = wire.Failure(code="engine_failed", message="the engine has died")
        decode.script = Script(fail_after=(1, failure))
        with pytest.raises(openai.InternalServerError) as failed:
            await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3, seed=1)
        assert failed.value.code == "engine_failed"
        assert len(decode.jobs) == MAX_ATTEMPTS
        decode.script = Script(fail_after=(0, failure))
        with pytest.raises(openai.InternalServerError):
            await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=3)
        assert len(decode.jobs) == 2 * MAX_ATTEMPTS


async def test_nobody_alive(cluster):
    async with cluster.gateway() as running:
        with pytest.raises(openai.InternalServerError) as failed:
            await running.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert failed.value.status_code == 503
        assert failed.value.code == "no_capacity"
        assert int(failed.value.response.headers["retry-after"]) >= 1


async def test_the_last_decode_worker_dies_with_a_line_before_it(cluster):
    """A worker that comes back in time still serves them; else they hear of it long before their queue time ends."""
    cluster.settings["queue_s"] = 600.0
    async with cluster.gateway() as running:
        (decode,) = await cluster.add(running, "decode-0")
        decode.script = Script(hang=True)
        asking = asyncio.create_task(running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2))
        await decode.until(lambda w: w.jobs)
        await decode.die()
        await announce_loss(cluster.url, "decode-0")
        with pytest.raises(openai.InternalServerError) as refused:
            await asking
        assert (refused.value.status_code, refused.value.code) == (503, "no_capacity")
        assert float(refused.value.response.headers["retry-after"]) >= 1
        await assert_nothing_left(running)


async def test_requests_wait_for_room(cluster):
    async with cluster.gateway() as running:
        (decode,) = await cluster.add(running, "decode-0")
        decode.beat = wire.Heartbeat(
            **{f: getattr(decode.beat, f) for f in decode.beat.__struct_fields__} | {"max_running": 1, "max_waiting": 0}
        )
        heard = running.deps.fleet.beats("decode-0")
        await running.until(lambda g: g.fleet.beats("decode-0") > heard + 1)
        answers = await asyncio.gather(
            *(running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2) for _ in range(5))
        )
        assert all(answer.choices[0].message.content == " 0 1" for answer in answers)
        assert {job.attempt for job in decode.jobs} == {0}  # nobody was sent where there was no room


@pytest.mark.parametrize(
    ("arrangement", "words", "path", "reason"),
    [
        ("unsplit", 300, "whole", "unsplit"),
        ("auto", 3, "whole", "short_prompt"),
        ("auto", 300, "split", "auto"),
        ("split", 3, "split", "split"),
    ],
)
async def test_arrangements(cluster, arrangement, words, path, reason):
    cluster.settings = {"arrangement": arrangement}
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        answer = await running.client.completions.with_raw_response.create(model=MODEL, prompt="a" * words)
        assert (receipt(answer)["path"], receipt(answer)["reason"]) == (path, reason)


async def test_cached_prompt_needs_no_prefill(cluster):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(cached_tokens=4)
        raw = await running.client.completions.with_raw_response.create(model=MODEL, prompt=[1, 2, 3, 4])
        assert prefill.jobs == []
        assert raw.parse().usage.prompt_tokens_details.cached_tokens == 3  # the last one is always computed
        assert receipt(raw)["reason"] == "cached"


async def test_a_trace_reaches_both_workers(cluster, tracing):
    async with cluster.gateway() as running:
        prefill, decode = await cluster.add(running, "prefill-0", "decode-0")
        trace_id = "0af7651916cd43dd8448eb211c80319c"
        await running.client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=2,
            extra_headers={"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"},
        )
        await running.until_idle()
        assert prefill.trace_ids == decode.trace_ids == [int(trace_id, 16)]
        spans = {span.name: span for span in tracing.get_finished_spans()}
        root = spans["gateway.request"]
        assert root.parent.span_id == 0xB7AD6B7169203331
        for name in ("gateway.admission", "gateway.queue"):
            assert spans[name].parent.span_id == root.context.span_id
        assert root.attributes["gen_ai.usage.output_tokens"] == 2


async def test_waiting_comments_and_headers(cluster):
    cluster.settings = {"header_wait_s": 0.2}
    async with cluster.gateway() as running:
        prefill, _ = await cluster.add(running, "prefill-0", "decode-0")
        prefill.script = Script(hang=True)
        body = {"model": MODEL, "messages": HELLO, "max_tokens": 1, "stream": True}
        async with (
            httpx.AsyncClient() as client,
            client.stream("POST", f"{running.url}/v1/chat/completions", json=body) as response,
        ):
            lines = response.aiter_lines()
            assert response.status_code == 200
            assert await anext(lines) == ": waiting"
            await prefill.die()
            await announce_loss(cluster.url, "prefill-0")
            rest = [line async for line in lines]
        assert rest[-2] == "data: [DONE]"


async def test_drain(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script = Script(stall_after=1)
        stream = await running.client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=9, stream=True)
        await anext(stream)
        draining = asyncio.create_task(drain(running.deps, 0.5))
        await asyncio.sleep(0)  # one step of the loop: the task has begun
        with pytest.raises(openai.InternalServerError) as refused:
            await running.client.chat.completions.create(model=MODEL, messages=HELLO)
        assert (refused.value.status_code, refused.value.code) == (503, "draining")
        with pytest.raises(openai.APIError) as cut:
            async for _ in stream:
                pass
        assert cut.value.code == "draining"
        await draining
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{running.url}/ready")).status_code == 503


async def test_what_is_not_hot(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        assert (await client.get("/health")).json() == {"status": "alive"}
        assert (await client.get("/ready")).status_code == 503
        await cluster.add(running, "decode-0")
        assert (await client.get("/ready")).status_code == 503  # split: a path has a prefill worker
        await cluster.add(running, "prefill-0")
        assert (await client.get("/ready")).json() == {"ready": True, "reason": None}
        assert (await client.get("/v1/models")).json()["data"][0]["max_model_len"] == 512
        assert (await client.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL
        missing = await client.get("/v1/models/other")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
        assert "baton_workers" in (await client.get("/metrics")).text
        document = (await client.get("/openapi.json")).json()
        assert {"/v1/chat/completions", "/v1/completions"} <= set(document["paths"])
        assert (await client.get("/nowhere")).json()["error"]["type"] == "invalid_request_error"
        assert (await client.get("/v1/completions")).status_code == 405


@pytest.mark.parametrize(
    ("status", "code", "param", "change"),
    [
        (404, "model_not_found", "model", {"model": "other"}),
        (400, "invalid_value", "temperature", {"temperature": 3}),
        (400, "unsupported_parameter", "tools", {"tools": [{}]}),
        (400, "context_length_exceeded", "max_tokens", {"max_tokens": 512}),
        (400, "context_length_exceeded", "messages", {"messages": [{"role": "user", "content": "x" * 600}]}),
        (400, "invalid_value", "messages", {"messages": [{"role": "developer", "content": "x"}]}),
        (413, "request_too_large", None, {"user": "x" * 5_000_000}),
    ],
)
async def test_error_shapes(cluster, status, code, param, change):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        body = {"model": MODEL, "messages": HELLO, **change}
        response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"]) == (code, param)
        assert response.headers["x-request-id"]
        assert decode.jobs == []
        assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="client_error") == 1


async def test_bad_request_id(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        response = await client.post("/v1/completions", json={}, headers={"x-request-id": "a b"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-id")
