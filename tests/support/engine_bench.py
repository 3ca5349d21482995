"""Two engines of one kind at one real store, for the contract suite: what a test says about one must hold for the other.

`writer` has prefix caching, small chunks and little KV; `reader` has neither prefix caching nor a reason to preempt.
"""

import asyncio
import contextlib
import math
import random
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry

from shared import wire
from shared.kv.blocks import block_keys
from shared.kv.client import KvClient
from shared.kv.messages import Attached, Reserved
from shared.worker.engine import Engine, EngineDelta, EngineRequest, KvPlan
from tests.support.running_store import store_in_a_thread
from tests.support.sensitive_model import make_sensitive_model

BLOCK = 32
MAX_LEN = 1024
WRITER_BLOCKS = 40  # of 32 tokens: little more than one prompt of maximum length
CHUNK = 128
DEADLINE_S = 60.0


@dataclass
class Said:
    """One choice, put together."""

    tokens: list[int]
    text: str
    last: EngineDelta
    logprobs: list[wire.TokenLogprob] = field(default_factory=list)


@dataclass
class Bench:
    kind: str
    writer: Engine
    reader: Engine
    writer_kv: KvClient
    reader_kv: KvClient
    attached: Attached

    async def choices(
        self,
        engine: Engine,
        tokens: list[int],
        sampling: wire.Sampling,
        plan: KvPlan | None = None,
        *,
        salt: str = "",
        replay: list[bytes] | None = None,
    ) -> dict[int, Said]:
        found: dict[int, Said] = {}
        request = EngineRequest(
            id=uuid.uuid4().hex, tokens=tokens, sampling=sampling, kv=plan, salt=salt, replay=replay or []
        )
        async with asyncio.timeout(DEADLINE_S):
            async for delta in engine.generate(request):
                said = found.get(delta.choice) or Said([], "", delta)
                assert delta.choice not in found or said.last.finish is None, "a delta after the last one"
                found[delta.choice] = said
                said.tokens += delta.tokens
                said.text += delta.text
                said.logprobs += delta.logprobs or []
                said.last = delta
        return found

    async def say(
        self,
        engine: Engine,
        tokens: list[int],
        sampling: wire.Sampling,
        plan: KvPlan | None = None,
        *,
        salt: str = "",
        replay: list[bytes] | None = None,
    ) -> Said:
        return (await self.choices(engine, tokens, sampling, plan, salt=salt, replay=replay))[0]

    async def reserve(self, tokens: list[int], *, write: bool) -> tuple[str, Reserved]:
        """A lease of the writer's to write under, or of the reader's."""
        geometry, lease = self.attached.geometry, uuid.uuid4().hex
        client = self.writer_kv if write else self.reader_kv
        keys = block_keys(wire.pack_tokens(tokens), geometry.block_size, fingerprint=geometry.fingerprint)
        return lease, await client.reserve(lease=lease, request=lease, keys=keys, write=write, ttl_s=300)

    def plan(self, lease: str, slots: Reserved, *, save: bool) -> KvPlan:
        return KvPlan(
            arena=self.attached.arena,
            lease=lease,
            slots=slots.slots,
            words=slots.words,
            load=0 if save else len(slots.slots),
            save=save,
            write=[not committed for committed in slots.committed] if save else [],
        )

    async def save(self, tokens: list[int]) -> Said:
        """As a prefill worker does. All of the prompt's blocks are committed when it returns."""
        lease, slots = await self.reserve(tokens, write=True)
        said = await self.say(
            self.writer,
            tokens,
            wire.Sampling(max_tokens=1, temperature=0.0, ignore_eos=True),
            self.plan(lease, slots, save=True),
        )
        assert (await self.writer_kv.wait(lease, timeout_s=0)).complete, "the last delta came before the blocks"
        await self.writer_kv.release(lease)
        return said

    async def saved_plan(self, tokens: list[int]) -> KvPlan:
        """For a reader: every block is there, and stays."""
        await self.save(tokens)
        lease, slots = await self.reserve(tokens, write=False)
        assert all(slots.committed)
        return self.plan(lease, slots, save=False)

    def arena_slot(self, slot: int) -> tuple[Path, int, int]:
        """The file, and where the slot's bytes lie in it."""
        attached = self.attached
        return Path(attached.path), attached.slots_offset + slot * attached.slot_bytes, attached.slot_bytes

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        """An engine tells of itself when it has something to do: give it a little until it has."""
        async with asyncio.timeout(DEADLINE_S):
            while not reached():
                await self.say(self.writer, [1], wire.Sampling(max_tokens=1))
                assert what


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{length}-{seed}")
    return [rng.randrange(97, 123) for _ in range(length)]


@asynccontextmanager
async def running_bench(kind: str, folder: Path) -> AsyncIterator[Bench]:
    model = make_sensitive_model(folder / "model", max_model_len=MAX_LEN)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with store_in_a_thread(folder) as socket:
        start = _start_sim if kind == "sim" else _start_vllm
        writer = await start(model, socket, "writer")
        reader = await start(model, socket, "reader")
        clients = [KvClient(socket, session=name, worker=name) for name in ("writer", "reader")]
        try:
            attached = [await client.connect() for client in clients]
            yield Bench(kind, writer, reader, clients[0], clients[1], attached[0])
        finally:
            for client in clients:
                await client.close()
            await writer.close()
            await reader.close()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    # Python's resource tracker lives as long as this process.
    left = [child for child in left if _is_running(child) and "resource_tracker" not in " ".join(child.cmdline())]
    assert not left, "an engine left a process"
    assert "sim-copies" not in {thread.name for thread in threading.enumerate()}


def _is_running(process: psutil.Process) -> bool:
    """Neither gone nor a zombie that nobody has waited for yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


async def _start_sim(model: Path, socket: str, name: str) -> Engine:
    from shared.worker.sim.engine import SimEngine, SimSettings

    settings = SimSettings(
        model=str(model),
        args={**_arguments(name), "profile": "llama2-70b-h100"},
        kv_bytes=_blocks(name) * BLOCK * 2048,
        kv_socket=socket,
        session=name,
        worker=name,
        speed=math.inf,
    )
    return await SimEngine.start(settings, CollectorRegistry())


async def _start_vllm(model: Path, socket: str, name: str) -> Engine:
    from shared.worker.vllm_engine import EngineSettings
    from tests.support.own_engine import start_engine

    token_bytes = 4 * 2 * 2 * 64 * 4  # layers, keys and values, heads, head size, float32
    return await start_engine(
        EngineSettings(
            model=str(model),
            revision="",
            args={**_arguments(name), "dtype": "float32", "enforce_eager": True},
            kv_bytes=_blocks(name) * BLOCK * token_bytes,
            kv_socket=socket,
            session=name,
            worker=name,
            cpu_cores=frozenset(),
        )
    )


def _arguments(name: str) -> dict[str, object]:
    more = {"max_num_batched_tokens": CHUNK} if name == "writer" else {"enable_prefix_caching": False}
    return {"max_model_len": MAX_LEN, "block_size": BLOCK, "max_num_seqs": 32, **more}


def _blocks(name: str) -> int:
    return WRITER_BLOCKS if name == "writer" else 20 * WRITER_BLOCKS
