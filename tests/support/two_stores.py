"""Two kv_transfer processes as two nodes of a cluster, and a worker at each in this process, over unix sockets.

Each may run in a network namespace of its own: sockets in the file system are the same everywhere.
"""

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import xxhash

from shared.errors import KvLost
from shared.kv.client import KvClient
from shared.kv.messages import Geometry, Reserved
from shared.kv.rank_client import RankClient
from shared.settings import to_environ

SLOT_BYTES = 256 * 1024
GEOMETRY = Geometry(fingerprint="f" * 64, block_size=16, slot_bytes=SLOT_BYTES, ranks=1, max_model_len=256)
START_S = 60.0
WAIT_S = 60.0


@dataclass
class Worker:
    """One engine rank and its host."""

    node: str
    store: psutil.Process
    host: KvClient
    rank: RankClient

    async def want(self, lease: str, keys: list[bytes]) -> Reserved:
        return await self.host.reserve(lease=lease, request="r", keys=keys, write=False, ttl_s=600)

    async def write(self, lease: str, slots: Reserved, keys: list[bytes], *positions: int) -> None:
        sums = []
        for position in positions:
            view = self.rank.slot_view(slots.slots[position])
            view[:] = content(keys[position])
            sums.append(xxhash.xxh3_64_intdigest(view))
        await asyncio.to_thread(self.rank.commit, lease, list(positions), sums)

    async def produce(self, lease: str, keys: list[bytes], for_node: str, for_lease: str) -> Reserved:
        return await self.host.reserve(
            lease=lease,
            request="r",
            keys=keys,
            write=True,
            ttl_s=600,
            push_node=for_node,
            push_lease=for_lease,
        )

    async def reads(self, slots: list[int]) -> list[bytes]:
        return [bytes(self.rank.slot_view(slot)) for slot in slots]


def content(key: bytes) -> bytes:
    return random.Random(key).randbytes(SLOT_BYTES)


def keys_of(name: str, count: int) -> list[bytes]:
    return [f"{name}-{position}".encode().ljust(16, b".") for position in range(count)]


@asynccontextmanager
async def two_stores(
    folder: Path,
    nats_url: str,
    *,
    within: Sequence[Sequence[str]] = ((), ()),
    settings: Sequence[dict[str, object]] = ({}, {}),
    peer_s: float = 1.0,
) -> AsyncIterator[tuple[Worker, Worker]]:
    """`within`: before each command, e.g. `ip netns exec NAME`; `settings`: of each store, beside the usual."""
    async with AsyncExitStack() as stack:
        workers = []
        for number, (prefix, own) in enumerate(zip(within, settings, strict=True)):
            name = f"node-{number}"
            home = folder / name
            home.mkdir()
            values = {
                "cluster": "stores",
                "id": f"kv-{number}",
                "node": name,
                "nats_url": nats_url,
                "redis_url": f"unix://{folder}/nobody.sock",
                "kv_socket": str(home / "kv.sock"),
                "arena_gib": 0.02,
                "shm_dir": str(home),
                "peer_secret": "of these two",
                "peer_s": peer_s,
                **own,
            }
            workers.append(await stack.enter_async_context(_worker(name, values, prefix)))
        yield workers[0], workers[1]


@asynccontextmanager
async def _worker(name: str, values: dict[str, object], prefix: Sequence[str]) -> AsyncIterator[Worker]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("BATON_")}
    process = await asyncio.create_subprocess_exec(
        *prefix,
        sys.executable,
        "-m",
        "services.kv_transfer",
        env={**environ, **to_environ(values)},
        stderr=asyncio.subprocess.DEVNULL,
    )
    path = str(values["kv_socket"])
    rank = RankClient(path, session=name, worker=name, rank=0)
    host = KvClient(path, session=name, worker=name)
    try:
        await asyncio.to_thread(rank.attach, GEOMETRY, START_S)
        await host.connect()
        yield Worker(name, psutil.Process(process.pid), host, rank)
    finally:
        await host.close()
        await asyncio.to_thread(rank.close)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def hand_over(p: Worker, d: Worker, name: str, count: int = 12) -> None:
    """A whole prompt, chunk by chunk; what arrives is what was written."""
    keys = keys_of(name, count)
    await d.want(f"{name}-d", keys)
    slots = await until_known(p, d, f"{name}-p", keys, f"{name}-d")
    for start in range(0, count, 4):
        await p.write(f"{name}-p", slots, keys, *range(start, min(start + 4, count)))
    ready = await d.host.wait(f"{name}-d", WAIT_S)
    assert ready.complete
    assert await d.reads(ready.slots) == [content(key) for key in keys]
    assert (await p.host.wait(f"{name}-p", WAIT_S)).complete
    await p.host.release(f"{name}-p")
    await d.host.release(f"{name}-d")


async def arrived(d: Worker, key: bytes) -> None:
    """Its store holds this block."""
    await d.want(f"look-{key!r}", [key])
    assert (await d.host.wait(f"look-{key!r}", WAIT_S)).complete
    await d.host.release(f"look-{key!r}")


async def until_known(p: Worker, d: Worker, lease: str, keys: list[bytes], for_lease: str) -> Reserved:
    """The stores learn of each other by their beats, and rest after a link has failed."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                return await p.produce(lease, keys, d.node, for_lease)
            except KvLost:
                await asyncio.sleep(0.05)  # nothing announces it to a worker
