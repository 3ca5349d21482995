"""Engines of several ranks, and those with an FP8 cache: a hand-off through the store equals computing it oneself.

One engine each, without a prefix cache of its own: it writes a prompt's blocks as a prefill worker does, then loads them
as a decode worker does. What it says to the prompt alone is the measure: an unsplit engine of the same shape.
"""

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from shared import wire
from shared.kv.client import KvClient
from shared.worker.vllm_engine import EngineSettings, VllmEngine
from tests.support.engine_bench import BLOCK, Bench, prompt_of
from tests.support.own_engine import start_engine
from tests.support.running_store import store_in_a_thread
from tests.support.sensitive_model import HEAD_SIZE, KV_HEADS, LAYERS, make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

MAX_LEN = 512
GREEDY = wire.Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
LENGTHS = [2, BLOCK, BLOCK + 1, 300]
TOKEN_VALUES = LAYERS * KV_HEADS * 2 * HEAD_SIZE  # of one token's keys and values


@dataclass(frozen=True)
class Shape:
    arguments: dict[str, Any]
    ranks: int
    slot_bytes: int
    layers: str = ""  # of each pipeline stage


SHAPES = {
    "tensor": Shape({"tensor_parallel_size": 2, "dtype": "float32"}, 2, BLOCK * TOKEN_VALUES * 4 // 2),
    # Slots are as long as the longer stage needs.
    "pipeline": Shape(
        {"pipeline_parallel_size": 2, "dtype": "float32"},
        2,
        BLOCK * TOKEN_VALUES * 4 * 3 // LAYERS,
        layers="1,3",
    ),
    "fp8": Shape({"kv_cache_dtype": "fp8", "dtype": "bfloat16"}, 1, BLOCK * TOKEN_VALUES),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=SHAPES)
async def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    shape, folder = SHAPES[request.param], tmp_path_factory.mktemp(request.param)
    model = make_sensitive_model(folder / "model", max_model_len=MAX_LEN)
    if shape.layers:
        os.environ["VLLM_PP_LAYER_PARTITION"] = shape.layers
    before = shared_names()
    with store_in_a_thread(folder) as socket:
        try:
            engine = await start(model, socket, **shape.arguments)
        finally:
            os.environ.pop("VLLM_PP_LAYER_PARTITION", None)
        assert shared_names() <= before, "what ranks share would outlive a killed engine"
        client = KvClient(socket, session="one", worker="one")
        try:
            attached = await client.connect()
            assert (attached.geometry.ranks, attached.slot_bytes) == (shape.ranks, shape.slot_bytes)
            yield Bench("vllm", engine, engine, client, client, attached)
        finally:
            await client.close()
            await engine.close()


def shared_names() -> set[Path]:
    return set(Path("/dev/shm").glob("vllm_dist_*"))


async def start(model: Path, socket: str, *, name: str = "one", **arguments: Any) -> VllmEngine:
    return await start_engine(
        EngineSettings(
            model=str(model),
            revision="",
            args={
                "max_model_len": MAX_LEN,
                "block_size": BLOCK,
                "enable_prefix_caching": False,
                **arguments,
            },
            kv_bytes=1 << 26,
            kv_socket=socket,
            session=name,
            worker=name,
            cpu_cores=frozenset(),
        )
    )


@pytest.mark.parametrize("length", LENGTHS)
async def test_split_is_exact(bench: Bench, length: int) -> None:
    tokens = prompt_of(length, 30)
    whole = await bench.say(bench.writer, tokens, GREEDY)
    split = await bench.say(bench.writer, tokens, GREEDY, await bench.saved_plan(tokens))
    assert split.tokens == whole.tokens
    assert (split.last.loaded_tokens, split.last.recomputed_tokens) == (length - 1, 0)


@pytest.mark.parametrize("block", [0, 4])
async def test_every_ranks_bytes_matter(bench: Bench, block: int) -> None:
    """With one rank's slot of one block zeroed the text is another."""
    tokens = prompt_of(5 * BLOCK + 7, 50)
    whole = await bench.say(bench.writer, tokens, GREEDY)
    plan = await bench.saved_plan(tokens)
    for rank in range(bench.attached.geometry.ranks):
        path, offset, size = bench.arena_slot(plan.slots[block] + rank)
        with path.open("r+b") as arena:
            arena.seek(offset)
            right = arena.read(size)
            assert any(right), "nothing was written"
            arena.seek(offset)
            arena.write(bytes(size))
            arena.flush()
            assert (await bench.say(bench.writer, tokens, GREEDY, plan)).tokens != whole.tokens
            arena.seek(offset)
            arena.write(right)
    assert (await bench.say(bench.writer, tokens, GREEDY, plan)).tokens == whole.tokens
