"""Keys, tiers, models, limits and the account of usage, through real HTTP, NATS and Redis, with fake workers."""

import asyncio
import logging
import time

import httpx
import openai
import pytest
from redis import Redis

from services.gateway.access.buckets import Amount
from services.gateway.access.shared_buckets import KEEP_S, bucket_name
from services.gateway.gateway import not_ready
from services.launcher import plan
from shared import wire
from shared.access import key_table, usage_table
from shared.access.connection import open_redis
from shared.access.usage_table import UsageRow, Used
from shared.prefix_index import KEY_TTL_S, block_name, nodes_name
from shared.telemetry import GATEWAY_REQUEST
from tests.support.fake_workers import Script
from tests.support.gateway_cluster import assert_nothing_left
from tests.support.keyed import Keyed, parts, until_beats, until_keys
from tests.support.redis import RedisServer
from tests.support.running_gateway import MODEL, WAIT_S
from tests.support.tracing import watch_spans

HELLO = [{"role": "user", "content": "hello"}]
PROMPT = [1, 2, 3, 4]


@pytest.fixture
def keyed(cluster, tmp_path, redis_server):
    return Keyed(cluster, tmp_path / "keys.yaml", redis_server.url)


async def ask(client: openai.AsyncOpenAI, max_tokens: int = 2, **more):
    return await client.completions.with_raw_response.create(model=MODEL, prompt=PROMPT, max_tokens=max_tokens, **more)


def code(error: openai.APIStatusError) -> str:
    return error.body["code"]


# ---- who may come in ---------------------------------------------------------------------------------------


async def test_the_official_client_learns_what_is_wrong(keyed):
    keyed.add("good")
    keyed.add("flexible", tiers=["flex"])
    keyed.add("elsewhere", models=["another"])
    async with keyed.gateway() as running:
        await keyed.cluster.add(running, "prefill-0", "decode-0")
        assert (await ask(keyed.client(running, "good"))).parse().choices[0].text == " 0 1"
        with pytest.raises(openai.AuthenticationError) as wrong:
            await ask(running.client)
        assert code(wrong.value) == "invalid_api_key"
        assert wrong.value.response.headers["www-authenticate"] == 'Bearer realm="baton"'
        with pytest.raises(openai.PermissionDeniedError) as tier:
            await ask(keyed.client(running, "flexible"))
        assert (code(tier.value), tier.value.param) == ("tier_not_allowed", "service_tier")
        await ask(keyed.client(running, "flexible"), extra_body={"service_tier": "flex"})
        with pytest.raises(openai.PermissionDeniedError):
            await ask(keyed.client(running, "good"), extra_body={"service_tier": "priority"})
        with pytest.raises(openai.NotFoundError) as model:
            await ask(keyed.client(running, "elsewhere"))
        assert (code(model.value), model.value.param) == ("model_not_found", "model")
        assert [one.id async for one in keyed.client(running, "elsewhere").models.list()] == []
        with pytest.raises(openai.NotFoundError):
            await keyed.client(running, "elsewhere").models.retrieve(MODEL)
        assert [one.id async for one in keyed.client(running, "good").models.list()] == [MODEL]
        assert (await keyed.client(running, "good").models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.AuthenticationError):
            await running.client.models.list()
        await assert_nothing_left(running)


async def test_the_document_says_who_needs_a_key(keyed):
    keyed.add("good")
    async with keyed.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        document = (await client.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
        asked = {path for path, one in document["paths"].items() if all("security" in what for what in one.values())}
        assert asked == {path for path in document["paths"] if path.startswith("/v1/")} != set()
        assert document["paths"]["/v1/models"]["get"]["responses"].keys() >= {"200", "401", "403"}
    async with keyed.cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        assert "securitySchemes" not in (await client.get("/openapi.json")).json()["components"]


async def test_tenants_share_no_kv_blocks(keyed):
    keyed.add("one", tenant="a")
    keyed.add("two", tenant="a")
    keyed.add("three", tenant="b")
    async with keyed.gateway(arrangement="split") as running:
        prefill, decode = await keyed.cluster.add(running, "prefill-0", "decode-0")
        for name in ("one", "two", "three"):
            await ask(keyed.client(running, name))
        one, two, three = (job.salt for job in decode.jobs)
        assert one == two != three
        assert len(one) == 16
        assert [job.salt for job in prefill.jobs] == [one, two, three]
    async with keyed.gateway(tenant_secret="of the cluster") as running:  # noqa: S106
        await running.until(lambda gateway: gateway.fleet.beats("decode-0"))
        await ask(keyed.client(running, "one"))
        assert decode.jobs[3].salt not in {one, three, b""}


async def test_a_client_s_own_salt_divides_its_tenant_s_blocks_and_reaches_no_other_s(keyed):
    keyed.add("one", tenant="a")
    keyed.add("three", tenant="b")
    async with keyed.gateway() as running:
        (decode,) = await keyed.cluster.add(running, "decode-0")
        for name, own in (("one", None), ("one", "x"), ("one", "x"), ("one", "y"), ("three", "x")):
            await ask(keyed.client(running, name), extra_body={"cache_salt": own} if own else {})
        plain, x, again, y, other = (job.salt for job in decode.jobs)
        assert x == again
        assert len({plain, x, y, other}) == 4
        assert all(len(salt) == 16 for salt in (x, y, other))
    async with keyed.cluster.gateway() as running:  # without keys
        await running.until(lambda gateway: gateway.fleet.beats("decode-0"))
        for own in (None, "x", "y"):
            await ask(running.client, extra_body={"cache_salt": own} if own else {})
        salts = [job.salt for job in decode.jobs[5:]]
        assert salts[0] == b""
        assert len(set(salts)) == 3


async def test_no_body_is_read_of_a_stranger(keyed):
    async with keyed.gateway() as running, asyncio.timeout(WAIT_S):
        await keyed.cluster.add(running, "decode-0")  # by then the server listens
        reader, writer = await asyncio.open_connection("127.0.0.1", int(running.url.rpartition(":")[2]))
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401")
        writer.close()


async def test_what_is_open_and_what_is_not(keyed):
    keyed.add("good")
    bearer = {"authorization": f"Bearer {keyed.secrets['good']}"}
    forwarded = {"forwarded": "for=203.0.113.7"}
    async with keyed.gateway() as running, httpx.AsyncClient(base_url=running.url, timeout=WAIT_S) as client:
        await keyed.cluster.add(running, "decode-0")  # by then the server listens

        async def status(path, headers=None):
            return (await client.get(path, headers=headers)).status_code

        assert await status("/health", forwarded) == 200
        assert await status("/ready", forwarded) == 200
        assert await status("/metrics") == 200
        assert await status("/metrics", forwarded) == 401
        assert await status("/metrics", {"x-forwarded-for": "203.0.113.7"}) == 401
        assert await status("/metrics", forwarded | bearer) == 200
        assert await status("/openapi.json", forwarded) == 401
        assert await status("/nowhere", forwarded) == 401
        assert await status("/v1/models") == 401
        assert await status("/v1/nowhere") == 401
        assert await status("/v1/nowhere", bearer) == 404


async def test_a_revoked_key_and_a_new_one_are_known_without_a_restart(keyed):
    keyed.add("old")
    async with keyed.gateway() as running:
        await keyed.cluster.add(running, "prefill-0", "decode-0")
        await ask(keyed.client(running, "old"))
        keyed.add("new")
        await until_keys(running, lambda: len(parts(running).keyring) == 2)
        keyed.revoke("old")
        await until_keys(running, lambda: len(parts(running).keyring) == 1)
        await ask(keyed.client(running, "new"))
        with pytest.raises(openai.AuthenticationError):
            await ask(keyed.client(running, "old"))


async def test_a_bad_edit_changes_nothing(keyed):
    keyed.add("good")
    async with keyed.gateway() as running:
        await keyed.cluster.add(running, "prefill-0", "decode-0")
        good = keyed.path.read_text()
        keyed.path.write_text(good + "more: nonsense")
        await until_keys(running, lambda: running.sample("baton_api_keys_stale") == 1)
        await ask(keyed.client(running, "good"))
        keyed.path.write_text(good)
        keyed.add("another")
        await until_keys(running, lambda: len(parts(running).keyring) == 2)
        assert running.sample("baton_api_keys_stale") == 0


async def test_keys_in_redis(keyed, redis_server):
    """Before they can be read nobody is let in; while Redis is away the known ones go on, also when it has forgotten."""
    redis_server.stop()
    first, second = keyed.made("first"), keyed.made("second")
    async with keyed.gateway(keys="redis") as running:
        await keyed.cluster.add(running, "prefill-0", "decode-0")
        with pytest.raises(openai.InternalServerError) as nothing:
            await ask(keyed.client(running, "first"))
        assert (nothing.value.status_code, code(nothing.value)) == (503, "keys_unavailable")
        assert "API keys" in not_ready(running.deps)
        redis_server.start()
        store = open_redis(redis_server.url)
        await key_table.add(store, "test", first)
        await until_keys(running, lambda: len(parts(running).keyring) == 1)
        assert not_ready(running.deps) is None
        await ask(keyed.client(running, "first"))
        await key_table.add(store, "test", second)
        await until_keys(running, lambda: len(parts(running).keyring) == 2)
        assert await key_table.revoke(store, "test", "first")
        assert not await key_table.revoke(store, "test", "first")
        await until_keys(running, lambda: len(parts(running).keyring) == 1)
        with pytest.raises(openai.AuthenticationError):
            await ask(keyed.client(running, "first"))
        redis_server.stop()
        await until_keys(running, lambda: running.sample("baton_api_keys_stale") == 1)
        await ask(keyed.client(running, "second"))
        redis_server.start()
        await until_keys(running, lambda: "forgotten" in parts(running).keyring._complaint)
        await ask(keyed.client(running, "second"))
        await store.aclose()


async def test_one_entry_that_cannot_be_used_leaves_the_others(keyed, redis_server):
    store = open_redis(redis_server.url)
    await key_table.add(store, "test", keyed.made("good"))
    await store.hset(key_table.table_name("test"), "bad", b"\xc1")
    table = await key_table.read(store, "test")
    assert [key.id for key in table.keys] == ["good"]
    assert table.complaints == ["key bad: not MessagePack"]
    await store.aclose()


# ---- limits ------------------------------------------------------------------------------------------------


async def outcomes(clients, count: int) -> tuple[int, list[openai.RateLimitError]]:
    """How many of `count` requests, spread over the clients and sent at once, were let in; and the refusals."""
    answers = await asyncio.gather(
        *(ask(clients[number % len(clients)], 1) for number in range(count)), return_exceptions=True
    )
    refused = [one for one in answers if isinstance(one, openai.RateLimitError)]
    others = [one for one in answers if isinstance(one, Exception) and one not in refused]
    assert others == []
    return count - len(refused), refused


async def test_two_gateways_share_one_limit_exactly(keyed):
    keyed.add("both", requests_per_minute=20)
    async with keyed.gateway("gateway-0") as one, keyed.gateway("gateway-1") as two:
        for running in (one, two):
            await keyed.cluster.add(running, f"decode-{running.deps.settings.id}")
        began = time.monotonic()
        admitted, refused = await outcomes([keyed.client(one, "both"), keyed.client(two, "both")], 60)
        flowed_in = (time.monotonic() - began) * 20 / 60
        assert 20 <= admitted <= 20 + flowed_in
        assert one.sample("baton_quota_shares_total") == two.sample("baton_quota_shares_total") == 0
        assert one.sample("baton_shed_total", reason="rate_limited") > 0
        assert two.sample("baton_shed_total", reason="rate_limited") > 0
        error = refused[0]
        assert (error.status_code, code(error)) == (429, "rate_limited")
        assert "requests" in error.body["message"]
        headers = error.response.headers
        assert 1 <= int(headers["retry-after"]) <= 3
        assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("20", "0")
        assert "x-ratelimit-limit-tokens" not in headers


def in_bucket(server: RedisServer, key_id: str, what: str = "tokens") -> float:
    with Redis(unix_socket_path=str(server.path)) as redis:
        return float(redis.hget(bucket_name("test", key_id), what))


async def eventually(true, what: str) -> None:
    """For what nothing announces."""
    async with asyncio.timeout(WAIT_S):
        while not true():  # noqa: ASYNC110, RUF100 - see above
            await asyncio.sleep(0.01)


async def test_tokens_are_charged_at_the_door_and_given_back_when_not_used(keyed, redis_server):
    keyed.add("tokens", tokens_per_minute=1000)
    gate = asyncio.Event()
    broken = wire.Failure(code="kv_mismatch", message="broken")  # which nobody tries again
    async with keyed.gateway() as running:
        (worker,) = await keyed.cluster.add(running, "decode-0")
        client = keyed.client(running, "tokens")
        worker.script = Script(pause_after=(0, gate), fail_after=(3, broken))
        asking = asyncio.create_task(ask(client, 400))
        await worker.until(lambda w: len(w.jobs) == 1)
        assert in_bucket(redis_server, "tokens") == 1000 - 404
        with pytest.raises(openai.RateLimitError, match="tokens") as refused:
            await ask(client, 450, n=2, seed=1)
        wait_s = (904 - 596) / 1000 * 60  # less what has flowed in
        assert 1 <= float(refused.value.response.headers["retry-after"]) <= wait_s + 1
        worker.script = Script()
        gate.set()
        with pytest.raises(openai.InternalServerError):
            await asking
        # The prompt's 4 tokens and the 3 that came stay charged.
        await eventually(lambda: in_bucket(redis_server, "tokens") >= 1000 - 7, "given back")
        answer = await ask(client, 400)
        headers = answer.headers
        assert headers["x-ratelimit-limit-tokens"] == "1000"
        assert 1000 - 7 - 404 <= int(headers["x-ratelimit-remaining-tokens"]) <= 1000 - 404
        assert headers["x-ratelimit-reset-tokens"].endswith("s")
        await eventually(lambda: in_bucket(redis_server, "tokens") >= 1000 - 7 - 404, "given back")
        await assert_nothing_left(running)


async def test_a_refusal_costs_nothing_and_a_client_that_leaves_pays_what_was_done(keyed, redis_server):
    keyed.add("both", requests_per_minute=10, tokens_per_minute=1000)
    async with keyed.gateway() as running:
        client = keyed.client(running, "both")
        with pytest.raises(openai.InternalServerError) as nobody:
            await ask(client, 100)
        assert code(nobody.value) == "no_capacity"
        await eventually(lambda: in_bucket(redis_server, "both") == 1000, "all tokens are back")
        assert in_bucket(redis_server, "both", "requests") == 10
        (worker,) = await keyed.cluster.add(running, "decode-0")
        worker.script = Script(stall_after=2)
        stream = await client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100, stream=True)
        await anext(stream)
        await stream.close()
        await worker.until(lambda w: w.cancels)
        await running.until_idle()
        await eventually(lambda: in_bucket(redis_server, "both") > 1000 - 104, "tokens are back")
        assert in_bucket(redis_server, "both", "requests") < 10
        assert parts(running).usage._pending[usage_table.today(), "acme", MODEL].prompt == 4


async def test_a_request_that_no_bucket_can_hold_is_told_so(keyed):
    keyed.add("small", tokens_per_minute=300)
    async with keyed.gateway() as running:
        await keyed.cluster.add(running, "decode-0")
        client = keyed.client(running, "small")
        with pytest.raises(openai.BadRequestError, match="304 tokens, and its key 300") as never:
            await ask(client, 300)
        assert code(never.value) == "exceeds_quota"
        assert "retry-after" not in never.value.response.headers
        # No bound was given, and the context (512) does not fit: it takes the whole bucket.
        answer = await client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
        assert answer.headers["x-ratelimit-remaining-tokens"] == "0"
        with pytest.raises(openai.RateLimitError):  # it made more than that, so the bucket is in debt
            await ask(client, 1)


async def test_without_redis_each_gateway_takes_its_share(keyed, redis_server):
    keyed.add("shared", requests_per_minute=20)
    keyed.add("unseen", requests_per_minute=20)
    keyed.add("unlimited")
    async with keyed.gateway("gateway-0") as one, keyed.gateway("gateway-1") as two:
        for running in (one, two):
            await keyed.cluster.add(running, f"decode-{running.deps.settings.id}")
        await until_beats(one, two)
        clients = [keyed.client(running, "shared") for running in (one, two)]
        began = time.monotonic()
        assert (await outcomes(clients, 8))[0] == 8
        for client in clients:
            await ask(client)
        redis_server.stop()
        # One has heard that eleven are left, the other that ten are.
        admitted, refused = await outcomes(clients, 40)
        flowed_in = (time.monotonic() - began) * 20 / 60
        assert 10 <= admitted <= 10.5 + flowed_in
        assert len(refused) > 0
        admitted, _ = await outcomes([keyed.client(one, "unseen")], 30)
        assert 10 <= admitted <= 10 + flowed_in
        assert (await outcomes([keyed.client(one, "unlimited")], 30))[0] == 30
        for running in (one, two):
            assert running.sample("baton_quota_fallback") == 1
            assert running.sample("baton_quota_shares_total") > 0
        redis_server.start()
        for running in (one, two):
            client = keyed.client(running, "unseen")

            async def asks_redis(running=running, client=client) -> None:
                while running.sample("baton_quota_fallback"):
                    await outcomes([client], 1)

            await asyncio.wait_for(asks_redis(), WAIT_S)
        assert in_bucket(redis_server, "unseen", "requests") < 20


async def test_a_redis_that_hangs_keeps_nobody_waiting(keyed, redis_server):
    keyed.add("one", requests_per_minute=20)
    async with keyed.gateway() as running:
        await keyed.cluster.add(running, "decode-0")
        client = keyed.client(running, "one")
        await ask(client)
        with redis_server.hanging():
            answers = await asyncio.wait_for(outcomes([client], 10), WAIT_S)
            assert answers == (10, [])
            assert running.sample("baton_quota_fallback") == 1
            asked = running.sample("baton_quota_shares_total")
        assert asked == 10


async def test_what_was_taken_for_a_client_that_has_left_meanwhile_is_given_back(keyed, redis_server):
    keyed.add("one", requests_per_minute=10)
    async with keyed.gateway() as running:
        client = parts(running).keyring.client(f"Bearer {keyed.secrets['one']}".encode())
        quotas = parts(running).quotas
        asking = asyncio.create_task(quotas.take(running.deps.background, client, Amount(10, 0)))
        await asyncio.sleep(0)  # it has asked
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        taken = await quotas.take(running.deps.background, client, Amount(0, 0))
        assert taken.left.requests < 1  # Redis has seen it
        await eventually(lambda: in_bucket(redis_server, "one", "requests") == 10, "given back")


# ---- what was used -----------------------------------------------------------------------------------------


async def rows(server: RedisServer) -> list[UsageRow]:
    redis = open_redis(server.url)
    try:
        return await usage_table.read(redis, "test", [usage_table.today()])
    finally:
        await redis.aclose()


async def test_usage_is_kept_by_tenant_and_outlives_an_absence_of_redis(keyed, redis_server):
    keyed.add("a", "acme")
    keyed.add("b", "beta")
    async with keyed.gateway() as running:
        (worker,) = await keyed.cluster.add(running, "decode-0")
        worker.script = Script(usage=wire.DecodeUsage(completion_tokens=2, engine_cached_tokens=3))
        redis_server.stop()
        for name in ("a", "a", "b"):
            await ask(keyed.client(running, name))
        assert not await parts(running).usage.flush()
        assert running.sample("baton_usage_pending") == 2
        await ask(keyed.client(running, "b"))
        redis_server.start()
        assert running.sample("baton_tokens_total", tenant="beta", model=MODEL, kind="prompt") == 8
    day = usage_table.today()
    assert await rows(redis_server) == [
        UsageRow(day=day, tenant=who, model=MODEL, used=Used(requests=2, prompt=8, cached=6, completion=4))
        for who in ("acme", "beta")
    ]
    with Redis(unix_socket_path=str(redis_server.path)) as redis:
        assert redis.ttl(usage_table.day_name("test", day)) > 399 * 86_400


async def test_what_does_not_fit_is_counted(keyed):
    async with keyed.gateway() as running:
        usage = parts(running).usage
        usage._max_pending = 2
        for who in ("a", "b", "c", "a"):
            usage.add(who, MODEL, Used(requests=1))
        assert len(usage) == 2
        assert running.sample("baton_usage_dropped_total") == 1


def test_a_crowded_redis_gives_up_the_prefix_index_only(tmp_path):
    """What expires soonest goes first: keys of the index, long before buckets and usage; keys of clients never."""
    server = RedisServer(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", plan.EVICTION)
    server.start()
    try:
        with Redis(unix_socket_path=str(server.path)) as redis:
            kept = {key_table.table_name("test"): None, nodes_name("test"): None}
            kept |= {bucket_name("test", f"key-{number}"): KEEP_S for number in range(20)}
            kept |= {usage_table.day_name("test", f"2026-01-{number:02}"): usage_table.KEEP_S for number in range(20)}
            for name, expires_s in kept.items():
                redis.hset(name, "a", 1)
                if expires_s:
                    redis.expire(name, expires_s)
            for batch in range(60):
                pipe = redis.pipeline(transaction=False)
                for number in range(1000):
                    name = block_name("test", f"{batch}-{number}".encode())
                    pipe.setbit(name, 7, 1)
                    pipe.expire(name, KEY_TTL_S)
                pipe.execute()
            assert redis.info("stats")["evicted_keys"] > 10_000
            assert [name for name in kept if not redis.exists(name)] == []
    finally:
        server.stop()


async def test_no_key_is_in_logs_spans_metrics_or_redis(keyed, redis_server, caplog):
    caplog.set_level(logging.DEBUG)
    spans = watch_spans()
    keyed.add("good", requests_per_minute=1)
    secret = keyed.secrets["good"]
    async with keyed.gateway() as running:
        await keyed.cluster.add(running, "decode-0")
        await ask(keyed.client(running, "good"))
        with pytest.raises(openai.RateLimitError):
            await ask(keyed.client(running, "good"))
        with pytest.raises(openai.AuthenticationError) as wrong:
            await ask(running.client.with_options(api_key=secret[:-1]))
        assert await parts(running).usage.flush()
        async with httpx.AsyncClient() as client:
            metrics = (await client.get(f"{running.url}/metrics")).text
    tenants = [
        span.attributes.get("baton.tenant") for span in spans.get_finished_spans() if span.name == GATEWAY_REQUEST
    ]
    assert tenants[:2] == ["acme", "acme"]
    assert "acme" in metrics
    with Redis(unix_socket_path=str(redis_server.path)) as redis:
        stored = str([(name, redis.hgetall(name)) for name in redis.scan_iter()])
    assert "acme" in stored
    shown = [span.to_json() for span in spans.get_finished_spans()]
    for text in (caplog.text, str(shown), metrics, stored, wrong.value.response.text):
        assert secret[len("sk-baton-") : -1] not in text
