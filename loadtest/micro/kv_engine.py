"""Stand-ins for two engines of a node: numpy pages, and the same calls to the store that the connector makes.

The target is the decode worker and lives in the measuring process; the source is the prefill worker, a process of its
own (`python -m loadtest.micro.kv_engine STORE SOURCE_SOCKET`): their copies meet only in memory, as real ones do.
Invariants: a page read is a page that nobody has touched for long; clocks of both are the same machine's, in
nanoseconds; a block that arrives changed ends the measurement.
"""

import asyncio
import contextlib
import struct
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import msgspec
import numpy as np
import xxhash

from loadtest.micro.bench import Failed
from shared.errors import BatonError, KvMismatch
from shared.kv.client import KvClient
from shared.kv.messages import Attached, Geometry, Ready
from shared.kv.rank_client import RankClient

TTL_S = 60.0
WAIT_S = 30.0
PAGE_BYTES = 4096
SETTLE_S = 5.0
SETTLE_STEP_S = 0.01
LENGTH = struct.Struct("<I")


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a block looks like."""

    slot_bytes: int
    layers: int
    pool_bytes: int  # of an engine's pages

    @property
    def geometry(self) -> Geometry:
        # Two prompts of maximum length must fit any arena; the real limit here is the arena itself.
        return Geometry(
            fingerprint=f"{self.slot_bytes:064x}", block_size=16, slot_bytes=self.slot_bytes, ranks=1, max_model_len=16
        )


class Use(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the source: attach with blocks of this shape."""

    shape: Shape


class Push(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the source: compute, that is copy out, these blocks for that lease, in so many steps."""

    request: str
    keys: list[bytes]
    lease: str
    steps: int
    node: str = ""  # whose store the lease is of; empty: the source's own
    compute_s: float = 0.0  # before each step


class Hand(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """To the source: these blocks, which its store holds, go to that lease of another node's store."""

    keys: list[bytes]
    lease: str
    node: str


class Handed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """When the store was asked, by time.monotonic_ns."""

    began_ns: int


class InUse(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    pass


class Broken(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    reason: str


class Pushed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Seconds, and two moments of time.monotonic_ns."""

    reserve_s: float
    copy_s: float
    checksum_s: float
    commit_s: float  # of all steps but the last
    began_ns: int  # the first copy
    last_commit_ns: int  # sent
    checksums: list[int]


Message = Use | Push | Hand | Handed | InUse | Broken | Pushed


class Times(msgspec.Struct, frozen=True, kw_only=True):
    """One hand-off, in seconds."""

    reserve: float
    reserve_source: float
    copy_out: float
    checksum: float
    commit: float
    notice: float  # from the last commit's sending until the target's event loop knows
    pick_up: float  # until the target's copying thread begins
    copy_in: float
    total: float  # from the first copy's begin to the last one's end


class Arrived(msgspec.Struct, frozen=True, kw_only=True):
    times: Times
    blocks: list[int]  # of the target's pages
    checksums: list[int]  # as the source computed them


class Pages:
    """An engine's KV cache: layer after layer, a page of each makes a block."""

    def __init__(self, shape: Shape) -> None:
        self._page = shape.slot_bytes // shape.layers
        self._count = shape.pool_bytes // shape.slot_bytes
        random = np.random.default_rng()
        size = self._count * self._page
        self._layers = [random.integers(0, 256, size, dtype=np.uint8).data for _ in range(shape.layers)]
        self._turn = 0

    def take(self, count: int) -> list[int]:
        """The blocks that have been left alone for longest."""
        taken = [(self._turn + step) % self._count for step in range(count)]
        self._turn = (self._turn + count) % self._count
        return taken

    def read(self, block: int, slot: memoryview) -> None:
        page = self._page
        for number, layer in enumerate(self._layers):
            slot[number * page : (number + 1) * page] = layer[block * page : (block + 1) * page]

    def write(self, block: int, slot: memoryview) -> None:
        page = self._page
        for number, layer in enumerate(self._layers):
            layer[block * page : (block + 1) * page] = slot[number * page : (number + 1) * page]

    def checksum(self, block: int) -> int:
        page = self._page
        whole = b"".join(layer[block * page : (block + 1) * page] for layer in self._layers)
        return xxhash.xxh3_64_intdigest(whole)


class Engine:
    """One attached worker: its host's connection, its rank, and one thread that copies. Use `attached`."""

    def __init__(self, store: str, name: str, shape: Shape) -> None:
        session = uuid.uuid4().hex
        self.shape = shape
        self.pages = Pages(shape)
        self.host = KvClient(store, session=session, worker=name)
        self.rank = RankClient(store, session=session, worker=name, rank=0)
        self.touch_s = 0.0  # what the first touch of the whole arena cost
        self.arena_bytes = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="copies")

    async def __aenter__(self) -> Self:
        attached = await asyncio.to_thread(_attach, self.rank, self.shape.geometry)
        self.touch_s = await asyncio.to_thread(_touch, self.rank, attached.slots)
        self.arena_bytes = attached.slots * attached.slot_bytes
        await self.host.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.host.close()
        await asyncio.to_thread(self.rank.close)
        self._thread.shutdown()

    async def push(self, call: Push) -> Pushed:
        """As a prefill job does: take the lease's slots over, copy and commit step by step."""
        own = uuid.uuid4().hex
        started = time.perf_counter()
        granted = await self.host.reserve(
            lease=own,
            request=call.request,
            keys=call.keys,
            write=True,
            ttl_s=TTL_S,
            take_from="" if call.node else call.lease,
            push_node=call.node,
            push_lease=call.lease if call.node else "",
        )
        reserve_s = time.perf_counter() - started
        try:
            loop = asyncio.get_running_loop()
            work = (own, granted.slots, call.steps, reserve_s, call.compute_s)
            pushed = await loop.run_in_executor(self._thread, self._save, *work)
            if call.node:
                await self._until_offered(own)
            return pushed
        finally:
            self.host.release_soon(own)

    async def hand(self, call: Hand) -> Handed:
        """As a prefill job does whose prompt its store holds. Raises Failed."""
        own = uuid.uuid4().hex
        began_ns = time.monotonic_ns()
        granted = await self.host.reserve(
            lease=own,
            request=own,
            keys=call.keys,
            write=True,
            ttl_s=TTL_S,
            push_node=call.node,
            push_lease=call.lease,
        )
        try:
            if not all(granted.committed):
                raise Failed("the source's store does not hold what it is to hand over")
            await self._until_offered(own)
            return Handed(began_ns=began_ns)
        finally:
            self.host.release_soon(own)

    async def _until_offered(self, lease: str) -> None:
        if not (await self.host.wait(lease, WAIT_S)).complete:
            raise Failed("the other node's store did not take the blocks")

    async def pull(self, source: "Connection", keys: list[bytes], steps: int) -> Arrived:
        """As a decode job does: set slots aside, wait for the other's blocks, copy them in. Raises Failed."""
        lease = request = uuid.uuid4().hex
        started = time.perf_counter()
        await self.host.reserve(lease=lease, request=request, keys=keys, write=False, ttl_s=TTL_S)
        reserve_s = time.perf_counter() - started
        try:
            await source.send(Push(request=request, keys=keys, lease=lease, steps=steps))
            ready = await self.host.wait(lease, WAIT_S)
            noticed_ns = time.monotonic_ns()
            if not ready.complete:
                raise Failed(f"the hand-off of {len(keys)} blocks was not complete within {WAIT_S:g} s")
            blocks = self.pages.take(len(keys))
            loop = asyncio.get_running_loop()
            moments = await loop.run_in_executor(self._thread, self._load, lease, ready, blocks)
        finally:
            self.host.release_soon(lease)
        pushed = await source.receive()
        if not isinstance(pushed, Pushed):
            raise Failed(f"the source sent {pushed}")
        return Arrived(times=_times(reserve_s, pushed, noticed_ns, *moments), blocks=blocks, checksums=pushed.checksums)

    def check(self, arrived: Arrived) -> None:
        """What came is what was sent, if nothing has come since. Raises Failed."""
        pairs = zip(arrived.blocks, arrived.checksums, strict=True)
        wrong = sum(self.pages.checksum(block) != expected for block, expected in pairs)
        if wrong:
            raise Failed(f"{wrong} of {len(arrived.blocks)} blocks arrived changed")

    def _save(self, lease: str, slots: list[int], steps: int, reserve_s: float, compute_s: float) -> Pushed:
        copy_s = checksum_s = commit_s = 0.0
        blocks, checksums, sent_ns = self.pages.take(len(slots)), [], 0
        began_ns = time.monotonic_ns()
        for positions in np.array_split(np.arange(len(slots)), min(steps, len(slots))):
            sums = []
            time.sleep(compute_s)
            if not self.rank.begin_copy(lease):
                raise Failed("the lease ended while it was written")
            try:
                for position in positions.tolist():
                    slot = self.rank.slot_view(slots[position])
                    started = time.perf_counter()
                    self.pages.read(blocks[position], slot)
                    copied = time.perf_counter()
                    sums.append(xxhash.xxh3_64_intdigest(slot))
                    copy_s += copied - started
                    checksum_s += time.perf_counter() - copied
            finally:
                self.rank.end_copy(lease)
            sent_ns = time.monotonic_ns()
            self.rank.commit(lease, positions.tolist(), sums)
            last_s = (time.monotonic_ns() - sent_ns) / 1e9
            commit_s += last_s
            checksums += sums
        return Pushed(
            reserve_s=reserve_s,
            copy_s=copy_s,
            checksum_s=checksum_s,
            commit_s=commit_s - last_s,
            began_ns=began_ns,
            last_commit_ns=sent_ns,
            checksums=checksums,
        )

    def _load(self, lease: str, ready: Ready, blocks: list[int]) -> tuple[int, int]:
        begun_ns, wall_ns = time.monotonic_ns(), time.time_ns()
        if not self.rank.begin_copy(lease):
            raise Failed("the lease ended before it was read")
        try:
            for slot, word, block in zip(ready.slots, ready.words, blocks, strict=True):
                is_ours = self.rank.word(slot) == word
                self.pages.write(block, self.rank.slot_view(slot))
                if not is_ours or self.rank.word(slot) != word:
                    raise Failed("a slot got another owner while it was read")
        finally:
            self.rank.end_copy(lease)
        ended_ns = time.monotonic_ns()
        self.rank.loaded(lease, blocks=len(blocks), failed=0, started_ns=wall_ns, ended_ns=time.time_ns())
        return begun_ns, ended_ns


def _times(reserve_s: float, pushed: Pushed, noticed_ns: int, begun_ns: int, ended_ns: int) -> Times:
    return Times(
        reserve=reserve_s,
        reserve_source=pushed.reserve_s,
        copy_out=pushed.copy_s,
        checksum=pushed.checksum_s,
        commit=pushed.commit_s,
        notice=(noticed_ns - pushed.last_commit_ns) / 1e9,
        pick_up=(begun_ns - noticed_ns) / 1e9,
        copy_in=(ended_ns - begun_ns) / 1e9,
        total=(ended_ns - pushed.began_ns) / 1e9,
    )


def _attach(rank: RankClient, geometry: Geometry) -> Attached:
    """The store may not have noticed yet that those with the shape before have gone. Raises KvMismatch or KvLost."""
    until = time.monotonic() + SETTLE_S
    while True:
        try:
            return rank.attach(geometry)
        except KvMismatch:
            if time.monotonic() > until:
                raise
            time.sleep(SETTLE_STEP_S)  # nothing tells when the store has seen sockets close


def _touch(rank: RankClient, slots: int) -> float:
    """Seconds to enter every page of the arena into this process's page table.

    The store has given them memory, but a process pays a fault for the first touch of each: later hand-offs do not.
    Nobody holds a slot of this shape yet, and what is written is what was there.
    """
    started = time.perf_counter()
    for slot in range(slots):
        pages = np.frombuffer(rank.slot_view(slot), np.uint8)[::PAGE_BYTES]
        np.copyto(pages, pages.copy())
    return time.perf_counter() - started


class Connection:
    """Between target and source: where the gateway and the bus are in a cluster."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: str) -> "Connection":
        """Raises OSError."""
        return cls(*await asyncio.open_unix_connection(path))

    async def send(self, message: Message) -> None:
        data = msgspec.msgpack.encode(message)
        self._writer.write(LENGTH.pack(len(data)) + data)
        await self._writer.drain()

    async def receive(self) -> Message:
        """Raises EOFError when the other end has gone, Failed when it could not do what it was asked for."""
        (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
        message = _decoder.decode(await self._reader.readexactly(length))
        if isinstance(message, Broken):
            raise Failed(f"the source: {message.reason}")
        return message

    def close(self) -> None:
        self._writer.close()


_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Source:
    """The source's process: serves pushes, and attaches anew when their shape changes."""

    def __init__(self, store: str) -> None:
        self._store = store
        self._engine: Engine | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                try:
                    answer = await self._answer(await connection.receive())
                except (Failed, BatonError) as error:
                    answer = Broken(reason=str(error))
                await connection.send(answer)
        connection.close()

    async def _answer(self, call: Message) -> Message:
        if isinstance(call, Use):
            if self._engine is not None:
                await self._engine.__aexit__()
            self._engine = await Engine(self._store, "source-0", call.shape).__aenter__()
            return InUse()
        if self._engine is None:
            raise Failed("a push came before a shape")
        if isinstance(call, Hand):
            return await self._engine.hand(call)
        if not isinstance(call, Push):
            raise Failed(f"{type(call).__name__} is no call")
        return await self._engine.push(call)


async def main(store: str, path: str) -> None:
    server = await asyncio.start_unix_server(Source(store).serve, path)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
