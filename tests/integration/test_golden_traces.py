"""One request's trace, whole, for each way that it can go: every hop and decision, each under what caused it.

A real cluster with sim engines, so that the spans travel as they do anywhere: from workers and stores over the bus.
What one worker did whole is in test_gateway_traces.py.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from shared import subjects, wire
from shared.bus import Bus
from tests.support.cluster import Cluster, running_cluster
from tests.support.disturbed import until, whole_again

pytestmark = pytest.mark.timeout(300)

WAIT_S = 10.0
LONG = "a prompt that takes a while to compute, " * 40
MANY = 300  # tokens
SPLIT = """
gateway.request [placed, first_token]
  decode.job
    decode.first_token
    kv.load
  gateway.admission
  gateway.queue
  prefill.job
    kv.push
"""
RETRIED = """
gateway.request [placed, retry, first_token]
  decode.job
    decode.first_token
    kv.load
  gateway.admission
  gateway.queue
  prefill.job
    kv.push
"""
RESUMED = """
gateway.request [placed, first_token, resume, placed]
  decode.job
    decode.first_token
    kv.load
  gateway.admission
  gateway.queue
  gateway.queue
  prefill.job
    kv.push
  prefill.job
    kv.push
"""
SHED = """
gateway.request! [shed]
  gateway.admission
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    options = ("--engine=sim", "--sim-speed=0.2", "--prefill=2", "--decode=2", "--arrangement=split")
    kept = {"BATON_TRACE_RATIO": "0", "BATON_MAX_QUEUED_TOKENS": "3000", "BATON_LOG_FORMAT": "json"}
    with running_cluster(
        tmp_path_factory.mktemp("home"), *options, "--arena-gib=0.25", "--kv-gib=0.25", **kept
    ) as cluster:
        yield cluster


def tree(trace: dict[str, Any]) -> str:
    """Names by their place, siblings by name; `!` where it failed; the root's events in order."""
    lines: list[str] = []

    def add(parent: str, depth: int) -> None:
        for span in sorted((one for one in spans if one["parent_id"] == parent), key=lambda one: str(one["name"])):
            failed = "!" if span["status"] == "error" else ""
            events = [event["name"] for event in span["events"]] if span["name"] == "gateway.request" else []
            lines.append("  " * depth + span["name"] + failed + (f" [{', '.join(events)}]" if events else ""))
            add(span["span_id"], depth + 1)

    spans = trace["spans"]
    # A killed process takes its own span with it: what the store has done for it, if anything, has lost its parent.
    add(spans[0]["parent_id"], 0)
    if "gateway.request [placed, first_token, resume" in lines[0]:
        # Whether the second prefill found the first one's blocks in its own engine or in the store is chance.
        lines = [line for at, line in enumerate(lines) if not (line == "    kv.load" and "prefill" in lines[at - 1])]
    return "\n" + "\n".join(lines) + "\n"


class Client:
    def __init__(self, cluster: Cluster, http: httpx.AsyncClient) -> None:
        self._cluster, self._http = cluster, http

    async def ask(self, request: str, *, sampled: bool = True, **body: Any) -> httpx.Response:
        headers = {"x-request-id": request}
        if sampled:
            headers["traceparent"] = f"00-{abs(hash(request)):032x}-00f067aa0ba902b7-01"
        body = {"model": "baton-demo", "prompt": f"{request}: {LONG}", "max_tokens": 4, "ignore_eos": True, **body}
        return await self._http.post(f"{self._cluster.url}/v1/completions", json=body, headers=headers)

    async def trace(self, request: str, golden: str) -> dict[str, Any]:
        """Once it is this one, or as it is after a while."""
        deadline, found = time.monotonic() + WAIT_S, {}
        while time.monotonic() < deadline:
            answer = await self._http.get(f"{self._cluster.url}/dashboard/traces/{request}")
            found = answer.json()
            if "spans" in found and tree(found) == golden:
                break
            await asyncio.sleep(0.05)  # spans come in batches, and nothing says that the last has come
        assert "spans" in found, found
        return found


@pytest.fixture
async def client(cluster: Cluster):
    async with httpx.AsyncClient(timeout=60) as http:
        yield Client(cluster, http)


@pytest.fixture
async def taken(cluster: Cluster):
    """Who has taken which job: (kind, worker), as the bus carries it."""
    record = record_of(cluster)
    bus = await Bus.connect(record["nats_url"], "watcher")
    jobs: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue()
    kinds = {"PrefillJob": "prefill", "DecodeJob": "decode"}

    def listener(worker: str):
        def hear(message: wire.AnyMessage) -> None:
            if (kind := kinds.get(type(message).__name__)) is not None:
                jobs.put_nowait((message.request, kind, worker))

        return hear

    for role, subject in (("prefill", subjects.prefill), ("decode", subjects.decode)):
        for number in range(2):
            worker = f"{role}-{number}"
            await bus.listen(subject(record["cluster"], worker), listener(worker))
    await bus.flush()
    yield jobs
    await bus.close()


def record_of(cluster: Cluster) -> dict[str, Any]:
    """What the launcher has written down; faster than asking it."""
    return json.loads((cluster.home / str(cluster.port) / "cluster.json").read_text())


def kill(cluster: Cluster, worker: str) -> None:
    (pid,) = [service["pid"] for service in record_of(cluster)["services"] if service["id"] == worker]
    os.kill(pid, signal.SIGKILL)


async def worker_of(jobs: asyncio.Queue[tuple[str, str, str]], kind: str) -> str:
    async with asyncio.timeout(WAIT_S):
        job = await jobs.get()
        while job[1] != kind or job[0].startswith("selftest"):
            job = await jobs.get()
    return job[2]


async def test_success(client: Client) -> None:
    answer = await client.ask("success")
    assert answer.status_code == 200
    trace = await client.trace("success", SPLIT)
    assert tree(trace) == SPLIT
    root = trace["spans"][0]
    assert root["attributes"]["gen_ai.operation.name"] == "text_completion"
    assert root["attributes"]["gen_ai.usage.output_tokens"] == 4
    assert all(0 <= span["start_ms"] <= root["duration_ms"] for span in trace["spans"])
    assert {span["service"] for span in trace["spans"]} == {"gateway", "prefill", "decode", "kv"}
    assert LONG[:20] not in str(trace)


async def test_what_went_well_and_was_not_sampled_is_not_kept(client: Client) -> None:
    assert (await client.ask("plain", sampled=False)).status_code == 200
    assert (await client.ask("plain-2")).status_code == 200
    await client.trace("plain-2", SPLIT)
    with pytest.raises(AssertionError, match="trace_not_found"):
        await asyncio.wait_for(_once(client, "plain"), WAIT_S)


async def _once(client: Client, request: str) -> None:
    answer = await client._http.get(f"{client._cluster.url}/dashboard/traces/{request}")
    assert answer.status_code == 200, answer.text


async def test_shed(client: Client) -> None:
    answer = await client.ask("shed", prompt=[LONG + str(number) for number in range(20)], sampled=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    trace = await client.trace("shed", SHED)
    assert tree(trace) == SHED
    assert (trace["outcome"], trace["summary"]["kept"]) == ("shed", "error")


async def test_cancel(cluster: Cluster, client: Client) -> None:
    body = {"model": "baton-demo", "prompt": f"cancel {LONG}", "max_tokens": MANY, "stream": True, "ignore_eos": True}
    headers = {"x-request-id": "cancel"}
    async with client._http.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=headers) as stream:
        async for line in stream.aiter_lines():
            if line.startswith("data: "):
                break
    # Whether prefill had answered when the client left decides how its own span ended.
    left = SPLIT.replace("request", "request!")
    trace = await client.trace("cancel", left)
    assert tree(trace).replace("prefill.job!", "prefill.job") == left
    assert trace["outcome"] == "cancelled"


async def test_retry(cluster: Cluster, client: Client, taken) -> None:
    """The prefill worker dies over its job. Nothing was sampled: workers are asked for what they hold."""
    asking = asyncio.create_task(client.ask("retry", sampled=False))
    worker = await worker_of(taken, "prefill")
    kill(cluster, worker)
    assert (await asking).status_code == 200
    trace = await client.trace("retry", RETRIED)
    assert tree(trace) == RETRIED
    (retry,) = [event for event in trace["spans"][0]["events"] if event["name"] == "retry"]
    assert (retry["attributes"]["phase"], retry["attributes"]["worker"]) == ("prefill", worker)
    assert trace["summary"]["kept"] == "retried"
    until(lambda: whole_again(cluster), "the cluster is not whole again")


async def test_resume(cluster: Cluster, client: Client, taken) -> None:
    body = {"model": "baton-demo", "prompt": f"resume {LONG}", "max_tokens": 30, "stream": True, "ignore_eos": True}
    headers, events, worker = {"x-request-id": "resume"}, 0, ""
    async with client._http.stream("POST", f"{cluster.url}/v1/completions", json=body, headers=headers) as stream:
        async for line in stream.aiter_lines():
            events += line.startswith("data: ")
            if events == 3 and not worker:
                worker = await worker_of(taken, "decode")
                kill(cluster, worker)
    assert events == 30 + 1
    trace = await client.trace("resume", RESUMED)
    assert tree(trace) == RESUMED
    until(lambda: whole_again(cluster), "the cluster is not whole again")
