"""The engine by itself, without a store."""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from shared import wire
from shared.errors import EngineFailed, InvalidRequest, KvMismatch, SettingsError, UnsupportedParameter
from shared.kv.blocks import block_keys
from shared.kv.client import KvClient
from shared.worker.engine import EngineDelta, EngineRequest, KvPlan
from shared.worker.sim.engine import SimEngine, SimSettings
from shared.worker.sim.oracle import Oracle
from shared.worker.sim.profile import load_profile
from tests.support.running_store import store_in_a_thread

DEMO = str(Path(__file__).parents[2] / "models" / "demo")
DEADLINE_S = 60.0


@asynccontextmanager
async def running(
    *, speed: float = math.inf, has_kv: bool = True, kv_bytes: int = 1 << 27, **args: Any
) -> AsyncIterator[SimEngine]:
    settings = SimSettings(
        model=DEMO, args={"max_model_len": 1024, **args}, kv_bytes=kv_bytes, speed=speed, has_kv=has_kv
    )
    engine = await SimEngine.start(settings, CollectorRegistry())
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield engine
    finally:
        await engine.close()


async def collect(engine: SimEngine, prompt: list[int], **sampling: Any) -> list[EngineDelta]:
    request = EngineRequest(id=f"{prompt[:3]}-{len(prompt)}", tokens=prompt, sampling=wire.Sampling(**sampling))
    return await collect_all(engine, request)


async def collect_all(engine: SimEngine, request: EngineRequest) -> list[EngineDelta]:
    return [delta async for delta in engine.generate(request)]


@pytest.mark.parametrize("has_kv", [True, False])
async def test_it_answers_as_the_oracle(has_kv: bool) -> None:
    oracle = Oracle.load(DEMO, engine_args={"max_model_len": 1024}, has_kv=has_kv)
    prompts = [[number] * length for number, length in enumerate((1, 31, 32, 33, 500, 900))]
    async with running(has_kv=has_kv, max_num_batched_tokens=100) as engine:
        found = await asyncio.gather(*(collect(engine, prompt, max_tokens=40, seed=3) for prompt in prompts))
    for prompt, deltas in zip(prompts, found, strict=True):
        assert [token for delta in deltas for token in delta.tokens] == oracle.expected_tokens(prompt, 40, seed=3)
        assert "".join(delta.text for delta in deltas) == oracle.expected_text(prompt, 40, seed=3)


async def test_large_steps_are_worked_on_in_a_thread() -> None:
    """More than INLINE_BYTES: some leave while theirs are written."""
    prompts = [[number] * 900 for number in range(12)]
    oracle = Oracle.load(DEMO, engine_args={"max_model_len": 1024, "kv_bytes_per_token": 16384})
    async with running(kv_bytes=1 << 28, kv_bytes_per_token=16384) as engine:
        tasks = [asyncio.ensure_future(collect(engine, prompt, max_tokens=5)) for prompt in prompts]
        await asyncio.sleep(0)
        for task in tasks[::3]:
            await asyncio.sleep(0)
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        for prompt, deltas in zip(prompts, found, strict=True):
            if not isinstance(deltas, BaseException):
                assert [t for delta in deltas for t in delta.tokens] == oracle.expected_tokens(prompt, 5)
        assert engine.load().kv_usage == 0


@pytest.mark.parametrize(
    "sampling",
    [
        {"logprobs": 1},
        {"prompt_logprobs": 0},
        {"structured": {"json_object": True}},
        {"logit_bias": {5: 1.0}},
        {"bad_words": ["x"]},
    ],
)
async def test_what_it_does_not_have_is_refused(sampling: dict[str, Any]) -> None:
    async with running() as engine:
        with pytest.raises(UnsupportedParameter, match="the sim engine has no"):
            await collect(engine, [1, 2, 3], max_tokens=1, **sampling)
        for prompt in ([], [1] * 1024, [1 << 30]):
            with pytest.raises(InvalidRequest):
                await collect(engine, prompt, max_tokens=1)


async def test_a_plan_without_a_store_is_recomputed() -> None:
    plan = KvPlan(arena="a", lease="l", slots=[0, 1], words=[2, 2], load=2, save=True, write=[True, True])
    oracle = Oracle.load(DEMO, engine_args={"max_model_len": 1024})
    async with running() as engine:
        request = EngineRequest(id="r", tokens=[5] * 50, sampling=wire.Sampling(max_tokens=4), kv=plan)
        deltas = [delta async for delta in engine.generate(request)]
    assert [token for delta in deltas for token in delta.tokens] == oracle.expected_tokens([5] * 50, 4)
    assert (deltas[-1].recomputed_tokens, deltas[-1].computed_tokens) == (49, 50)


async def test_steps_take_the_profiles_time_and_signs_of_life_go_on() -> None:
    """A lower bound only: a busy machine may take longer, and says so."""
    async with running(speed=20.0) as engine:
        loop = asyncio.get_running_loop()
        began = loop.time()
        deltas = await collect(engine, [1] * 100, max_tokens=21)
        assert [len(delta.tokens) for delta in deltas] == [1] * 21, "one delta a step"
        # About 50 ms of prefill and 20 steps of 30 ms at a twentieth.
        profile = engine._shape.profile
        least_s = (profile.step_s([(100, 0)]) + 20 * profile.step_s([], (1, 100))) / 20
        assert loop.time() - began >= least_s * 0.99
        load = engine.load()
        assert load.decode_step_s >= profile.step_s([], (1, 100)) / 20 * 0.5
        await engine.check_health()
        assert engine.silent_s() < DEADLINE_S


async def test_no_block_is_in_the_store_before_it_is_computed(tmp_path: Path) -> None:
    """The store hears of a chunk when its step is over, however fast it was written."""
    tokens = [9] * 64
    with store_in_a_thread(tmp_path, size_bytes=1 << 24) as path:
        settings = SimSettings(
            model=DEMO,
            args={"max_model_len": 1024, "profile": "llama2-70b-h100"},
            kv_socket=path,
            session="s",
            worker="w",
            speed=0.1,
        )
        engine = await SimEngine.start(settings, CollectorRegistry())
        step_s = load_profile("llama2-70b-h100").step_s([(64, 0)], (0, 0)) / settings.speed
        client = KvClient(path, session="s", worker="w")
        try:
            attached = await client.connect()
            geometry = attached.geometry
            keys = block_keys(wire.pack_tokens(tokens), geometry.block_size, fingerprint=geometry.fingerprint)
            slots = await client.reserve(lease="l", request="r", keys=keys, write=True, ttl_s=60)
            plan = KvPlan(
                arena=attached.arena,
                lease="l",
                slots=slots.slots,
                words=slots.words,
                save=True,
                write=[True] * len(keys),
            )
            request = EngineRequest(id="r", tokens=tokens, sampling=wire.Sampling(max_tokens=1), kv=plan)
            began_s = time.monotonic()
            answer = asyncio.create_task(collect_all(engine, request))
            assert (await client.wait("l", timeout_s=DEADLINE_S)).complete
            assert time.monotonic() - began_s >= step_s
            assert len(await answer) == 1
        finally:
            await client.close()
            await engine.close()


async def test_an_engine_of_another_shape_is_refused_and_both_shapes_are_named(tmp_path: Path) -> None:
    def settings(worker: str, block_size: int) -> SimSettings:
        args = {"max_model_len": 1024, "block_size": block_size}
        return SimSettings(model=DEMO, args=args, kv_socket=path, session=worker, worker=worker)

    with store_in_a_thread(tmp_path, size_bytes=1 << 24) as path:
        first = await SimEngine.start(settings("prefill-0", 32), CollectorRegistry())
        try:
            with pytest.raises(
                KvMismatch, match=r"decode-0 has \[.*block_size 64.*serves \[.*block_size 32.*prefill-0"
            ):
                await SimEngine.start(settings("decode-0", 64), CollectorRegistry())
        finally:
            await first.close()


async def test_nobody_hangs_when_it_is_closed() -> None:
    async with running(speed=0.001) as engine:
        waiting = asyncio.ensure_future(collect(engine, [1, 2], max_tokens=5))
        async with aclosing(engine.generate(EngineRequest(id="x", tokens=[3], sampling=wire.Sampling(max_tokens=1)))):
            pass
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineFailed):
            await waiting
        with pytest.raises(EngineFailed):
            await engine.check_health()
        with pytest.raises(EngineFailed):
            await collect(engine, [1], max_tokens=1)


async def test_too_little_kv_for_one_prompt_is_refused() -> None:
    with pytest.raises(SettingsError, match="kv_gib"):
        async with running(kv_bytes=1 << 20):
            pass
