"""Two minutes of conversations over two nodes whose arenas are far too small, while Redis comes and goes.

Every text is the oracle's, no request fails, memory stays flat, and at the end nothing is held. Longer ones by hand:
`SOAK_S=1200 .venv/bin/pytest tests/fault/test_kv_soak.py`, or `python -m loadtest soak` against any cluster.
"""

import asyncio
import contextlib
import os
import random
import time
from pathlib import Path

import openai
import psutil
import pytest

from shared.worker.sim.oracle import Oracle
from tests.support.cluster import Cluster, running_cluster
from tests.support.exact import assert_idle

SOAK_S = float(os.environ.get("SOAK_S", "112"))
pytestmark = pytest.mark.timeout(SOAK_S + 270)

DEMO = Path(__file__).parents[2] / "models" / "demo"
WARM_S = 8.0
AT_ONCE = 12
LEAVING = 0.1
GROWN_BYTES = 48 << 20  # of one process, once it is warm


class Soak:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._oracle = Oracle.load(str(DEMO), engine_args={"max_model_len": 2048})
        self.said = 0
        self.cached = 0

    async def run(self, for_s: float, seed: int) -> None:
        until = time.monotonic() + for_s
        async with self._cluster.async_client() as client, asyncio.TaskGroup() as talks:
            for number in range(AT_ONCE):
                talks.create_task(self._talk(client, random.Random(f"{seed} {number}"), until))

    async def _talk(self, client: openai.AsyncOpenAI, rng: random.Random, until: float) -> None:
        while time.monotonic() < until:
            tokens: list[int] = []
            for _ in range(rng.randrange(1, 5)):
                tokens += [rng.randrange(8, 1500) for _ in range(rng.randrange(1, 400))]
                if len(tokens) > 1700:
                    break
                tokens += await self._turn(client, tokens, rng.randrange(1, 80), leaves=rng.random() < LEAVING)

    async def _turn(self, client: openai.AsyncOpenAI, tokens: list[int], output: int, *, leaves: bool) -> list[int]:
        asked = client.completions.create(
            model="baton-demo",
            prompt=tokens,
            max_tokens=output,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        if leaves:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asked, 0.02)
            return []
        answer = await asked
        assert answer.choices[0].text == self._oracle.expected_text(tokens, output), f"{len(tokens)} tokens"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        self.cached += answer.usage.prompt_tokens_details.cached_tokens or 0
        self.said += 1
        return list((answer.choices[0].model_extra or {})["token_ids"])


def memory(cluster: Cluster) -> dict[str, int]:
    """Bytes of each service's own; of Redis and NATS, which are not ours, nothing."""
    services = [one for one in cluster.status()["services"] if one["role"] in {"gateway", "prefill", "decode", "kv"}]
    return {one["id"]: psutil.Process(one["pid"]).memory_full_info().uss for one in services}


async def test_conversations_in_too_little_room_while_redis_comes_and_goes(tmp_path: Path) -> None:
    with running_cluster(
        tmp_path,
        "--nodes=2",
        "--engine=sim",
        "--sim-speed=20",
        "--arrangement=split",
        "--arena-gib=0.02",
        "--engine-arg=max_model_len=2048",
        "--engine-arg=enable_prefix_caching=false",
        BATON_PULL="always",
    ) as cluster:
        soak = Soak(cluster)
        await soak.run(WARM_S, seed=1)
        before = await asyncio.to_thread(memory, cluster)
        running = asyncio.create_task(soak.run(SOAK_S, seed=2))
        (redis,) = cluster.services("redis")
        for wait_s in (SOAK_S / 5, SOAK_S / 3):
            await asyncio.wait({running}, timeout=wait_s)
            psutil.Process(cluster.pid(redis["id"])).kill()
            await asyncio.to_thread(until_restarted, cluster, redis["id"])
        await running
        after = await asyncio.to_thread(memory, cluster)
        grown = {name: size - before[name] for name, size in after.items() if name in before}
        assert max(grown.values()) < GROWN_BYTES, grown
        metrics = [cluster.metrics(role) for role in ("prefill", "decode")]
        assert sum(page["baton_sim_kv_mismatched_blocks_total"] for page in metrics) == 0
        store = cluster.metrics("kv")
        assert store["baton_kv_evicted_blocks_total"] > 1000
        assert store["baton_kv_kept_blocks_total"] > 0
        assert soak.cached > 0, "no turn has found anything of the one before"
        assert_idle(cluster)


def until_restarted(cluster: Cluster, service: str) -> None:
    deadline = time.monotonic() + 60
    while not any(one["id"] == service and one["state"] == "ready" for one in cluster.status()["services"]):
        assert time.monotonic() < deadline, f"{service} did not come back"
