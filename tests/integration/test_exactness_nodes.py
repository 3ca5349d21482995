"""Prefill on one node and decode on another: split output equals unsplit vLLM, whatever happens on the way between them.

A proxy stands between the stores. While it only passes on, exactly the prompts' blocks go through it and nothing is
computed twice; when it corrupts blocks, exactly what it spoiled is computed again; when it cuts or delays, the output
is the same all the same.
"""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, read_metrics, running_cluster
from tests.support.exact import (
    BLOCK,
    ENGINE,
    MAX_LEN,
    MODEL,
    assert_idle,
    engine_options,
    greedy,
    prompt_of,
    stream,
    tokens_of,
)
from tests.support.reference import run_reference
from tests.support.sensitive_model import make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

OUTPUT = 16
SLOT_BYTES = 4 * 2 * 2 * 64 * BLOCK * 4  # layers, K and V, KV heads, head size, tokens, float32
LENGTHS = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 1000, MAX_LEN - OUTPUT - 1, 700, 3, 40, 500, 96, 95, 97, 1200, 128]
WHOLE_BLOCKS = [BLOCK * count for count in (1, 2, 3, 5, 8, 11, 13, 17, 20, 24, 28, 32, 36, 40, 45, 50)]
# What the proxy does -> prompts, each with a seed of its own. Whole blocks make what is computed again countable.
PHASES = {
    "clean": [(length, 1) for length in LENGTHS],
    "corrupt 0.02": [(length, 2) for length in WHOLE_BLOCKS],
    "cut 0.01": [(length, 3) for length in WHOLE_BLOCKS],
    "delay 0.05": [(length, 4) for length in LENGTHS],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(tmp_path_factory.mktemp("model") / "sensitive", max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[int]]]:
    """Phase -> token ids by unsplit vLLM."""
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 1 << 28}
    batches = [
        [{"tokens": tokens_of(prompt_of(*prompt)), "params": greedy(OUTPUT)} for prompt in prompts]
        for prompts in PHASES.values()
    ]
    results = run_reference(tmp_path_factory.mktemp("reference"), engine, batches)
    return {
        phase: [choices[0]["token_ids"] for choices in answers] for phase, answers in zip(PHASES, results, strict=True)
    }


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "mode").write_text("clean")
    return folder


@pytest.fixture(scope="module")
def cluster(
    model: Path, proxy: Path, reference: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        f"--model={model}",
        f"--served-model-name={MODEL}",
        "--nodes=2",
        "--arrangement=split",
        "--kv-gib=0.25",
        "--arena-gib=0.25",
        *engine_options(),
        launcher="tests.support.proxied_launcher",
        PROXY_FOLDER=str(proxy),
    ) as cluster:
        yield cluster


async def run_phase(cluster: Cluster, proxy: Path, phase: str) -> tuple[list[list[int]], list[dict[str, int]]]:
    """Token ids of all its prompts, sixteen at once, and what the proxy did."""
    (proxy / "mode").write_text(phase)
    (proxy / "done").write_text("")
    client = cluster.async_client()
    got = await asyncio.gather(*(stream(client, prompt_of(*prompt), greedy(OUTPUT)) for prompt in PHASES[phase]))
    return list(got), [json.loads(line) for line in (proxy / "done").read_text().splitlines()]


def counted(cluster: Cluster) -> dict[str, float]:
    """Of both nodes and all workers, what a phase is measured by."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for service in cluster.status()["services"]:
        if service["metrics_url"]:
            found[service["role"]].update(read_metrics(service["metrics_url"]))
    stores, decode, prefill = (found[role] for role in ("kv", "decode", "prefill"))
    failed = [value for name, value in stores.items() if name.startswith("baton_kv_failed_transfers_total")]
    return {
        "moved": stores['baton_kv_moved_bytes_total{path="peer"}'],
        "recomputed": decode["baton_kv_recomputed_tokens_total"],
        "computed by decode": decode['baton_prefix_tokens_total{source="computed"}'],
        "prefilled": prefill['baton_prefix_tokens_total{source="computed"}'],
        "failed": sum(failed),
        "spoiled": stores['baton_kv_refused_frames_total{reason="checksum"}'],
    }


async def test_clean(cluster: Cluster, proxy: Path, reference: dict[str, list[list[int]]]) -> None:
    nodes = {service["role"]: service["node"] for service in cluster.status()["services"]}
    assert nodes["prefill"] != nodes["decode"]
    before = counted(cluster)
    got, _ = await run_phase(cluster, proxy, "clean")
    assert got == reference["clean"]
    grown = {name: value - before[name] for name, value in counted(cluster).items()}
    assert grown["moved"] == sum(-(-length // BLOCK) for length in LENGTHS) * SLOT_BYTES
    assert grown["recomputed"] == grown["failed"] == 0
    assert grown["computed by decode"] == len(LENGTHS)  # the last prompt token of each
    assert grown["prefilled"] == sum(LENGTHS)
    assert_idle(cluster)


async def test_corrupted(cluster: Cluster, proxy: Path, reference: dict[str, list[list[int]]]) -> None:
    before = counted(cluster)
    got, done = await run_phase(cluster, proxy, "corrupt 0.02")
    assert got == reference["corrupt 0.02"]
    assert done, "nothing was corrupted: this test proves nothing"
    grown = {name: value - before[name] for name, value in counted(cluster).items()}
    # From the spoiled block on, and nothing else.
    assert grown["recomputed"] == sum(one["of"] - one["corrupt"] for one in done) * BLOCK
    # Each end counts its own.
    assert grown["failed"] == 2 * len(done)
    assert_idle(cluster)


async def test_cut(cluster: Cluster, proxy: Path, reference: dict[str, list[list[int]]]) -> None:
    before = counted(cluster)
    got, done = await run_phase(cluster, proxy, "cut 0.01")
    assert got == reference["cut 0.01"]
    assert done, "nothing was cut: this test proves nothing"
    assert counted(cluster)["failed"] - before["failed"] >= len(done)
    assert_idle(cluster)


async def test_delayed(cluster: Cluster, proxy: Path, reference: dict[str, list[list[int]]]) -> None:
    before = counted(cluster)
    got, done = await run_phase(cluster, proxy, "delay 0.05")
    assert got == reference["delay 0.05"]
    assert done, "nothing was delayed: this test proves nothing"
    grown = {name: value - before[name] for name, value in counted(cluster).items()}
    assert grown["recomputed"] == grown["failed"] == 0
    assert_idle(cluster)
