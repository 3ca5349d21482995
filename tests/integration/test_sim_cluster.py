"""`baton up --engine sim`: every text that comes out of a split cluster is the oracle's, whatever happens to the KV."""

import asyncio
import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from shared import wire
from shared.worker.sim.oracle import Oracle
from tests.support.cluster import Cluster, running_cluster
from tests.support.exact import assert_idle

pytestmark = pytest.mark.timeout(300)

DEMO = Path(__file__).parents[2] / "models" / "demo"
BLOCK = 32
SLOT_BYTES = BLOCK * 2048
BACK_S = 90


@dataclass
class Asked:
    prompt: list[int]
    output: int
    text: str = ""
    receipt: dict[str, Any] | None = None


def questions(count: int, seed: int, longest: int = 1500) -> list[Asked]:
    rng = random.Random(seed)
    return [
        Asked([rng.randrange(8, 1500) for _ in range(rng.randrange(1, longest))], rng.randrange(1, 100))
        for _ in range(count)
    ]


async def ask_all(
    cluster: Cluster, asked: list[Asked], at_once: int = 64, on_answer: Callable[[], None] = lambda: None
) -> None:
    room = asyncio.Semaphore(at_once)
    async with cluster.async_client() as client:

        async def ask(one: Asked) -> None:
            async with room:
                raw = await client.completions.with_raw_response.create(
                    model="baton-demo", prompt=one.prompt, max_tokens=one.output, temperature=0
                )
            one.text = raw.parse().choices[0].text
            one.receipt = json.loads(raw.headers["x-baton-receipt"])
            on_answer()

        await asyncio.gather(*(ask(one) for one in asked))


def assert_right(asked: list[Asked], oracle: Oracle) -> None:
    wrong = [len(one.prompt) for one in asked if one.text != oracle.expected_text(one.prompt, one.output)]
    assert not wrong, f"{len(wrong)} of {len(asked)} texts are wrong; of prompts of {wrong[:10]} tokens"


def mismatched(cluster: Cluster) -> float:
    return sum(cluster.metrics(role)["baton_sim_kv_mismatched_blocks_total"] for role in ("prefill", "decode"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        "--engine=sim",
        "--sim-speed=inf",
        "--arrangement=split",
        "--arena-gib=0.25",
        "--kv-gib=0.25",
        "--engine-arg=max_model_len=2048",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle.load(str(DEMO), engine_args={"max_model_len": 2048})


async def test_texts_are_the_oracles_and_the_bytes_have_moved(cluster: Cluster, oracle: Oracle) -> None:
    before = cluster.metrics("kv")
    asked = questions(150, seed=1)
    await ask_all(cluster, asked)
    assert_right(asked, oracle)
    assert {one.receipt["path"] for one in asked if one.receipt} == {"split"}
    assert mismatched(cluster) == 0
    assert_idle(cluster)  # also that what was said is kept
    after = cluster.metrics("kv")
    moved, written, kept = (
        after[name] - before[name]
        for name in (
            'baton_kv_moved_bytes_total{path="local"}',
            "baton_kv_written_bytes_total",
            "baton_kv_kept_blocks_total",
        )
    )
    # Decode computes the last token of each prompt itself; a block of nothing else is not loaded.
    assert moved == sum(-(-(len(one.prompt) - 1) // BLOCK) for one in asked) * SLOT_BYTES
    # Not all of it, if many end at once and others wait for room.
    assert 0 < kept <= sum((len(one.prompt) + one.output - 1) // BLOCK - len(one.prompt) // BLOCK for one in asked)
    assert written == (sum(-(-len(one.prompt) // BLOCK) for one in asked) + kept) * SLOT_BYTES
    assert cluster.metrics("decode")["baton_kv_recomputed_tokens_total"] == 0


async def test_a_conversation_finds_its_prefix(cluster: Cluster, oracle: Oracle) -> None:
    (first,) = questions(1, seed=2)
    await ask_all(cluster, [first])
    second = Asked([*first.prompt, *oracle.expected_tokens(first.prompt, first.output), 9, 9, 9], 20)
    await ask_all(cluster, [second])
    assert_right([first, second], oracle)
    assert second.receipt is not None
    assert second.receipt["cached_tokens"] >= (len(first.prompt) - 1) // BLOCK * BLOCK


async def test_choices_and_stop_strings(cluster: Cluster, oracle: Oracle) -> None:
    (one,) = questions(1, seed=3)
    whole = oracle.expected_text(one.prompt, 60, seed=4)
    stop = whole[len(whole) // 2 :][:3]
    answer = await cluster.async_client().completions.create(
        model="baton-demo", prompt=one.prompt, max_tokens=60, n=3, seed=4, stop=[stop]
    )
    sampling = wire.Sampling(max_tokens=60, n=3, seed=4, stop=[stop])
    expected = [oracle.answer(one.prompt, sampling, choice) for choice in range(3)]
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in answer.choices] == [one.finish.reason for one in expected]


def test_the_cluster_says_which_engine_runs(cluster: Cluster, oracle: Oracle) -> None:
    assert {s["engine"] for s in cluster.status()["services"] if s["role"] in ("prefill", "decode")} == {"sim"}
    (info,) = [name for name in cluster.metrics("decode") if name.startswith("baton_engine_info")]
    facts = dict(re.findall(r'(\w+)="([^"]*)"', info))
    assert (facts["engine"], facts["profile"], facts["speed"]) == ("sim", "llama2-70b-h100", "inf")
    told = Oracle.of_engine(str(DEMO), facts)
    assert told.expected_text([1, 2, 3], 20) == oracle.expected_text([1, 2, 3], 20)


async def test_the_store_may_die(cluster: Cluster, oracle: Oracle) -> None:
    asked = questions(300, seed=5)
    killed = cluster.pid("kv-0")
    answers = itertools.count(1)

    def kill_in_the_middle() -> None:
        if next(answers) == len(asked) // 4:
            os.kill(killed, signal.SIGKILL)

    await ask_all(cluster, asked, at_once=24, on_answer=kill_in_the_middle)
    assert_right(asked, oracle)
    await asyncio.to_thread(_wait_until_back, cluster, killed)
    again = questions(30, seed=6)
    await ask_all(cluster, again)
    assert_right(again, oracle)
    assert "split" in {one.receipt["path"] for one in again if one.receipt}
    assert mismatched(cluster) == 0
    assert_idle(cluster)


def _wait_until_back(cluster: Cluster, killed: int) -> None:
    deadline = time.monotonic() + BACK_S
    while True:
        (store,) = cluster.services("kv")
        workers = [s for s in cluster.status()["services"] if s["role"] in ("prefill", "decode")]
        if store["state"] == "ready" and store["pid"] != killed and psutil.pid_exists(store["pid"] or 0):
            metrics = cluster.metrics("kv")
            if metrics.get("baton_kv_sessions") == len(workers):
                return
        assert time.monotonic() < deadline, "the store did not come back"
        time.sleep(0.2)  # a poll with a deadline: there is no event to wait for across processes


async def test_without_kv_the_protocol_still_runs(tmp_path: Path) -> None:
    """And in real time: a tenth of a second of the profile's takes a hundredth here."""
    with running_cluster(
        tmp_path,
        "--engine=sim",
        "--sim-speed=10",
        "--sim-kv=off",
        "--arrangement=split",
        "--engine-arg=max_model_len=2048",
    ) as cluster:
        oracle = Oracle.load(str(DEMO), engine_args={"max_model_len": 2048}, has_kv=False)
        asked = questions(60, seed=7)
        await ask_all(cluster, asked)
        assert_right(asked, oracle)
        assert {one.receipt["path"] for one in asked if one.receipt} == {"split"}
        assert_idle(cluster)
        metrics = cluster.metrics("kv")
        written = metrics["baton_kv_written_bytes_total"]
        blocks = sum(-(-len(one.prompt) // BLOCK) for one in asked) + metrics["baton_kv_kept_blocks_total"]
        assert blocks * 64 <= written < (blocks + 64) * 64  # the workers' own tests wrote some, too
        assert mismatched(cluster) == 0
        assert_idle(cluster)


async def test_a_stream_that_goes_on_elsewhere_says_the_same(tmp_path: Path, oracle: Oracle) -> None:
    """What a lost decode worker has said becomes prompt on another: the text must not show where."""
    with running_cluster(
        tmp_path,
        "--engine=sim",
        "--sim-speed=5",
        "--decode=2",
        "--arrangement=split",
        "--engine-arg=max_model_len=2048",
    ) as cluster:
        asked = [Asked(one.prompt, 60) for one in questions(40, seed=8, longest=300)]
        victim, answers = cluster.pid("decode-0"), itertools.count(1)

        def kill_in_the_middle() -> None:
            if next(answers) == len(asked) // 4:
                os.kill(victim, signal.SIGKILL)

        await ask_all(cluster, asked, at_once=16, on_answer=kill_in_the_middle)
        assert_right(asked, oracle)
        assert sum(one.receipt["retries"] for one in asked if one.receipt), "nobody was on the lost worker"
