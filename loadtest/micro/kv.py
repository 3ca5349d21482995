"""The KV plane by itself: real kv_transfers, stand-ins for engines, on a node and between two, and every raw limit.

Baton and its limits are measured in turns, round by round, so that what else the machine does falls on both. A figure
is the median of the rounds, a ratio is taken within its round.
"""

import argparse
import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from loadtest.cluster.stream import percentile
from loadtest.micro import bench, kv_cuda, kv_table, limits
from loadtest.micro.kv_engine import Arrived, Connection, Engine, Shape, Times, Use
from loadtest.micro.kv_peers import PeerPlane, attach
from loadtest.micro.local_protocol import LocalProtocol
from loadtest.micro.raw_peer import connect
from loadtest.micro.store_bench import StoreBench, new_keys
from services.launcher.machine import LOOPBACK, free_ports

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
POOL_BYTES = 192 * MIB  # of each engine's pages: more than a cache holds, and than the longest prompt
POINT_BYTES = 256 * MIB  # moved in one round of one point, at most MOST_HANDOFFS
MOST_HANDOFFS = 40
CONCURRENT = (1, 4, 8)
CONCURRENT_S = 1.0
CONCURRENT_BYTES = 16 * MIB
STORE_CALLS = 1000
SOURCE = "source.sock"
RAW = "raw.sock"
SETTINGS = ("sizes_mib", "slots_kib", "layers", "steps", "rounds", "arena_gib", "no_index")


class _Store(NamedTuple):
    path: str  # of its socket
    pid: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes-mib", type=_sizes, default=[1, 4, 16, 64], help="of prompts, e.g. 1,16")
    parser.add_argument("--slots-kib", type=_sizes, default=[64, 256, 1024], help="of a block, e.g. 64,1024")
    parser.add_argument("--layers", type=_count, default=8, help="pages that make a block")
    parser.add_argument(
        "--steps", type=_count, default=4, help="in which the source computes a prompt, one commit each"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU's pages and the arena")
    parser.add_argument("--rounds", type=_count, default=5)
    parser.add_argument("--arena-gib", type=float, default=0.5)
    parser.add_argument("--no-index", action="store_true", help="without Redis, which the index is written to")
    parser.add_argument("--out", type=Path, help="write the result as JSON")


def run(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        return kv_cuda.run(args)
    return bench.command(args, refusal=_refusal(args), work=lambda: _measure(args), table=kv_table.text)


def _refusal(args: argparse.Namespace) -> str | None:
    if args.out and not args.out.parent.is_dir():
        return f"--out: there is no folder {args.out.parent}"
    if max(args.sizes_mib) * MIB > POOL_BYTES / 2:
        return f"--sizes-mib: at most {POOL_BYTES // MIB // 2}"
    for slot_kib in args.slots_kib:
        if slot_kib * KIB % args.layers:
            return f"--slots-kib: {slot_kib} KiB cannot be cut into pages of {args.layers} --layers"
        if slot_kib * KIB > min(args.sizes_mib) * MIB:
            return f"--slots-kib: {slot_kib} KiB is more than the smallest of --sizes-mib"
    least_mib = 2 * max(max(CONCURRENT) * CONCURRENT_BYTES // MIB, *args.sizes_mib)
    if args.arena_gib * 1024 < least_mib:
        return f"--arena-gib: these sizes need at least {least_mib / 1024:g}"
    return None


async def _measure(args: argparse.Namespace) -> dict[str, Any]:
    async with bench.opened() as here:
        (tcp_port,) = free_ports(1)
        stores = await _stores(here, args)
        store = stores[0].path
        source = here.python("source-0", "loadtest.micro.kv_engine", store, str(here.folder / SOURCE))
        raw = here.python("raw-0", "loadtest.micro.raw_peer", str(here.folder / RAW), str(tcp_port))
        await here.until(source, _until_listening(here.folder / SOURCE))
        await here.until(raw, _until_listening(here.folder / RAW))
        here.say("two kv_transfer, the source and the raw peer are up; touching memory")
        plane = _Plane(here, args, store, tcp_port)
        figures: dict[str, Any] = {"limits": await plane.limits()}
        figures["handoff"] = await plane.handoffs()
        figures["protocol"] = await plane.protocol()
        figures["concurrency"] = await plane.concurrency()
        figures["peers"] = await _between_nodes(here, args, stores, plane)
        figures["limits"]["first touch of a mapped arena, ms/GiB"] = plane.first_touch()
    figures["store"] = _store_rates(args.rounds)
    return bench.result("kv", {name: getattr(args, name) for name in SETTINGS}, **figures)


async def _stores(here: bench.Bench, args: argparse.Namespace) -> list[_Store]:
    """Two nodes' kv_transfer with broker and index, as the launcher starts them."""
    _, nats_url = await here.nats()
    redis_url = f"unix://{here.folder}/nobody.sock" if args.no_index else await here.redis()
    stores = []
    for number in range(2):
        probe_port, peer_port = free_ports(2)
        path = str(here.folder / f"kv-{number}.sock")
        settings = {
            "cluster": "loadtest",
            "id": f"kv-{number}",
            "node": f"node-{number}",
            "nats_url": nats_url,
            "redis_url": redis_url,
            "kv_socket": path,
            "arena_gib": args.arena_gib,
            "probe_port": probe_port,
            "peer_secret": "loadtest",
            "peer_port": peer_port,
        }
        child = here.python(f"kv-{number}", "services.kv_transfer", settings=settings)
        await here.until_probed(child, f"http://{LOOPBACK}:{probe_port}")
        stores.append(_Store(path, child.pid))
    return stores


async def _between_nodes(
    here: bench.Bench, args: argparse.Namespace, stores: list[_Store], plane: "_Plane"
) -> dict[str, Any]:
    points, overlap = [], []
    for slot_kib in args.slots_kib:
        shape = Shape(slot_bytes=slot_kib * KIB, layers=args.layers, pool_bytes=POOL_BYTES)
        source = await attach(str(here.folder / SOURCE), shape)
        try:
            async with Engine(stores[1].path, "target-0", shape) as target:
                peers = PeerPlane(source, target, plane.raw_gb_s, [store.pid for store in stores])
                for size_mib in args.sizes_mib:
                    here.say(f"between nodes: {size_mib} MiB in slots of {slot_kib} KiB")
                    count = min(MOST_HANDOFFS, max(4, POINT_BYTES // (size_mib * MIB)))
                    points.append(await peers.bandwidth(size_mib * MIB, shape.slot_bytes, count, args.rounds))
                if slot_kib == max(args.slots_kib):
                    here.say("between nodes: prompts computed in chunks")
                    overlap = await peers.overlap(shape.slot_bytes, args.rounds)
        finally:
            source.close()
    return {"bandwidth": points, "overlap": overlap}


async def _until_listening(path: Path) -> None:
    while True:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            await asyncio.sleep(0.02)  # nothing announces that it has begun to listen
        else:
            writer.close()
            return


class _Plane:
    """The measurements, in the order in which a reader wants them."""

    def __init__(self, here: bench.Bench, args: argparse.Namespace, store: str, tcp_port: int) -> None:
        self._here = here
        self._args = args
        self._store = store
        self._memory = limits.region()
        self._touches: list[float] = []
        self._raw = connect(str(here.folder / RAW))
        self._tcp = connect((LOOPBACK, tcp_port))

    async def limits(self) -> dict[str, Any]:
        """What no point has beside it, and what all of them are held against."""
        rows: dict[str, list[float]] = {}
        for number in range(self._args.rounds):
            self._here.say(f"limits, round {number + 1} of {self._args.rounds}")
            ring = limits.Ring(self._memory, 16 * MIB)
            figures = {
                "memcpy": 16 * MIB / ring.copy_s() / limits.GB,
                "memcpy, 2 threads": await asyncio.to_thread(limits.threads_copy_gb_s, self._memory, 2, 0.3),
                "xxh3": 16 * MIB / ring.checksum_s() / limits.GB,
                "loopback TCP": await asyncio.to_thread(limits.tcp_gb_s, self._tcp, self._memory),
            }
            for name, value in figures.items():
                rows.setdefault(name, []).append(value)
        return {f"{name}, GB/s": bench.figure(values) for name, values in rows.items()}

    async def raw_gb_s(self) -> float:
        """What a plain socket does now."""
        return await asyncio.to_thread(limits.tcp_gb_s, self._tcp, self._memory)

    async def handoffs(self) -> list[dict[str, Any]]:
        points = []
        for slot_kib in self._args.slots_kib:
            shape = self._shape(slot_kib * KIB)
            async with self._pair(shape, 1) as (target, (source,)):
                for size_mib in self._args.sizes_mib:
                    self._here.say(f"hand-offs of {size_mib} MiB in slots of {slot_kib} KiB")
                    points.append(await self._point(target, source, size_mib * MIB))
        return points

    async def concurrency(self) -> list[dict[str, Any]]:
        """Closed loop; transfers at once share one source engine and one target engine."""
        shape = self._shape(max(self._args.slots_kib) * KIB)
        rows: dict[int, list[dict[str, float]]] = {count: [] for count in CONCURRENT}
        async with self._pair(shape, max(CONCURRENT)) as (target, sources):
            for number in range(self._args.rounds):
                self._here.say(f"transfers at once, round {number + 1} of {self._args.rounds}")
                for count in CONCURRENT:
                    both = await asyncio.to_thread(limits.threads_copy_gb_s, self._memory, 2, 0.2)
                    row = await self._at_once(target, sources[:count])
                    rows[count].append({**row, "of limit": row["GB/s"] / (both / 2)})
        return [
            {"at once": count, **{name: bench.figure([row[name] for row in found]) for name in found[0]}}
            for count, found in rows.items()
        ]

    async def protocol(self) -> dict[str, Any]:
        shape = self._shape(min(self._args.slots_kib) * KIB)
        async with self._pair(shape, 1) as (target, _):
            protocol = LocalProtocol(target, self._raw)
            for number in range(self._args.rounds + 1):
                self._here.say(f"local protocol, round {number} of {self._args.rounds}")
                await protocol.round(warm_up=number == 0)
        return protocol.figures()

    def first_touch(self) -> bench.Figure:
        return bench.figure(self._touches)

    def _shape(self, slot_bytes: int) -> Shape:
        return Shape(slot_bytes=slot_bytes, layers=self._args.layers, pool_bytes=POOL_BYTES)

    @asynccontextmanager
    async def _pair(self, shape: Shape, connections: int) -> AsyncIterator[tuple[Engine, list[Connection]]]:
        """Source and target, attached with this shape, and ways to ask the source for pushes."""
        sources = [await Connection.open(str(self._here.folder / SOURCE)) for _ in range(connections)]
        try:
            await sources[0].send(Use(shape=shape))
            await sources[0].receive()
            async with Engine(self._store, "target-0", shape) as target:
                self._touches.append(1e3 * target.touch_s / (target.arena_bytes / GIB))
                yield target, sources
        finally:
            for source in sources:
                source.close()

    async def _point(self, target: Engine, source: Connection, size_bytes: int) -> dict[str, Any]:
        slot_bytes = target.shape.slot_bytes
        count = min(MOST_HANDOFFS, max(2, POINT_BYTES // size_bytes))
        ring = limits.Ring(self._memory, size_bytes)
        slots = limits.Ring(self._memory, slot_bytes)
        all_times: list[Times] = []
        rows: list[dict[str, float]] = []
        for number in range(self._args.rounds + 1):
            arrived = [await self._pull(target, source, size_bytes) for _ in range(count if number else 2)]
            target.check(arrived[-1])
            if number == 0:  # warms up
                continue
            times = [one.times for one in arrived]
            all_times += times
            rows.append(
                {
                    "hand-off": percentile([one.total for one in times], 0.5),
                    "one memcpy": percentile([ring.copy_s() for _ in range(count)], 0.5),
                    "two memcpys": percentile([ring.copy_s(2) for _ in range(count)], 0.5),
                    "by page": percentile(
                        [ring.paged_copies_s(slot_bytes // target.shape.layers) for _ in range(count)], 0.5
                    ),
                    "xxh3": percentile([slots.checksum_s() for _ in range(count)], 0.5) * size_bytes / slot_bytes,
                }
            )
        return _point_figures(size_bytes, slot_bytes, all_times, rows)

    async def _pull(self, target: Engine, source: Connection, size_bytes: int) -> Arrived:
        return await target.pull(source, new_keys(size_bytes // target.shape.slot_bytes), self._args.steps)

    async def _at_once(self, target: Engine, sources: list[Connection]) -> dict[str, float]:
        until = time.monotonic() + CONCURRENT_S
        done = [0] * len(sources)
        totals: list[float] = []

        async def transfer(number: int) -> None:
            while time.monotonic() < until:
                arrived = await self._pull(target, sources[number], CONCURRENT_BYTES)
                done[number] += 1
                totals.append(arrived.times.total)

        started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(len(sources)):
                    tasks.create_task(transfer(number))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        elapsed = time.perf_counter() - started
        return {
            "GB/s": sum(done) * CONCURRENT_BYTES / elapsed / limits.GB,
            "Jain": jain(done),
            "p50 ms": 1e3 * percentile(totals, 0.5),
            "p99 ms": 1e3 * percentile(totals, 0.99),
        }


def _point_figures(
    size_bytes: int, slot_bytes: int, times: list[Times], rows: list[dict[str, float]]
) -> dict[str, Any]:
    stages = {
        name: {
            "p50_ms": 1e3 * percentile([getattr(one, name) for one in times], 0.5),
            "p99_ms": 1e3 * percentile([getattr(one, name) for one in times], 0.99),
        }
        for name in Times.__struct_fields__
    }
    return {
        "size_mib": size_bytes / MIB,
        "slot_kib": slot_bytes / KIB,
        "handoffs": len(times),
        "gb_per_s": bench.figure([size_bytes / row["hand-off"] / limits.GB for row in rows]),
        "stages": stages,
        "limits_ms": {name: bench.figure([1e3 * row[name] for row in rows]) for name in rows[0] if name != "hand-off"},
        "of_one_memcpy": bench.figure([row["hand-off"] / row["one memcpy"] for row in rows]),
        "of_two_memcpys": bench.figure([row["hand-off"] / row["two memcpys"] for row in rows]),
        "of_two_by_page_and_xxh3": bench.figure([row["hand-off"] / (row["by page"] + row["xxh3"]) for row in rows]),
    }


def jain(shares: list[int]) -> float:
    """1 when all got the same, 1/n when one got everything; 0 when nobody got anything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def _store_rates(rounds: int) -> dict[str, Any]:
    store = StoreBench()
    rows = [store.measure(STORE_CALLS) for _ in range(rounds)]
    return {name: bench.figure([row[name] for row in rows]) for name in rows[0]}


def _sizes(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _count(text: str) -> int:
    """Argparse names the option when this raises."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
