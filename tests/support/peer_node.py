"""A node in this process: a real store on its socket with its peers over TCP, and one worker with its ranks."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import xxhash
from prometheus_client import CollectorRegistry

from services.kv_transfer.arena import Arena
from services.kv_transfer.metrics import KvMetrics
from services.kv_transfer.peers.peers import Peers
from services.kv_transfer.server import KvServer, Outside
from services.kv_transfer.slots import GIB
from services.kv_transfer.store import Store
from shared import wire
from shared.kv.client import KvClient
from shared.kv.messages import Geometry, Reserved
from shared.kv.rank_client import RankClient
from shared.settings import KvSettings
from tests.support.running_store import SLOT_BYTES, small_geometry

DEADLINE_S = 10.0
SECRET = "of this cluster"  # noqa: S105


class PeerNode:
    def __init__(self, folder: Path, node: str, *, blocks: int, geometry: Geometry, peer_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.node = node
        self.registry = CollectorRegistry()
        self.geometry = geometry
        settings = KvSettings(
            cluster="c", id=node, node=node, kv_socket=str(folder / "kv.sock"), peer_secret=SECRET, peer_s=peer_s
        )
        size_bytes = 4096 + blocks * geometry.ranks * (geometry.slot_bytes + 8)
        self.arena = Arena.create(folder, "c", node, (size_bytes + 4096) / GIB)
        self.store = Store(node, size_bytes, self.arena.words)
        self.metrics = KvMetrics(self.registry, self.store)
        self.peers = Peers(settings, self.store, self.arena, self.metrics, lambda: self.server.pump())  # noqa: PLW0108 - made below
        self.server = KvServer(
            node,
            self.store,
            self.arena,
            self.metrics,
            Outside(
                host_closed=lambda _: None,
                key_changed=lambda _, __: None,
                check_push=self.peers.pushes.check,
                push_begun=self.peers.pushes.begin,
                push_ready=self.peers.pushes.ready,
                lease_ended=self.peers.lease_ended,
            ),
        )
        self.path = settings.kv_socket
        self.host = KvClient(self.path, session=node, worker=f"worker of {node}")
        self.ranks = [
            RankClient(self.path, session=node, worker=f"worker of {node}", rank=rank) for rank in range(geometry.ranks)
        ]

    async def attach(self) -> None:
        for rank in self.ranks:
            await asyncio.to_thread(rank.attach, self.geometry)
        await self.host.connect()

    def knows(self, other: "PeerNode", address: str = "") -> None:
        """As a beat tells it."""
        address = address or other.peers.address
        self.peers.directory.hear(
            wire.Heartbeat(role="kv", id=other.node, incarnation="1", node=other.node, peer_address=address)
        )

    async def want(self, lease: str, keys: list[bytes], **extra: object) -> Reserved:
        """As a decode job does."""
        return await self.host.reserve(lease=lease, request="r", keys=keys, write=False, ttl_s=60, **extra)

    async def produce(self, lease: str, keys: list[bytes], for_node: "PeerNode", for_lease: str) -> Reserved:
        """As a prefill job does for another node."""
        return await self.host.reserve(
            lease=lease,
            request="r",
            keys=keys,
            write=True,
            ttl_s=60,
            push_node=for_node.node,
            push_lease=for_lease,
        )

    async def write(self, lease: str, slots: Reserved, keys: list[bytes], *positions: int) -> None:
        """As an engine's ranks do."""
        for rank, client in enumerate(self.ranks):
            sums = []
            for position in positions:
                view = client.slot_view(slots.slots[position] + rank)
                view[:] = content(keys[position], rank)
                sums.append(xxhash.xxh3_64_intdigest(view))
            await asyncio.to_thread(client.commit, lease, list(positions), sums)

    async def fill(self, keys: list[bytes]) -> None:
        """Leave them cached."""
        slots = await self.host.reserve(lease=f"fill-{keys[0]!r}", request="r", keys=keys, write=True, ttl_s=60)
        missing = [position for position, is_there in enumerate(slots.committed) if not is_there]
        await self.write(f"fill-{keys[0]!r}", slots, keys, *missing)
        await self.host.release(f"fill-{keys[0]!r}")

    def reads(self, slot: int) -> list[bytes]:
        return [bytes(client.slot_view(slot + rank)) for rank, client in enumerate(self.ranks)]

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    def refused(self, reason: str) -> float:
        return self.metric("baton_kv_refused_frames_total", reason=reason)

    def failed(self, reason: str) -> float:
        return self.metric("baton_kv_failed_transfers_total", reason=reason)

    @property
    def moved_blocks(self) -> float:
        moved = self.metric("baton_kv_moved_bytes_total", path="peer")
        return moved / (self.geometry.slot_bytes * self.geometry.ranks)

    @property
    def held(self) -> dict[str, int]:
        """Slots that somebody holds, and leases; empty when idle."""
        states = {name: count for name, count in self.store.counts().items() if name not in ("free", "cached")}
        counts = {**states, "leases": self.store.gauges()["leases"], "lent": self.store.sessions.lent_blocks}
        return {name: count for name, count in counts.items() if count}

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        """Let the loop turn until it is so."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE_S
        while not reached():
            assert loop.time() < deadline, what
            await asyncio.sleep(0.001)

    async def close(self) -> None:
        await self.host.close()
        for rank in self.ranks:
            await asyncio.to_thread(rank.close)
        await self.server.close()
        await self.peers.close()
        self.arena.close()


def content(key: bytes, rank: int = 0) -> bytes:
    return random.Random(key + bytes([rank])).randbytes(SLOT_BYTES)


def keys_of(prompt: str, count: int) -> list[bytes]:
    return [f"{prompt}-{position}".encode().ljust(16, b".") for position in range(count)]


@asynccontextmanager
async def node(
    folder: Path,
    name: str,
    *,
    blocks: int = 16,
    ranks: int = 1,
    fingerprint: str = "f" * 64,
    peer_s: float = 5.0,
) -> AsyncIterator[PeerNode]:
    """It knows no other."""
    geometry = small_geometry(ranks, fingerprint=fingerprint)
    made = PeerNode(folder / name, name, blocks=blocks, geometry=geometry, peer_s=peer_s)
    await made.server.start(made.path)
    made.peers.listen()
    try:
        await made.attach()
        yield made
    finally:
        await made.close()


@asynccontextmanager
async def two_nodes(folder: Path, **options: object) -> AsyncIterator[tuple[PeerNode, PeerNode]]:
    """Prefill's and decode's. At the end neither holds anything."""
    async with AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(node(folder, "p", **options))
        decode = await stack.enter_async_context(node(folder, "d", **options))
        prefill.knows(decode)
        decode.knows(prefill)
        yield prefill, decode
        for one in (prefill, decode):
            await one.until(lambda one=one: not one.held, f"{one.node} holds {one.held}")
