"""Every worker of a cluster is restarted in turn, under streams that outlive the grace period: no request notices."""

import asyncio
import itertools
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from shared.worker.sim.oracle import Oracle
from tests.support.cluster import Cluster, read_metrics, running_cluster
from tests.support.disturbed import until
from tests.support.exact import assert_idle

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "models" / "demo"
MODEL = "baton-demo"
WORKERS = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
DRAIN_S = 0.05
STREAMS = 12
OUTPUT = 400  # tokens: sixty times the grace period, or all of them might end within it
MAX_LEN = 2048


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--engine=sim",
        "--sim-speed=4",
        "--prefill=2",
        "--decode=2",
        "--arrangement=split",
        "--arena-gib=0.25",
        "--kv-gib=0.1",
        f"--engine-arg=max_model_len={MAX_LEN}",
        BATON_DRAIN_S=str(DRAIN_S),
    ) as cluster:
        yield cluster


class Load:
    """Clients that stream without a pause until `stop`; half of the requests have a seed, so cannot go on by prompt."""

    def __init__(self, cluster: Cluster, oracle: Oracle) -> None:
        self._client = cluster.async_client()
        self._oracle = oracle
        self._numbers = itertools.count()
        self._stopped = False
        self.running = 0  # streams that have given text
        self.wrong: list[str] = []

    def stop(self) -> None:
        self._stopped = True

    async def run(self) -> None:
        while not self._stopped:
            await self._one(next(self._numbers))

    async def _one(self, number: int) -> None:
        rng = random.Random(number)
        prompt = [rng.randrange(8, 1500) for _ in range(rng.randrange(1, 600))]
        seed = number if number % 2 else None
        text, begun = "", False
        try:
            stream = await self._client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=OUTPUT,
                temperature=0 if seed is None else 1,
                seed=seed,
                stream=True,
            )
            async for chunk in stream:
                self.running += not begun
                begun = True
                text += chunk.choices[0].text
        except openai.APIError as error:
            self.wrong.append(f"request {number}: {error}")
            return
        finally:
            self.running -= begun
        if text != self._oracle.expected_text(prompt, OUTPUT, seed=seed or 0):
            self.wrong.append(f"request {number}: {text[:50]!r} …")


def has_new(cluster: Cluster, worker: str, old: int) -> bool:
    found = cluster.service(worker)
    return bool(found["state"] == "ready" and found["pid"] != old)


def decodes(cluster: Cluster, worker: str) -> bool:
    """Streams run on it; a prefill worker's jobs are too short to be seen."""
    found = cluster.service(worker)
    return found["role"] != "decode" or read_metrics(found["metrics_url"])["baton_engine_running"] > 2


def resumes(cluster: Cluster) -> float:
    return cluster.metrics("gateway").get('baton_retries_total{phase="resume"}', 0.0)


async def test_every_worker_in_turn(cluster: Cluster) -> None:
    load = Load(cluster, Oracle.load(str(DEMO), engine_args={"max_model_len": MAX_LEN}))
    async with asyncio.TaskGroup() as clients:
        for _ in range(STREAMS):
            clients.create_task(load.run())
        for worker in WORKERS:
            await asyncio.to_thread(until, lambda: load.running > STREAMS // 2, "the load runs")
            await asyncio.to_thread(until, lambda: decodes(cluster, worker), f"{worker} has no streams")  # noqa: B023
            cluster.said()
            process = psutil.Process(cluster.pid(worker))
            process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(psutil.wait_procs, [process], 60)
            await asyncio.to_thread(until, lambda: has_new(cluster, worker, process.pid), f"{worker} is not back")  # noqa: B023 - awaited here
            assert f"{worker} died (exit code 0;" in cluster.said()
        load.stop()
    assert load.wrong == []
    assert resumes(cluster) > 0, "no stream outlived the grace period"
    assert_idle(cluster)
