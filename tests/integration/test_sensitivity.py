"""The exactness tests have teeth: spoiling any one KV block on its way to decode changes the output.

A real vLLM engine with Baton's connector and a real store, in this process. A request saves its blocks; then the same
prompt is decoded from the store, once untouched and once for each block with that block's bytes zeroed in the arena.
"""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from shared import wire
from shared.kv.blocks import block_keys
from shared.kv.client import KvClient
from shared.kv.messages import Attached, Reserved
from shared.worker.engine import EngineRequest, KvPlan
from shared.worker.vllm_engine import EngineSettings, VllmEngine
from tests.support.own_engine import start_engine
from tests.support.running_store import store_in_a_thread
from tests.support.sensitive_model import make_sensitive_model

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(400), pytest.mark.asyncio(loop_scope="module")]

BLOCK = 32
OUTPUT = 24
MAX_LEN = 2048
LENGTHS = [2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 1000, MAX_LEN - OUTPUT - 1]
GREEDY = wire.Sampling(max_tokens=OUTPUT, temperature=0.0, ignore_eos=True)


@dataclass
class Bench:
    engine: VllmEngine
    kv: KvClient
    attached: Attached
    zeros: tuple[int, int] = (0, 0)  # slot and word of a committed block whose bytes have been overwritten

    async def generate(self, tokens: list[int], sampling: wire.Sampling, plan: KvPlan | None) -> tuple[list[int], int]:
        """Returns the output and how many prompt tokens were recomputed after a failed load."""
        found: list[int] = []
        recomputed = 0
        request = EngineRequest(id=uuid.uuid4().hex, tokens=tokens, sampling=sampling, kv=plan)
        async for delta in self.engine.generate(request):
            found += delta.tokens
            recomputed += delta.recomputed_tokens
        return found, recomputed

    def plan(self, lease: str, slots: Reserved, *, save: bool) -> KvPlan:
        return KvPlan(
            arena=self.attached.arena,
            lease=lease,
            slots=slots.slots,
            words=slots.words,
            load=0 if save else len(slots.slots),
            save=save,
            write=[save] * len(slots.slots),
        )

    async def reserve(self, tokens: list[int], *, write: bool) -> tuple[str, Reserved]:
        geometry = self.attached.geometry
        lease = uuid.uuid4().hex
        keys = block_keys(wire.pack_tokens(tokens), geometry.block_size, fingerprint=geometry.fingerprint)
        return lease, await self.kv.reserve(lease=lease, request=lease, keys=keys, write=write, ttl_s=300)

    async def save(self, tokens: list[int]) -> None:
        lease, slots = await self.reserve(tokens, write=True)
        await self.generate(tokens, wire.Sampling(max_tokens=1, temperature=0.0), self.plan(lease, slots, save=True))
        assert (await self.kv.wait(lease, timeout_s=5)).complete
        await self.kv.release(lease)

    async def make_zeros(self) -> None:
        """A block that stays pinned for the whole module, zeroed behind the store's back."""
        tokens = [1] * BLOCK
        await self.save(tokens)
        _, slots = await self.reserve(tokens, write=False)
        attached = self.attached
        with Path(attached.path).open("r+b") as arena:
            arena.seek(attached.slots_offset + slots.slots[0] * attached.slot_bytes)
            arena.write(bytes(attached.slot_bytes))
        self.zeros = slots.slots[0], slots.words[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    folder = tmp_path_factory.mktemp("sensitivity")
    model = make_sensitive_model(folder / "model", max_model_len=MAX_LEN)
    with store_in_a_thread(folder) as socket:
        engine = await start_engine(
            EngineSettings(
                model=str(model),
                revision="",
                # The engine's own prefix cache would hide what the store hands over.
                args={
                    "dtype": "float32",
                    "max_model_len": MAX_LEN,
                    "block_size": BLOCK,
                    "enforce_eager": True,
                    "enable_prefix_caching": False,
                },
                kv_bytes=1 << 28,
                kv_socket=socket,
                session="test",
                worker="test",
                cpu_cores=frozenset(),
            )
        )
        kv = KvClient(socket, session="test", worker="test")
        try:
            bench = Bench(engine, kv, await kv.connect())
            await bench.make_zeros()
            yield bench
        finally:
            await kv.close()
            await engine.close()


def prompt_of(length: int) -> list[int]:
    rng = random.Random(length)
    return [rng.randrange(97, 123) for _ in range(length)]


@pytest.mark.parametrize("length", LENGTHS)
async def test_every_block_matters(bench: Bench, length: int) -> None:
    tokens = prompt_of(length)
    await bench.save(tokens)
    lease, slots = await bench.reserve(tokens, write=False)
    assert all(slots.committed)
    plan = bench.plan(lease, slots, save=False)
    clean, recomputed = await bench.generate(tokens, GREEDY, plan)
    assert recomputed == 0
    alone, _ = await bench.generate(tokens, GREEDY, None)
    assert clean == alone  # what came out of the store is what the engine computes itself
    # The last token is computed by decode: a block that holds nothing else is not read.
    blocks = -(-(length - 1) // BLOCK)
    spoiled = await asyncio.gather(*(spoil_one(bench, tokens, plan, block) for block in range(blocks)))
    unchanged = [block for block, output in enumerate(spoiled) if output == clean]
    assert not unchanged, f"spoiling blocks {unchanged} of {blocks} changed nothing"
    await bench.kv.release(lease)


async def spoil_one(bench: Bench, tokens: list[int], plan: KvPlan, block: int) -> list[int]:
    """The output when this block is read from a slot full of zeros."""
    slots, words = list(plan.slots), list(plan.words)
    slots[block], words[block] = bench.zeros
    spoiled = KvPlan(arena=plan.arena, lease=plan.lease, slots=slots, words=words, load=plan.load)
    return (await bench.generate(tokens, GREEDY, spoiled))[0]


async def test_a_slot_with_another_owner_is_recomputed(bench: Bench) -> None:
    tokens = prompt_of(500)
    await bench.save(tokens)
    lease, slots = await bench.reserve(tokens, write=False)
    plan = bench.plan(lease, slots, save=False)
    clean, _ = await bench.generate(tokens, GREEDY, plan)
    stale = KvPlan(
        arena=plan.arena,
        lease=lease,
        slots=plan.slots,
        words=[word + (2 if block == 3 else 0) for block, word in enumerate(plan.words)],
        load=plan.load,
    )
    again, recomputed = await bench.generate(tokens, GREEDY, stale)
    assert again == clean
    assert recomputed == 499 - 3 * BLOCK
    await bench.kv.release(lease)


async def test_another_arena_is_recomputed(bench: Bench) -> None:
    tokens = prompt_of(100)
    await bench.save(tokens)
    lease, slots = await bench.reserve(tokens, write=False)
    plan = bench.plan(lease, slots, save=False)
    clean, _ = await bench.generate(tokens, GREEDY, plan)
    foreign = KvPlan(arena="gone", lease=lease, slots=plan.slots, words=plan.words, load=plan.load)
    again, recomputed = await bench.generate(tokens, GREEDY, foreign)
    assert again == clean
    assert recomputed == 99
    await bench.kv.release(lease)
