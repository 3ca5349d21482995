"""The KV plane between two nodes: two real stores, a stand-in engine at each, and raw sockets beside them.

Bandwidth is measured on blocks that the source's store holds already, from the call that asks for them until all are
verified and committed at the target; exposed time on prompts that are computed in chunks, from the last chunk's commit
on. A figure is the median of the rounds, a ratio is taken within its round.
"""

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import psutil

from loadtest.cluster.stream import percentile
from loadtest.micro import bench
from loadtest.micro.kv_engine import TTL_S, WAIT_S, Connection, Engine, Hand, Handed, Push, Pushed, Shape, Use
from loadtest.micro.store_bench import new_keys

MIB, GB = 1 << 20, 1e9
NODE = "node-1"
CHUNKS = (1, 4, 16)
CHUNKED_BYTES = 32 * MIB
COMPUTE = 2.0  # a prompt takes this much longer to compute than to send
ATTEMPTS = 5  # of each figure and round


class PeerPlane:
    """The source's store is this node's, the target's another's."""

    def __init__(
        self, source: Connection, target: Engine, raw_gb_s: Callable[[], Awaitable[float]], pids: list[int]
    ) -> None:
        """`pids`: of both stores; their CPU time is what a transfer costs."""
        self._source = source
        self._target = target
        self._raw_gb_s = raw_gb_s
        self._stores = [psutil.Process(pid) for pid in pids]

    async def bandwidth(self, size_bytes: int, slot_bytes: int, count: int, rounds: int) -> dict[str, Any]:
        rows = []
        for number in range(rounds + 1):
            raw_gb_s = await self._raw_gb_s()
            times, cpu_s = [], 0.0
            for _ in range(count if number else 2):
                keys = new_keys(size_bytes // slot_bytes)
                await self._compute(keys)
                began_cpu_s = self._cpu_s()
                times.append(await self._hand(keys))
                cpu_s += self._cpu_s() - began_cpu_s
            gb_s = size_bytes / percentile(times, 0.5) / GB
            if number:  # the first warms up
                rows.append(
                    {
                        "GB/s": gb_s,
                        "raw GB/s": raw_gb_s,
                        "of raw": gb_s / raw_gb_s,
                        "CPU s/GB": cpu_s / (count * size_bytes / GB),
                        "p50 ms": 1e3 * percentile(times, 0.5),
                        "p99 ms": 1e3 * percentile(times, 0.99),
                    }
                )
        figures = {name: bench.figure([row[name] for row in rows]) for name in rows[0]}
        return {"size_mib": size_bytes / MIB, "slot_kib": slot_bytes / 1024, **figures}

    async def overlap(self, slot_bytes: int, rounds: int) -> list[dict[str, Any]]:
        """Exposed: what is left of the transfer when the last chunk has been committed."""
        count = CHUNKED_BYTES // slot_bytes
        rows: dict[int, list[dict[str, float]]] = {chunks: [] for chunks in CHUNKS}
        for _ in range(rounds):
            whole = []
            for _ in range(ATTEMPTS):
                keys = new_keys(count)
                await self._compute(keys)
                whole.append(await self._hand(keys))
            whole_s = percentile(whole, 0.5)
            for chunks in CHUNKS:
                found = [await self._chunked(new_keys(count), chunks, COMPUTE * whole_s) for _ in range(ATTEMPTS)]
                exposed_s = percentile(found, 0.5)
                rows[chunks].append(
                    {"exposed ms": 1e3 * exposed_s, "whole ms": 1e3 * whole_s, "of whole": exposed_s / whole_s}
                )
        return [
            {"chunks": chunks, **{name: bench.figure([row[name] for row in found]) for name in found[0]}}
            for chunks, found in rows.items()
        ]

    async def _compute(self, keys: list[bytes]) -> None:
        """The source's store holds these blocks from now on; another's never heard of them."""
        await self._source.send(Push(request=uuid.uuid4().hex, keys=keys, lease="", steps=1))
        await self._expect(Pushed)

    async def _hand(self, keys: list[bytes]) -> float:
        """Seconds until the target's store holds them all."""
        lease = await self._wanted(keys)
        try:
            await self._source.send(Hand(keys=keys, lease=lease, node=NODE))
            ended_ns = await self._until_there(lease)
            handed = await self._expect(Handed)
        finally:
            self._target.host.release_soon(lease)
        return (ended_ns - handed.began_ns) / 1e9

    async def _chunked(self, keys: list[bytes], chunks: int, compute_s: float) -> float:
        """Seconds from the last chunk's commit until the target's store holds the whole prompt."""
        lease = await self._wanted(keys)
        try:
            push = Push(request=lease, keys=keys, lease=lease, steps=chunks, node=NODE, compute_s=compute_s / chunks)
            await self._source.send(push)
            ended_ns = await self._until_there(lease)
            pushed = await self._expect(Pushed)
        finally:
            self._target.host.release_soon(lease)
        return (ended_ns - pushed.last_commit_ns) / 1e9

    async def _wanted(self, keys: list[bytes]) -> str:
        lease = uuid.uuid4().hex
        await self._target.host.reserve(lease=lease, request=lease, keys=keys, write=False, ttl_s=TTL_S)
        return lease

    async def _until_there(self, lease: str) -> int:
        ready = await self._target.host.wait(lease, WAIT_S)
        if not ready.complete:
            raise bench.Failed("the blocks did not all come")
        return time.monotonic_ns()

    async def _expect(self, kind: type[bench.T]) -> bench.T:
        found = await self._source.receive()
        if not isinstance(found, kind):
            raise bench.Failed(f"the source sent {found}")
        return found

    def _cpu_s(self) -> float:
        return sum(sum(process.cpu_times()[:2]) for process in self._stores)


async def attach(path: str, shape: Shape) -> Connection:
    """The source's process, attached with blocks of this shape."""
    source = await Connection.open(path)
    await source.send(Use(shape=shape))
    await source.receive()
    return source
