"""Traces of a gateway with fake workers: a request that one worker serves whole, other gateways' traces, log lines."""

import asyncio
import gc
import json
import logging
import time

import httpx
import pytest

from services.gateway.observe.metrics import Metrics
from services.gateway.request.context import RequestContext
from shared import telemetry
from shared.settings import GatewaySettings
from tests.support.running_gateway import MODEL, running_gateway

PROMPT = "secret words"
COUNTED = ("inter_token_latency", "time_to_first_token")


async def ask(url: str, request: str, *, streams: bool = False) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as http:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "stream": streams}
        return await http.post(f"{url}/v1/completions", json=body, headers={"x-request-id": request})


async def get(url: str, path: str) -> httpx.Response:
    async with httpx.AsyncClient(timeout=20) as http:
        return await http.get(f"{url}{path}")


async def test_local_prefill(cluster):
    cluster.settings["arrangement"] = "unsplit"
    async with cluster.gateway() as running:
        await cluster.add(running, "decode-0")
        assert (await ask(running.url, "whole")).status_code == 200
        await running.until_idle()
        trace = (await get(running.url, "/dashboard/traces/whole")).json()
    assert trace["receipt"]["path"] == "whole"
    shown = [(span["name"], span["status"]) for span in trace["spans"]]
    assert shown == [("gateway.request", "ok"), ("gateway.admission", "ok"), ("gateway.queue", "ok")]
    root = trace["spans"][0]
    assert [event["name"] for event in root["events"]] == ["placed", "first_token"]
    assert root["events"][0]["attributes"] == {
        "path": "whole",
        "reason": "unsplit",
        "prefill": "",
        "decode": "decode-0",
    }
    assert root["attributes"]["baton.request_id"] == "whole"


async def until_gone() -> None:
    """Looked at again and again: the server lets go of a connection a little later than it answers."""
    while any(isinstance(one, RequestContext) for one in gc.get_objects()):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("has_workers", "streams"), [(False, False), (True, False), (True, True)])
async def test_a_request_is_gone_when_it_has_ended_though_its_trace_is_kept(cluster, has_workers, streams):
    """Its prompt with it, and without the collector: that would hold up every stream."""
    cluster.settings["queue_s"] = 0.05
    async with cluster.gateway() as running:
        if has_workers:
            await cluster.add(running, "prefill-0", "decode-0")
        gc.collect()
        gc.disable()
        try:
            answer = await ask(running.url, "over", streams=streams)
            assert answer.status_code == (200 if has_workers else 503)
            await running.until_idle()
            assert (await get(running.url, "/dashboard/traces/over")).json()["summary"]["request_id"] == "over"
            await asyncio.wait_for(until_gone(), 5)
        finally:
            gc.enable()


async def test_any_gateway_finds_the_traces_of_all(cluster, nats_url, tiny_model):
    other = GatewaySettings(id="gateway-1", cluster="test", nats_url=nats_url, model=str(tiny_model))
    async with cluster.gateway() as running, running_gateway(other) as second:
        await cluster.add(running, "prefill-0", "decode-0")
        await second.until(lambda gateway: "gateway-0" in gateway.members.other_gateways(time.monotonic()))
        assert (await ask(running.url, "asked-of-the-first")).status_code == 200
        await running.until_idle()
        found = await get(second.url, "/dashboard/traces/asked-of-the-first")
        assert found.json()["summary"]["gateway"] == "gateway-0"
        listed = (await get(second.url, "/dashboard/traces?order=slowest&limit=5")).json()["traces"]
        assert [one["request_id"] for one in listed] == ["asked-of-the-first"]
        missing = await get(second.url, "/dashboard/traces/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "trace_not_found")


async def test_telemetry_off_makes_no_span_and_counts_no_gap(cluster):
    cluster.settings["telemetry"] = "off"
    try:
        async with cluster.gateway() as running:
            await cluster.add(running, "prefill-0", "decode-0")
            assert (await ask(running.url, "unseen")).status_code == 200
            await running.until_idle()
            assert (await get(running.url, "/dashboard/traces")).json() == {"traces": []}
            assert running.sample("baton_traces_kept") == 0
            assert running.sample("baton_requests_total", model=MODEL, tier="default", outcome="ok") == 1
    finally:
        telemetry.start()
    metrics = Metrics(MODEL, each_token=False)
    metrics.gap(0.1)
    metrics.first_token(0.1)
    counted = [metrics.registry.get_sample_value(f"baton_{name}_seconds_count") for name in COUNTED]
    assert counted == [0.0, 1.0]


async def test_one_line_a_request_with_its_trace_and_none_of_its_words(cluster, caplog):
    caplog.set_level(logging.INFO)
    async with cluster.gateway() as running:
        await cluster.add(running, "prefill-0", "decode-0")
        await ask(running.url, "told")
        await running.until_idle()
        async with httpx.AsyncClient() as http:
            await http.post(f"{running.url}/v1/completions", json={"model": "other", "prompt": PROMPT})
        trace = (await get(running.url, "/dashboard/traces/told")).json()
    lines = [record for record in caplog.records if record.getMessage() == "request"]
    good, bad = (line.fields for line in lines)
    assert (good["request_id"], good["outcome"], good["tenant"], good["path"]) == ("told", "ok", "anonymous", "split")
    assert (good["prefill"], good["decode"], good["completion_tokens"]) == ("prefill-0", "decode-0", 3)
    assert good["trace_id"] == trace["trace_id"]
    assert good["ttft_ms"] <= good["duration_ms"]
    assert (bad["outcome"], bad["reason"]) == ("client_error", "model_not_found")
    for formatter in (telemetry._JsonLines("gateway", "gateway-0"), telemetry._HumanLines("gateway-0")):
        text = formatter.format(lines[0])
        assert trace["trace_id"] in text
        assert "told" in text
        assert PROMPT not in text
    assert json.loads(telemetry._JsonLines("gateway", "gateway-0").format(lines[0]))["stages_ms"].keys() >= {"queue"}
