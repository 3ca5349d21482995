"""Clients that stop reading: the write blocks, memory stays bounded, the request is cancelled, nobody else waits."""

import asyncio

from tests.support.gateway_cluster import assert_nothing_left
from tests.support.raw_client import RawClient
from tests.support.running_gateway import MODEL

CHAT = "/v1/chat/completions"
# Far more events than the two kernel buffers and the server's own take; what the gateway holds as rows is not too much.
MUCH = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
    "n": 16,
    "max_tokens": 400,
}
STEPS = 300  # then the worker waits, so that its job still runs when the request ends
TOO_MUCH = MUCH | {"logprobs": True, "top_logprobs": 20}
TINY_BYTES = 2048
FOR_EVER_S = 300.0


def blocked(running):
    return lambda _: running.sample("baton_blocked_writes") == 1


async def served_beside(running) -> str:
    """Another client's whole stream."""
    stream = await running.client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_tokens=50, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


async def assert_cancelled(running, decode, reason: str) -> None:
    await decode.until(lambda worker: worker.cancels)
    await assert_nothing_left(running)
    assert set(decode.cancels) == {(decode.jobs[0].request, 0)}
    assert running.sample("baton_connections_cut_total", reason=reason) == 1
    assert running.sample("baton_cancelled_total", stage="streaming") == 1
    assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="cancelled") == 1
    assert running.sample("baton_blocked_writes") == 0


async def test_a_blocked_write_ends_at_its_deadline(cluster):
    cluster.settings = {"write_s": 0.5}
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script.pause_after = (STEPS, asyncio.Event())
        async with RawClient(running.url, receive_buffer_bytes=TINY_BYTES) as client:
            await client.post(CHAT, MUCH)
            await running.until(blocked(running))
            await assert_cancelled(running, decode, "slow_reader")
            assert b"[DONE]" not in await client.rest()


async def test_nobody_waits_for_who_does_not_read(cluster):
    cluster.settings = {"write_s": FOR_EVER_S}
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script.pause_after = (STEPS, asyncio.Event())
        async with RawClient(running.url, receive_buffer_bytes=TINY_BYTES) as client:
            await client.post(CHAT, MUCH)
            await running.until(blocked(running))
            (request,) = running.deps.running.requests
            assert not request.connection.flows
            assert await served_beside(running) == "".join(f" {step}" for step in range(50))
            assert running.sample("baton_blocked_writes") == 1
            assert not decode.cancels
        await decode.until(lambda worker: worker.cancels)  # the client has left
        await assert_nothing_left(running)


async def test_who_reads_is_written_to_as_it_comes(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        go_on = asyncio.Event()
        decode.script.pause_after = (3, go_on)
        stream = await running.client.completions.create(model=MODEL, prompt="hi", max_tokens=6, stream=True)
        texts = [(await anext(stream)).choices[0].text for _ in range(3)]
        (request,) = running.deps.running.requests
        assert request.connection.flows
        go_on.set()
        texts += [chunk.choices[0].text async for chunk in stream]
        assert "".join(texts) == " 0 1 2 3 4 5"
        await assert_nothing_left(running)


async def test_rows_that_nobody_takes_are_bounded(cluster):
    """Long before the write's deadline."""
    cluster.settings = {"write_s": FOR_EVER_S}
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        decode.script.pause_after = (STEPS + 90, asyncio.Event())
        async with RawClient(running.url, receive_buffer_bytes=TINY_BYTES) as client:
            await client.post(CHAT, TOO_MUCH)
            await assert_cancelled(running, decode, "overrun")


async def test_an_answer_that_nobody_takes_ends(cluster):
    """One body, all of it in the server's buffer when the request is over."""
    cluster.settings = {"write_s": 0.5}
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        async with RawClient(running.url, receive_buffer_bytes=TINY_BYTES) as client:
            await client.post(CHAT, TOO_MUCH | {"stream": False}, "connection: close")
            await running.until(lambda _: running.sample("baton_connections_cut_total", reason="slow_reader") == 1)
            await running.until(lambda _: running.sample("baton_connections") == 0)
            await assert_nothing_left(running)


async def test_a_slow_client_that_does_read_gets_all(cluster):
    """Blocked for a while is not stopped."""
    cluster.settings = {"write_s": FOR_EVER_S}
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        async with RawClient(running.url, receive_buffer_bytes=TINY_BYTES) as client:
            await client.post(CHAT, MUCH, "connection: close")
            await running.until(blocked(running))
            data = await client.rest()
            assert data.count(b'"finish_reason":"length"') == MUCH["n"]
            assert data.count(b"data: [DONE]") == 1
        await assert_nothing_left(running)
        assert running.sample("baton_blocked_writes") == 0
