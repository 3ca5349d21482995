"""The dashboard over real HTTP and NATS: its files, who may see its figures, and what they say of fake workers."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import httpx
import openai
import pytest

from services.gateway.observe.dashboard.feed import MAX_VIEWERS
from shared import wire
from shared.settings import Target, Targets
from tests.support.fake_workers import announce_loss
from tests.support.keyed import Keyed, parts
from tests.support.running_gateway import MODEL, WAIT_S

MAX_PAGE_BYTES = 150 * 1024


@asynccontextmanager
async def watching(running, headers=None):
    """Gives an async iterator of (event, data)."""
    url = f"{running.url}/dashboard/events"
    async with httpx.AsyncClient(timeout=WAIT_S, headers=headers) as client, client.stream("GET", url) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield events(answer)


async def events(answer):
    name = ""
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


async def frame_where(stream, condition) -> dict:
    async with asyncio.timeout(WAIT_S):
        async for name, data in stream:
            if name == "now" and condition(data):
                return data
    raise AssertionError("the stream ended")


def states(frame) -> dict[str, str]:
    return {row["id"]: row["state"] for row in frame["services"]}


async def ticked(feed) -> None:
    await feed.report(time.monotonic())
    feed.tick(time.monotonic())


async def ask(running, **more):
    return await running.client.completions.create(model=MODEL, prompt=[7, 8, 9], max_tokens=4, **more)


# ---- the page ------------------------------------------------------------------------------------------------


async def test_the_page_is_small_and_runs_nothing_from_elsewhere(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        page = await client.get("/dashboard")
        assert page.status_code == 200
        names = {part.split('"')[0] for part in page.text.split("/dashboard/assets/")[1:]}
        files, seen = {}, set()
        while names - seen:
            name = (names - seen).pop()
            seen.add(name)
            files[name] = await client.get(f"/dashboard/assets/{name}")
            assert files[name].status_code == 200, name
            names |= {part.split('"')[0] for part in files[name].text.split('from "./')[1:]}
        assert {"app.js", "trace.js", "chat.js", "page.css"} <= seen
        whole = [page, *files.values()]
        assert sum(len(one.content) for one in whole) < MAX_PAGE_BYTES
        for one in whole:
            policy = one.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert one.headers["x-frame-options"] == "DENY"
            assert "//" not in one.text.replace("http://www.w3.org", "").replace("// ", "")
        assert "<script>" not in page.text
        assert " style=" not in page.text
        again = await client.get("/dashboard", headers={"if-none-match": page.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (await client.get("/dashboard/assets/routes.py")).status_code == 404


# ---- figures -------------------------------------------------------------------------------------------------


async def test_traffic_and_workers_are_shown(cluster):
    cluster.settings = {"targets": Targets(flex=Target(ttft_s=1e-9))}
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0", engine="fake")
        async with watching(running) as stream:
            name, history = await anext(stream)
            assert name == "history"
            assert len(history["ttft_ms"]["p99"]) == 180
            frame = await frame_where(stream, lambda frame: states(frame).get("gateway-0") == "ready")
            assert states(frame) == {"gateway-0": "ready", "prefill-0": "ready", "decode-0": "ready"}
            await ask(running)
            await ask(running, extra_body={"service_tier": "flex"})
            asked_at = time.monotonic()
            frame = await frame_where(stream, lambda frame: frame["ended"] == 2)
            assert time.monotonic() - asked_at < WAIT_S
            minute = frame["minute"]
            assert minute["requests"] == {"ok": 2}
            assert minute["tokens"] == {"prompt": 6, "completion": 8}
            assert minute["goodput_by_tier"] == {"default": 1.0, "flex": 0.0}
            assert minute["ttft_ms"]["p50"] > 0
            assert frame["rates"]["requests"] > 0
            assert frame["targets"]["default"]["ttft_s"] == 2.0


async def test_a_lost_worker_stays_and_says_so(cluster):
    async with cluster.gateway() as running:
        _, decode = await cluster.add(running, "prefill-0", "decode-0")
        async with watching(running) as stream:
            await frame_where(stream, lambda frame: states(frame).get("decode-0") == "ready")
            await decode.die()
            await announce_loss(cluster.url, "decode-0")
            frame = await frame_where(stream, lambda frame: states(frame).get("decode-0") == "lost")
            assert states(frame)["prefill-0"] == "ready"
            with pytest.raises(openai.InternalServerError):
                await ask(running)
            frame = await frame_where(stream, lambda frame: frame["ended"] == 1)
            assert frame["quarter"]["shed"] == {"no_capacity": 1}
            assert frame["quarter"]["goodput"] == 0.0
            assert states(frame)["decode-0"] == "lost"


async def test_kv_bytes_come_with_the_stores_beats(cluster):
    async with cluster.gateway() as running, watching(running) as stream:
        feed = running.gateway.dashboard
        for moved in (1000, 5000):
            beat = wire.Heartbeat(
                role="kv", id="kv-0", incarnation="1", slots={"free": 2}, moved_bytes={"local": moved}
            )
            feed.hear(beat, time.monotonic())
            await ticked(feed)
        frame = await frame_where(stream, lambda frame: frame["minute"]["moved"])
        assert frame["minute"]["moved"] == {"local": 4000}


async def test_gateways_tell_each_other(cluster, nats_url, tmp_path, redis_server):
    keyed = Keyed(cluster, tmp_path / "keys.yaml", redis_server.url)
    keyed.add("good")
    headers = {"authorization": f"Bearer {keyed.secrets['good']}"}
    async with keyed.gateway("gateway-0") as one, keyed.gateway("gateway-1") as other:
        await cluster.add(one, "prefill-0", "decode-0")
        await other.until(lambda gateway: gateway.fleet.beats("decode-0"))
        async with watching(other, headers) as stream:
            await frame_where(stream, lambda frame: {"gateway-0", "gateway-1"} <= set(states(frame)))
            client = keyed.client(one, "good")
            await client.completions.create(model=MODEL, prompt=[7, 8], max_tokens=3)
            frame = await frame_where(stream, lambda frame: frame["ended"] == 1)
            assert frame["minute"]["tokens"] == {"prompt": 2, "completion": 3}
            assert frame["gateway"] == "gateway-1"


# ---- who may watch -------------------------------------------------------------------------------------------


async def test_with_keys_the_page_is_open_and_its_figures_are_not(cluster, tmp_path, redis_server):
    keyed = Keyed(cluster, tmp_path / "keys.yaml", redis_server.url)
    keyed.add("good")
    headers = {"authorization": f"Bearer {keyed.secrets['good']}"}
    async with keyed.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        page = await client.get("/dashboard")
        assert 'data-keys="wanted"' in page.text
        assert (await client.get("/dashboard/assets/app.js")).status_code == 200
        refused = await client.get("/dashboard/events")  # from this machine, too
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        async with watching(running, headers) as stream:
            await anext(stream)
            changed = asyncio.create_task(parts(running).keyring.change())
            await asyncio.to_thread(keyed.revoke, "good")
            async with asyncio.timeout(WAIT_S):
                await changed
                async for _ in stream:  # it ends
                    pass
        assert (await client.get("/dashboard/events", headers=headers)).status_code == 401


async def test_without_keys_the_page_asks_for_none(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        assert 'data-keys="none"' in (await client.get("/dashboard")).text


async def test_viewers_are_bounded_and_forgotten_when_they_leave(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        await cluster.add(running, "decode-0")
        feed = running.gateway.dashboard
        viewers = [feed.watch() for _ in range(MAX_VIEWERS - 1)]
        for viewer in viewers:
            await anext(viewer)
        async with watching(running) as stream:
            await anext(stream)
            assert running.sample("baton_dashboard_viewers") == MAX_VIEWERS
            refused = await client.get("/dashboard/events")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
            assert int(refused.headers["retry-after"]) > 0
        await running.until(lambda _: running.sample("baton_dashboard_viewers") == MAX_VIEWERS - 1)
        for viewer in viewers:
            await viewer.aclose()
        assert running.sample("baton_dashboard_viewers") == 0


async def test_a_slow_viewer_misses_frames_and_gets_the_newest(cluster):
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        feed = running.gateway.dashboard
        viewer = feed.watch()
        await anext(viewer)
        for _ in range(3):
            await ask(running)
            await ticked(feed)
        assert b'"ended":3.0' in await anext(viewer)
        await viewer.aclose()


async def test_no_frame_is_made_for_nobody(cluster):
    async with cluster.gateway() as running:
        await ticked(running.gateway.dashboard)
        assert running.gateway.dashboard._frame == b""


async def test_a_gateway_that_drains_lets_its_viewers_go(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        async with watching(running) as stream:
            await anext(stream)
            running.gateway.dashboard.close()
            async with asyncio.timeout(WAIT_S):
                async for _ in stream:
                    pass
        assert (await client.get("/dashboard/events")).json()["error"]["code"] == "draining"


async def test_traces_are_listed_and_kept_by_no_cache(cluster):
    async with cluster.gateway() as running, httpx.AsyncClient(base_url=running.url) as client:
        await cluster.add(running, "prefill-0", "decode-0")
        await ask(running, extra_headers={"x-request-id": "mine"})
        listed = await client.get("/dashboard/traces?order=slowest&limit=5")
        (found,) = [trace for trace in listed.json()["traces"] if trace["request_id"] == "mine"]
        one = await client.get(f"/dashboard/traces/{found['trace_id']}")
        assert {"gateway.request", "gateway.queue"} <= {span["name"] for span in one.json()["spans"]}
        assert listed.headers["cache-control"] == one.headers["cache-control"] == "no-store"
        assert (await client.get("/dashboard/traces/nobody")).status_code == 404
        refused = await client.get("/dashboard/traces?order=fastest")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "order")
