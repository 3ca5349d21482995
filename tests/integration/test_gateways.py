"""`baton up --gateways 3`: the kernel spreads connections, one that dies or leaves takes nobody else's with it."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from services.gateway.http.shared_port import turn_away, waiting
from services.launcher.machine import hold_port, port_taken
from shared.errors import SettingsError
from shared.probes import listen
from shared.worker.sim.oracle import Oracle
from tests.support.cluster import BATON, Cluster, environment, read_metrics, running_cluster

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "models" / "demo"
WAIT_S = 90.0
CLIENTS = 12
# A new connection for each request, or one for many.
NEW = httpx.Limits(max_connections=None, max_keepalive_connections=0)
KEPT = httpx.Limits(max_connections=None, max_keepalive_connections=None)


async def until(true: Callable[[], bool], what: str) -> None:
    """For what nothing announces across processes."""
    deadline = time.monotonic() + WAIT_S
    while not await asyncio.to_thread(true):
        assert time.monotonic() < deadline, f"not within {WAIT_S:.0f} s: {what}"
        await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--engine=sim",
        "--sim-speed=inf",
        "--gateways=3",
        "--arena-gib=0.25",
        "--kv-gib=0.25",
        "--engine-arg=max_model_len=2048",
    ) as cluster:
        asyncio.run(until(lambda: cluster.status()["ready"], "all gateways are ready"))
        yield cluster


@dataclass
class Question:
    prompt: list[int]
    output: int
    text: str

    def body(self, **more: object) -> dict[str, object]:
        return {"model": "baton-demo", "prompt": self.prompt, "max_tokens": self.output, "temperature": 0, **more}


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    oracle = Oracle.load(str(DEMO), engine_args={"max_model_len": 2048})
    rng = random.Random(1)
    asked = [([rng.randrange(8, 1500) for _ in range(rng.randrange(1, 400))], rng.randrange(1, 60)) for _ in range(40)]
    return [Question(prompt, output, oracle.expected_text(prompt, output)) for prompt, output in asked]


@dataclass
class Load:
    """Clients that ask until they are stopped."""

    answered: int = 0
    begun_at: list[float] = field(default_factory=list)  # of the requests that have failed
    wrong: list[str] = field(default_factory=list)
    stopped: bool = False

    async def client(self, http: httpx.AsyncClient, questions: list[Question]) -> None:
        while not self.stopped:
            asked, began = random.choice(questions), time.monotonic()
            try:
                answer = await http.post("/v1/completions", json=asked.body())
            except httpx.TransportError as error:
                self.begun_at.append(began)
                print(f"failed: {error!r}")
                continue
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != asked.text:
                self.wrong.append(answer.text)
            self.answered += 1


@contextlib.asynccontextmanager
async def load(cluster: Cluster, questions: list[Question], *limits: httpx.Limits) -> AsyncIterator[Load]:
    running = Load()
    async with contextlib.AsyncExitStack() as clients, asyncio.TaskGroup() as tasks:
        for limit in limits:
            http = httpx.AsyncClient(base_url=cluster.url, limits=limit, timeout=WAIT_S, trust_env=False)
            await clients.enter_async_context(http)
            for _ in range(CLIENTS):
                tasks.create_task(running.client(http, questions))
        try:
            yield running
        finally:
            running.stopped = True


def state(cluster: Cluster, gateway: str) -> tuple[str, int]:
    found = cluster.service(gateway)
    return str(found["state"]), int(found["pid"])


def is_back(cluster: Cluster, gateway: str, old: int) -> bool:
    now, pid = state(cluster, gateway)
    return now == "ready" and pid != old


def ended(metrics_url: str) -> float:
    return sum(v for name, v in read_metrics(metrics_url).items() if name.startswith("baton_requests_total{"))


def gateway_pids(cluster: Cluster) -> dict[str, int]:
    return {service["id"]: int(service["pid"]) for service in cluster.services("gateway")}


def owners(pids: dict[str, int], ports: Collection[int]) -> dict[int, str]:
    """The gateway at the other end of each client's port, as far as one has accepted it."""
    return {
        one.raddr.port: name
        for name, pid in pids.items()
        for one in psutil.Process(pid).net_connections()
        if one.raddr and one.raddr.port in ports
    }


async def test_connections_reach_all_and_everything_is_counted_once(
    cluster: Cluster, questions: list[Question]
) -> None:
    urls = [service["metrics_url"] for service in cluster.services("gateway")]
    assert len(set(urls)) == 3
    before = [ended(url) for url in urls]
    async with httpx.AsyncClient(base_url=cluster.url, limits=NEW, timeout=WAIT_S, trust_env=False) as http:
        answers = await asyncio.gather(*(http.post("/v1/completions", json=one.body()) for one in questions * 2))
    assert [answer.json()["choices"][0]["text"] for answer in answers] == [one.text for one in questions * 2]

    def served() -> list[float]:
        return [ended(url) - old for url, old in zip(urls, before, strict=True)]

    await until(lambda: sum(served()) >= len(answers), "the last requests are counted")
    assert sum(served()) == len(answers)
    assert sum(count > 0 for count in served()) > 1


async def test_one_that_is_killed_takes_nobody_elses_requests_with_it(
    cluster: Cluster, questions: list[Question]
) -> None:
    victim = cluster.pid("gateway-1")
    async with load(cluster, questions, NEW) as running:
        await until(lambda: running.answered >= 50, "the load runs")
        os.kill(victim, signal.SIGKILL)
        await until(lambda: not psutil.pid_exists(victim), "it is gone")
        gone_at, answered = time.monotonic(), running.answered
        await until(lambda: running.answered >= answered + 100, "new connections go to the others")
        await until(lambda: is_back(cluster, "gateway-1", victim), "it is started again")
        answered = running.answered
        await until(lambda: running.answered >= answered + 50, "the new one serves, too")
    assert running.wrong == []
    # Each client had at most one request there.
    assert len(running.begun_at) <= CLIENTS
    assert [began - gone_at for began in running.begun_at if began > gone_at] == []


async def test_requests_on_the_others_are_unharmed_by_a_kill(cluster: Cluster, questions: list[Question]) -> None:
    """Connections that are known to be on one gateway or another, each in the middle of its request."""
    asked = questions[0]
    body = httpx.Request("POST", cluster.url, json=asked.body()).content
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    pids = gateway_pids(cluster)
    victim = pids["gateway-0"]
    streams = [await asyncio.open_connection("127.0.0.1", cluster.port) for _ in range(30)]
    for _, writer in streams:
        writer.write(head.encode() + body[:10])
        await writer.drain()
    ports = [writer.get_extra_info("sockname")[1] for _, writer in streams]
    await until(lambda: len(owners(pids, ports)) == len(ports), "all are accepted")
    at = owners(pids, ports)
    os.kill(victim, signal.SIGKILL)
    await until(lambda: not psutil.pid_exists(victim), "it is gone")
    for port, (reader, writer) in zip(ports, streams, strict=True):
        answer = b""
        with contextlib.suppress(ConnectionError):
            writer.write(body[10:])
            async with asyncio.timeout(WAIT_S):
                answer = await reader.read()
        writer.close()
        lost = at[port] == "gateway-0"
        assert lost == (answer == b""), at[port]
        assert lost or json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == asked.text
    assert len(set(at.values())) > 1
    await until(lambda: is_back(cluster, "gateway-0", victim), "it is started again")


async def test_one_that_is_told_to_end_finishes_what_it_has_and_nothing_fails(
    cluster: Cluster, questions: list[Question]
) -> None:
    """With clients that connect anew all the time, with clients that keep their connections, and with a long stream."""
    oracle = Oracle.load(str(DEMO), engine_args={"max_model_len": 2048})
    prompt = [9, 8, 7]
    long = Question(prompt, 1500, oracle.expected_text(prompt, 1500))
    async with (
        load(cluster, questions, NEW, KEPT) as running,
        httpx.AsyncClient(base_url=cluster.url, timeout=WAIT_S, trust_env=False) as http,
    ):
        await until(lambda: running.answered >= 100, "the load runs")
        pids = gateway_pids(cluster)
        async with http.stream("POST", "/v1/completions", json=long.body(stream=True)) as stream:
            port = stream.extensions["network_stream"].get_extra_info("client_addr")[1]
            leaving = owners(pids, [port])[port]
            victim = pids[leaving]
            os.kill(victim, signal.SIGTERM)
            texts = [
                httpx.Response(200, content=line.removeprefix("data: ")).json()["choices"][0]["text"]
                async for line in stream.aiter_lines()
                if line.startswith("data: {")
            ]
        assert "".join(texts) == long.text
        await until(lambda: not psutil.pid_exists(victim), "it has ended")
        await until(lambda: is_back(cluster, leaving, victim), "it is started again")
        answered = running.answered
        await until(lambda: running.answered >= answered + 100, "the load goes on")
    assert (running.begun_at, running.wrong) == ([], [])
    assert f"{leaving} died (exit code 0" in cluster.said()
    assert "the listener is closed" in cluster.log(leaving)


@pytest.mark.parametrize("options", [(), ("--gateways=2",)])
def test_a_second_cluster_on_the_port_is_refused(cluster: Cluster, tmp_path: Path, options: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*BATON, "up", "--engine=sim", f"--port={cluster.port}", *options],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(tmp_path),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"baton: cannot listen on 127.0.0.1:{cluster.port} (Address already")
    assert "Traceback" not in done.stderr


def test_a_held_port_is_only_for_those_who_share() -> None:
    with listen("127.0.0.1", 0, setting="port") as alone:
        alone.listen()
        port = alone.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S) as client:
            alone.accept()[0].close()  # what it leaves in TIME_WAIT does not keep those away who share
            assert client.recv(1) == b""
    with hold_port("127.0.0.1", port):
        assert port_taken("127.0.0.1", port) == "Address already in use"
        with pytest.raises(SettingsError, match="'port': cannot listen on"):
            listen("127.0.0.1", port, setting="port")
        with listen("127.0.0.1", port, setting="port", shared=True) as first:
            first.listen()
            with listen("127.0.0.1", port, setting="port", shared=True) as second:
                second.listen()
            with socket.create_connection(("127.0.0.1", port), timeout=WAIT_S):  # nobody but `first` is there
                assert waiting(first) == 1
    assert port_taken("127.0.0.1", port) is None


async def test_a_listener_that_turns_away_keeps_whom_it_has_and_sends_the_rest_to_the_others() -> None:
    with (
        listen("127.0.0.1", 0, setting="port", shared=True) as leaving,
        listen("127.0.0.1", leaving.getsockname()[1], setting="port", shared=True) as staying,
    ):
        address = leaving.getsockname()
        for listener in (leaving, staying):
            listener.listen(100)
        early = [await asyncio.open_connection(*address) for _ in range(30)]
        kept = waiting(leaving)
        assert 0 < kept < 30
        turn_away(leaving)
        connects = asyncio.gather(*(asyncio.open_connection(*address) for _ in range(30)))
        await until(lambda: waiting(staying) > 30 - kept, "some of the late ones are there at once")
        assert waiting(leaving) == kept
        for _ in range(kept):
            leaving.accept()[0].close()
        leaving.close()
        async with asyncio.timeout(WAIT_S):
            late = await connects  # none was refused: who was turned away has tried again
        assert waiting(staying) == 60 - kept
        for _, writer in [*early, *late]:
            writer.close()
