"""Bad HTTP by name, byte for byte: an error in OpenAI's shape or a closed connection, never a 5xx, nothing in the log."""

import asyncio
import contextlib
import json
import logging

import pytest

from services.gateway.answer.connection import MAX_HEAD_BYTES, MAX_HEADERS, MAX_PIPELINED
from tests.support.gateway_cluster import Cluster, assert_nothing_left
from tests.support.raw_client import RawClient
from tests.support.running_gateway import MODEL

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PRIVATE = "do-not-log-me"
BODY_LIMIT = 10_000
GOOD = json.dumps({"model": MODEL, "prompt": PRIVATE, "max_tokens": 2}).encode()
LENGTH = f"content-length: {len(GOOD)}"
FOR_EVER_S = 300.0


def head(*headers: str, line: str = f"POST {COMPLETIONS} HTTP/1.1") -> bytes:
    return "\r\n".join([line, "host: x", *headers, "", ""]).encode("latin-1")


def get(path: str = "/health", method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return head(line=f"{method} {path} {version}")


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (*parts, b""))


CHUNKED = "transfer-encoding: chunked"
INVALID, LARGE, MEDIA = "invalid_value", "request_too_large", "unsupported_media_type"
OTHER = "invalid_request"

# name -> (what is sent, status, code)
BAD: dict[str, tuple[bytes, int, str]] = {
    "garbage": (b"\x00\x01\x02\xff hello\r\n\r\n", 400, INVALID),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), 400, INVALID),
    "a line without end": (b"GET /" + b"a" * 300_000, 431, "headers_too_large"),
    "a huge URL": (get("/" + "a" * 100_000), 431, "headers_too_large"),
    "a huge header": (head("x-a: " + "a" * 100_000), 431, "headers_too_large"),
    "a huge header's name": (head("a" * 100_000 + ": 1"), 431, "headers_too_large"),
    "a header without end": (head()[:-2] + b"x-a: " + b"a" * 1_000_000, 431, "headers_too_large"),
    "many headers": (head(*[f"x-{i}: 1" for i in range(MAX_HEADERS)]), 431, "headers_too_large"),
    "headers without end": (head()[:-2] + b"a:\r\n" * 100_000, 431, "headers_too_large"),
    "many small headers in the last chunk": (
        head()[:-2] + b"a:1\r\n" * MAX_HEADERS + b"\r\n",
        431,
        "headers_too_large",
    ),
    "a header of no token": (head("x a: 1"), 400, INVALID),
    "a NUL in a header": (head("x-a: a\0b"), 400, INVALID),
    "a bare line feed in a header": (head("x-a: a\x0bb\nx"), 400, INVALID),
    "a method in small letters": (get(method="get"), 400, INVALID),
    "no such method": (get(method="GRAB"), 400, INVALID),
    "CONNECT": (get("a:443", method="CONNECT"), 400, INVALID),
    "no such version": (get(version="HTTP/9.9"), 400, INVALID),
    "HTTP/2 with prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, INVALID),
    "not a path": (get("*", method="OPTIONS"), 404, OTHER),
    "a path of strange bytes": (b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n", 400, INVALID),
    "a negative length": (head("content-length: -5") + GOOD, 400, INVALID),
    "a length that is no number": (head("content-length: five") + GOOD, 400, INVALID),
    "a length with a sign": (head(f"content-length: +{len(GOOD)}") + GOOD, 400, INVALID),
    "an empty length": (head("content-length: ") + GOOD, 400, INVALID),
    "a length beyond 64 bits": (head("content-length: 99999999999999999999999") + GOOD, 400, INVALID),
    "two lengths": (head(LENGTH, "content-length: 1") + GOOD, 400, INVALID),
    "a length and chunks": (head(LENGTH, CHUNKED) + chunks(GOOD), 400, INVALID),
    "a transfer encoding of its own": (head("transfer-encoding: gzip") + GOOD, 400, INVALID),
    "a chunk of no size": (head(CHUNKED) + b"xyz\r\n", 400, INVALID),
    "a chunk of a negative size": (head(CHUNKED) + b"-1\r\nabc\r\n", 400, INVALID),
    "a chunk longer than it says": (head(CHUNKED) + b"1\r\nabcdef\r\n0\r\n\r\n", 400, INVALID),
    "a length over the limit": (head(f"content-length: {BODY_LIMIT + 1}"), 413, LARGE),
    "a length over it that waits to be asked": (
        head(f"content-length: {BODY_LIMIT + 1}", "expect: 100-continue"),
        413,
        LARGE,
    ),
    "a length of 2^63 - 1": (head(f"content-length: {2**63 - 1}"), 413, LARGE),
    "chunks over the limit": (head(CHUNKED) + chunks(*[b"x" * 1000] * 11), 413, LARGE),
    "a length shorter than the body": (head("content-length: 5") + GOOD, 400, INVALID),
    "a compressed body": (head(LENGTH, "content-encoding: gzip") + GOOD, 415, MEDIA),
    "a form": (head(LENGTH, "content-type: application/x-www-form-urlencoded") + GOOD, 415, MEDIA),
    "a form of parts": (head(LENGTH, "content-type: multipart/form-data; boundary=x") + GOOD, 415, MEDIA),
    "text": (head(LENGTH, "content-type: text/plain") + GOOD, 415, MEDIA),
    "a body behind a byte order mark": (
        head(f"content-length: {len(GOOD) + 3}") + b"\xef\xbb\xbf" + GOOD,
        400,
        INVALID,
    ),
    "a request id of strange letters": (head(LENGTH, "x-request-id: a b") + GOOD, 400, INVALID),
    "a request id of strange bytes": (head(LENGTH, "x-request-id: \xff\xfe") + GOOD, 400, INVALID),
    "a request id too long": (head(LENGTH, "x-request-id: " + "a" * 129) + GOOD, 400, INVALID),
    "no such path": (get("/v2/everything"), 404, OTHER),
    "no such model": (get("/v1/models/%00%ff%2e%2e"), 404, "model_not_found"),
    "a path out of the tree": (get("/../../etc/passwd"), 404, OTHER),
    "GET where POST belongs": (get(CHAT), 405, OTHER),
    "DELETE": (get(CHAT, method="DELETE"), 405, OTHER),
    "OPTIONS": (get(CHAT, method="OPTIONS"), 405, OTHER),
    "POST where GET belongs": (get("/v1/models", method="POST"), 405, OTHER),
    "a WebSocket": (
        head("connection: upgrade", "upgrade: websocket", "sec-websocket-version: 13", line=f"GET {CHAT} HTTP/1.1"),
        405,
        OTHER,
    ),
}


@pytest.fixture
async def running(nats_url, tiny_model, request):
    cluster = Cluster(nats_url, str(tiny_model))
    cluster.settings = {"max_body_bytes": BODY_LIMIT, "arrangement": "unsplit"}
    cluster.settings |= getattr(request, "param", {})
    async with cluster.gateway() as running:
        running.workers = await cluster.add(running, "decode-0")
        yield running
    for worker in running.workers:
        await worker.die()


def settings(**values):
    return pytest.mark.parametrize("running", [values], indirect=True, ids=[""])


def assert_error(answer, status: int, code: str) -> None:
    got, headers, body = answer
    assert (got, headers["content-type"]) == (status, "application/json")
    (error,) = json.loads(body).values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code


async def test_bad_http(running, caplog):
    """All of them against one gateway, each on a connection of its own."""
    caplog.set_level(logging.DEBUG)
    for name, (data, status, code) in BAD.items():
        async with RawClient(running.url) as client:
            with contextlib.suppress(ConnectionError):  # refused before everything was sent
                await client.send(data)
            try:
                assert_error(await client.answer(), status, code)
            except (AssertionError, EOFError, ConnectionError, TimeoutError) as error:
                pytest.fail(f"{name}: {error!r}")
    await assert_nothing_left(running)
    assert not running.workers[0].jobs
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert PRIVATE not in caplog.text
    assert "aaaaaaaa" not in caplog.text


GOOD_WAYS: dict[str, bytes] = {
    "in one piece": head(LENGTH) + GOOD,
    "in chunks": head(CHUNKED) + chunks(GOOD[:5], GOOD[5:]),
    "as JSON": head(LENGTH, "content-type: application/json; charset=utf-8") + GOOD,
    "asked first": head(LENGTH, "expect: 100-continue") + GOOD,
    "offering HTTP/2, as Java does": head(
        "connection: Upgrade, HTTP2-Settings",
        "upgrade: h2c",
        "http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
        LENGTH,
    )
    + GOOD,
    "offering a WebSocket": head("connection: upgrade", "upgrade: websocket", LENGTH) + GOOD,
    "in HTTP/1.0": head(LENGTH, line=f"POST {COMPLETIONS} HTTP/1.0") + GOOD,
    "with an absolute URL": head(LENGTH, line=f"POST http://x{COMPLETIONS}?a=b HTTP/1.1") + GOOD,
    "with a bad trace": head(LENGTH, "traceparent: 00-\xff\xfe-zz-01", "tracestate: \xff=,,;") + GOOD,
}


@pytest.mark.parametrize("name", GOOD_WAYS)
async def test_strange_http_that_is_served(running, name):
    async with RawClient(running.url) as client:
        await client.send(GOOD_WAYS[name])
        if "expect" in GOOD_WAYS[name].decode("latin-1"):
            assert (await client.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        status, _, body = await client.answer()
        assert (status, json.loads(body)["choices"][0]["text"]) == (200, " 0 1")


async def test_the_second_of_two_equal_names_wins(running):
    """As in every JSON reader that clients know."""
    content = GOOD[:-1] + b', "max_tokens": 1}'
    async with RawClient(running.url) as client:
        await client.send(head(f"content-length: {len(content)}") + content)
        _, _, body = await client.answer()
        assert json.loads(body)["choices"][0]["text"] == " 0"


async def test_a_stream_needs_chunks(running):
    content = GOOD[:-1] + b', "stream": true}'
    async with RawClient(running.url) as client:
        await client.send(head(f"content-length: {len(content)}", line=f"POST {COMPLETIONS} HTTP/1.0") + content)
        assert_error(await client.answer(), 400, INVALID)


async def test_requests_sent_ahead_are_answered_in_order(running):
    async with RawClient(running.url) as client:
        await client.send((head(LENGTH) + GOOD) * 3 + head("connection: close", line="GET /health HTTP/1.1"))
        data = await client.rest()
        assert data.count(b'" 0 1"') == 3
        assert data.endswith(b'{"status":"alive"}')


async def test_requests_sent_ahead_are_bounded(running):
    running.workers[0].script.hang = True
    async with RawClient(running.url) as client:
        await client.send((head(LENGTH) + GOOD) * (MAX_PIPELINED + 2))
        await client.rest()
    await assert_nothing_left(running)
    assert len(running.workers[0].jobs) <= 1
    assert running.sample("baton_connections_cut_total", reason=INVALID) == 1


@settings(header_wait_s=0.2, progress_s=FOR_EVER_S)
async def test_who_leaves_with_requests_sent_ahead_is_noticed(running):
    """By the first of them, too, though uvicorn tells the last only."""
    running.workers[0].script.pause_after = (1, asyncio.Event())
    async with RawClient(running.url) as client:
        await client.send((head(LENGTH) + GOOD) * 3)
        await running.workers[0].until(lambda worker: worker.jobs)
    await running.workers[0].until(lambda worker: worker.cancels)
    await assert_nothing_left(running)


async def test_garbage_behind_a_stream_does_not_get_into_it(running):
    content = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 20, "stream": True}).encode()
    running.workers[0].script.pause_after = (5, asyncio.Event())
    async with RawClient(running.url) as client:
        await client.send(head(f"content-length: {len(content)}") + content)
        seen = await client.until(b'" 4"')
        await client.send(b"\x00\x01\x02 garbage\r\n\r\n")
        seen += await client.rest()
    assert seen.count(b"HTTP/1.1") == 1
    await running.workers[0].until(lambda worker: worker.cancels)
    await assert_nothing_left(running)


async def test_an_error_before_the_end_of_the_body_can_be_read(running):
    """The client goes on sending; closing at once would destroy the answer on its way."""
    async with RawClient(running.url) as client:
        await client.send(head("content-length: 3000000"))
        for _ in range(30):
            await client.send(b"x" * 100_000)
        assert_error(await client.answer(), 413, LARGE)
        await client.send(head(LENGTH) + GOOD)
        assert (await client.answer())[0] == 200  # the connection is still good


@settings(header_s=0.3)
async def test_a_slow_head(running):
    async with RawClient(running.url) as silent, RawClient(running.url) as slow, RawClient(running.url) as later:
        await slow.send(head()[:-2])
        await later.send(get() + head()[:-2])
        assert (await later.answer())[0] == 200
        assert await silent.rest() == b""
        assert_error(await slow.answer(), 408, "request_timeout")
        assert_error(await later.answer(), 408, "request_timeout")
        assert await slow.rest() == b""
    assert running.sample("baton_connections_cut_total", reason="slow_head") == 2
    assert running.sample("baton_connections_cut_total", reason="idle") == 1


@settings(header_s=0.3)
async def test_a_stream_longer_than_a_head_may_take(running):
    """The next request's beginning waits behind it, and is not late."""
    release = asyncio.Event()
    running.workers[0].script.pause_after = (1, release)
    async with RawClient(running.url) as slow, RawClient(running.url) as client:
        await client.send(head(LENGTH) + GOOD + head()[:-2])
        await slow.send(head()[:-2])
        assert_error(await slow.answer(), 408, "request_timeout")
        release.set()
        assert (await client.answer())[0] == 200


@settings(body_s=0.3)
async def test_a_slow_body(running):
    async with RawClient(running.url) as client, RawClient(running.url) as chunked:
        await client.send(head(LENGTH) + GOOD[:-1])
        await chunked.send(head(CHUNKED) + chunks(GOOD)[:-5])
        assert_error(await client.answer(), 408, "request_timeout")
        assert_error(await chunked.answer(), 408, "request_timeout")
        assert await client.rest() == b""
    assert running.sample("baton_connections_cut_total", reason="slow_body") >= 1
    assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="client_error") == 2


@settings(max_bodies_bytes=2 * len(GOOD))
async def test_bodies_are_bounded_together(running):
    gauge = "baton_body_bytes"
    async with RawClient(running.url) as one, RawClient(running.url) as two, RawClient(running.url) as three:
        for client in (one, two):
            await client.send(head(LENGTH) + GOOD[:-1])
        await running.until(lambda _: running.sample(gauge) == 2 * len(GOOD) - 2)
        await three.send(head(LENGTH) + GOOD)
        answer = await three.answer()
        assert_error(answer, 429, "queue_full")
        assert int(answer[1]["retry-after"]) >= 1
        for client in (one, two):
            await client.send(GOOD[-1:])
            assert (await client.answer())[0] == 200
    await assert_nothing_left(running)
    assert running.sample(gauge) == 0


@settings(max_connections=3)
async def test_too_many_connections(running):
    async with RawClient(running.url) as one, RawClient(running.url) as two, RawClient(running.url) as three:
        for client in (one, two, three):
            await client.send(get())
            assert (await client.answer())[0] == 200
        assert running.sample("baton_connections") == 3
        async with RawClient(running.url) as four:
            answer = await four.answer()
            assert_error(answer, 503, "no_capacity")
            assert int(answer[1]["retry-after"]) >= 1
            assert await four.rest() == b""
        await three.send(get())
        assert (await three.answer())[0] == 200
    await running.until(lambda _: running.sample("baton_connections") == 0)
    assert running.sample("baton_connections_cut_total", reason="full") == 1


@settings(header_s=FOR_EVER_S)
async def test_idle_connections_hinder_nobody(running):
    count = 2000
    idle = []
    try:
        for _ in range(count):
            client = RawClient(running.url)
            idle.append(client)
            await client.__aenter__()
        await running.until(lambda _: running.sample("baton_connections") == count)
        answer = await running.client.completions.create(model=MODEL, prompt="a", max_tokens=2)
        assert answer.choices[0].text == " 0 1"
    finally:
        for client in idle:
            await client.__aexit__()
    await running.until(lambda _: running.sample("baton_connections") <= 1)  # the openai client keeps its own


async def test_who_leaves_while_sending_leaves_nothing(running):
    async with RawClient(running.url) as client:
        await client.send(head(LENGTH) + GOOD[:-1])
        await running.until(lambda gateway: gateway.running.requests)
    await assert_nothing_left(running)
    assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="cancelled") == 1
    assert MAX_HEAD_BYTES >= 16 * 1024  # cookies and tokens fit
