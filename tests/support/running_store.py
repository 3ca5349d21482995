"""A real store on a real unix socket, in this process: small arena, no bus, no Redis."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry

from services.kv_transfer.arena import Arena
from services.kv_transfer.metrics import KvMetrics
from services.kv_transfer.server import KvServer, Outside
from services.kv_transfer.slots import GIB
from services.kv_transfer.store import Store
from shared.kv.messages import Geometry

SLOT_BYTES = 8192
BLOCK_SIZE = 16
DEADLINE_S = 10.0


def small_geometry(ranks: int = 1, max_model_len: int = 64, fingerprint: str = "f" * 64) -> Geometry:
    return Geometry(
        fingerprint=fingerprint,
        block_size=BLOCK_SIZE,
        slot_bytes=SLOT_BYTES,
        ranks=ranks,
        max_model_len=max_model_len,
    )


class RunningStore:
    """The parts of a started store, and what it told the outside."""

    def __init__(self, folder: Path, blocks: int, ranks: int) -> None:
        self.path = str(folder / "kv.sock")
        self.registry = CollectorRegistry()
        self.lost: list[str] = []
        self.changes: list[tuple[bytes, bool]] = []
        size_bytes = 4096 + blocks * ranks * (SLOT_BYTES + 8)
        # choose_size rounds down to pages
        self.arena = Arena.create(folder, "test", "node-0", (size_bytes + 4096) / GIB)
        self.store = Store("node-0", size_bytes, self.arena.words)
        self.server = KvServer(
            "node-0",
            self.store,
            self.arena,
            KvMetrics(self.registry, self.store),
            Outside(host_closed=self.lost.append, key_changed=lambda key, held: self.changes.append((key, held))),
        )

    def states(self) -> dict[str, int]:
        return {state: count for state, count in self.store.counts().items() if count}

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        """Let the loop turn until `reached()`, at most DEADLINE_S."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE_S
        while not reached():
            assert loop.time() < deadline, what
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self.server.close()
        self.arena.close()


@asynccontextmanager
async def running_store(folder: Path, *, blocks: int = 8, ranks: int = 1) -> AsyncIterator[RunningStore]:
    store = RunningStore(folder, blocks, ranks)
    await store.server.start(store.path)
    try:
        yield store
    finally:
        await store.close()


@contextmanager
def store_in_a_thread(folder: Path, *, size_bytes: int = GIB // 2) -> Iterator[str]:
    """A store on a loop of its own, for tests whose loop an engine blocks while it starts. Yields its socket."""
    ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, str]] = Future()

    async def serve() -> None:
        async with running_store(folder, blocks=(size_bytes - 4096) // (SLOT_BYTES + 8)) as store:
            stop = asyncio.Event()
            ready.set_result((asyncio.get_running_loop(), stop, store.path))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="store")
    thread.start()
    loop, stop, path = ready.result(timeout=30)
    try:
        yield path
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=30)
