"""With so little KV that vLLM preempts, on both sides, the output is still exact.

The engines' own KV holds 2,500 tokens. Prefill computes four prompts of 1,000 side by side in small chunks; decode
runs eight streams whose outputs cross several block boundaries before they are preempted and loaded again.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, running_cluster
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

KV_GIB = 0.0098  # 80 pages of 32 tokens
LONG = [(1000, 8)] * 6  # prompt, output
STREAMS = [(300 + index, 4 * BLOCK + 20) for index in range(8)]
CHUNKS = {"max_num_batched_tokens": 256, "long_prefill_token_threshold": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sensitive_model(tmp_path_factory.mktemp("model") / "sensitive", max_model_len=MAX_LEN)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """Each alone, with room enough."""
    engine = {**ENGINE, "model": str(model), "kv_cache_memory_bytes": 1 << 28}
    batches: list[list[dict[str, Any]]] = [
        [{"tokens": tokens_of(prompt_of(length, index)), "params": greedy(output)}]
        for index, (length, output) in enumerate(LONG + STREAMS)
    ]
    results = run_reference(tmp_path_factory.mktemp("reference"), engine, batches)
    return [answers[0][0]["token_ids"] for answers in results]


@pytest.fixture(scope="module")
def cluster(model: Path, reference: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(
        tmp_path_factory.mktemp("home"),
        f"--model={model}",
        f"--served-model-name={MODEL}",
        "--arrangement=split",
        f"--kv-gib={KV_GIB}",
        "--arena-gib=0.25",
        *engine_options(**CHUNKS),
    ) as cluster:
        yield cluster


async def test_prefill_preempted(cluster: Cluster, reference: list[list[int]]) -> None:
    client = cluster.async_client()
    got = await asyncio.gather(
        *(stream(client, prompt_of(n, index), greedy(output)) for index, (n, output) in enumerate(LONG))
    )
    assert got == reference[: len(LONG)]
    assert cluster.metrics("prefill")["baton_engine_preemptions"] > 0
    assert_idle(cluster)


async def test_decode_preempted(cluster: Cluster, reference: list[list[int]]) -> None:
    client = cluster.async_client()
    before = cluster.metrics("decode")["baton_engine_preemptions"]
    got = await asyncio.gather(
        *(stream(client, prompt_of(n, len(LONG) + index), greedy(output)) for index, (n, output) in enumerate(STREAMS))
    )
    assert got == reference[len(LONG) :]
    assert cluster.metrics("decode")["baton_engine_preemptions"] > before
    assert_idle(cluster)
