"""Store, host client and rank client over a real unix socket and a real arena."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import uvloop
import xxhash

from services.kv_transfer.server import bind
from shared import telemetry
from shared.errors import InvalidRequest, KvLost, KvMemory, KvMismatch, NoCapacity, SettingsError
from shared.kv.client import KvClient
from shared.kv.messages import (
    MAX_FRAME_BYTES,
    Attach,
    Attached,
    Call,
    Geometry,
    Release,
    Reserved,
    Revoke,
    Revoked,
    encode,
)
from shared.kv.rank_client import RankClient
from shared.kv.rank_link import checked, exchange, read_answer
from tests.support.running_store import SLOT_BYTES, RunningStore, running_store, small_geometry
from tests.support.tracing import watch_spans

DEADLINE_S = 10.0


@pytest.fixture
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    """The loop that the service runs on; its timers and transports differ from asyncio's in small things."""
    return uvloop.EventLoopPolicy()


class Worker:
    """A host client and its ranks, of one session."""

    def __init__(self, path: str, name: str, geometry: Geometry, host: KvClient | None = None) -> None:
        self.geometry = geometry
        self.host = host or KvClient(path, session=name, worker=name)
        self.ranks = [RankClient(path, session=name, worker=name, rank=r) for r in range(geometry.ranks)]

    async def attach(self) -> None:
        for rank in self.ranks:
            await asyncio.to_thread(rank.attach, self.geometry, 5.0)
        await self.host.connect(5.0)

    async def close(self) -> None:
        await self.host.close()
        for rank in self.ranks:
            await asyncio.to_thread(rank.close)

    async def write(self, lease: str, granted: Reserved, positions: list[int], text: bytes = b"kv") -> None:
        """What a connector does after a step, on every rank."""
        slots = {position: granted.slots[position] for position in positions}
        for number in range(len(self.ranks)):
            await asyncio.to_thread(self._write, number, lease, slots, text)

    def _write(self, number: int, lease: str, slots: dict[int, int], text: bytes) -> None:
        rank = self.ranks[number]
        assert rank.begin_copy(lease)
        checksums = []
        for position, slot in slots.items():
            view = rank.slot_view(slot + number)
            view[:] = page(text, position, number)
            checksums.append(xxhash.xxh3_64_intdigest(view))
        rank.end_copy(lease)
        rank.commit(lease, list(slots), checksums)


def page(text: bytes, position: int, rank: int) -> bytes:
    return (b"%s %d %d;" % (text, position, rank)).ljust(32) * (SLOT_BYTES // 32)


def keys(*names: str) -> list[bytes]:
    return [name.encode().ljust(16, b".") for name in names]


@asynccontextmanager
async def workers(store: RunningStore, *names: str, ranks: int = 1) -> AsyncIterator[list[Worker]]:
    """Attached workers; nothing may be held when they have gone."""
    async with AsyncExitStack() as stack:
        made = []
        for name in names:
            worker = Worker(store.path, name, small_geometry(ranks))
            stack.push_async_callback(worker.close)
            await worker.attach()
            made.append(worker)
        yield made
    await store.until(lambda: not any(store.store.gauges().values()), "nothing is held")
    assert not set(store.states()) - {"free", "cached"}


async def in_thread(call: Callable[..., object], *args: object) -> object:
    async with asyncio.timeout(DEADLINE_S):
        return await asyncio.to_thread(call, *args)


async def test_a_prompt_travels_from_the_prefill_to_the_decode_worker(tmp_path: Path) -> None:
    async with running_store(tmp_path, ranks=2) as store, workers(store, "p", "d", ranks=2) as (prefill, decode):
        prompt = keys("1", "2", "3", "4")
        waiting = await decode.host.reserve(lease="d1", request="r", keys=prompt, write=False, ttl_s=30)
        assert waiting.slots == [-1] * 4
        wait = asyncio.create_task(decode.host.wait("d1", 10))
        granted = await prefill.host.reserve(lease="p1", request="r", keys=prompt, write=True, ttl_s=30, take_from="d1")
        assert store.states() == {"reserved": 8, "free": 8}
        await prefill.write("p1", granted, [0, 1])
        assert not wait.done()
        await prefill.write("p1", granted, [2, 3])
        ready = await wait
        assert ready.complete
        await prefill.host.release("p1")
        for number, rank in enumerate(decode.ranks):
            assert rank.begin_copy("d1", rank.arena)
            for position, (slot, word) in enumerate(zip(ready.slots, ready.words, strict=True)):
                assert rank.word(slot) == word
                assert bytes(rank.slot_view(slot + number)) == page(b"kv", position, number)
            rank.end_copy("d1")
            await in_thread(lambda rank=rank: rank.loaded("d1", blocks=4, failed=0, started_ns=1, ended_ns=2))
        await decode.host.release("d1")
        assert store.states() == {"cached": 8, "free": 8}
        assert store.metric("baton_kv_moved_bytes_total", path="local") == 8 * SLOT_BYTES
        assert store.metric("baton_kv_written_bytes_total") == 8 * SLOT_BYTES
        assert store.metric("baton_kv_slots", state="cached") == 8
        assert store.changes == [(key, True) for key in prompt]


async def test_a_hit_is_pinned_and_readable_at_once(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p", "d") as (prefill, decode):
        granted = await prefill.host.reserve(lease="a", request="r", keys=keys("1"), write=True, ttl_s=30)
        await prefill.write("a", granted, [0])
        await prefill.host.release("a")
        hit = await decode.host.reserve(lease="b", request="r", keys=keys("1", "2"), write=True, ttl_s=30)
        assert hit.committed == [True, False]
        assert bytes(decode.ranks[0].slot_view(hit.slots[0])) == page(b"kv", 0, 0)


async def test_two_writers_of_one_key_end_with_one_slot(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p", "q") as (one, two):
        first = await one.host.reserve(lease="a", request="r", keys=keys("1"), write=True, ttl_s=30)
        second = await two.host.reserve(lease="b", request="r", keys=keys("1"), write=True, ttl_s=30)
        assert first.slots != second.slots
        await two.write("b", second, [0], b"two")
        await one.write("a", first, [0], b"one")
        assert store.states() == {"pinned": 1, "free": 7}
        ready = await one.host.wait("a", 1)
        assert ready.slots == second.slots


async def test_a_prefill_worker_that_gives_up_leaves_its_slots_to_the_next_one(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p", "q", "d") as (one, two, decode):
        prompt = keys(*"12345678")
        await decode.host.reserve(lease="d1", request="r", keys=prompt, write=False, ttl_s=30)
        first = await one.host.reserve(lease="p1", request="r", keys=prompt, write=True, ttl_s=30, take_from="d1")
        await one.write("p1", first, [0, 1, 2])
        await one.host.release("p1")
        second = await two.host.reserve(
            lease="p2", request="r", keys=prompt, write=True, ttl_s=30, wait_s=5, take_from="d1"
        )
        assert second.committed == [True] * 3 + [False] * 5
        await two.write("p2", second, [3, 4, 5, 6, 7])
        assert (await decode.host.wait("d1", 5)).complete


async def test_at_its_deadline_a_lease_ends_when_the_running_copy_does(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p") as (worker,):
        rank = worker.ranks[0]
        await worker.host.reserve(lease="a", request="r", keys=keys("1", "2"), write=True, ttl_s=0.05)
        assert rank.begin_copy("a")
        await store.until(lambda: store.states().get("revoked") == 2, "revoked")
        assert store.states() == {"revoked": 2, "free": 6}
        rank.end_copy("a")
        await store.until(lambda: store.states() == {"free": 8}, "freed by the rank's answer")
        assert not rank.begin_copy("a")
        with pytest.raises(KvLost):
            await in_thread(rank.commit, "a", [0], [0])
        assert rank.arena is not None  # a lost lease is no lost store
        assert store.metric("baton_kv_expired_leases_total") == 1


async def test_a_rank_that_does_not_answer_makes_its_worker_unhealthy(tmp_path: Path) -> None:
    told = asyncio.Event()
    async with running_store(tmp_path) as store:
        command, watch = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        host = KvClient(store.path, session="s", worker="w", on_unhealthy=lambda _reason: told.set())

        def attach_silent_rank() -> None:
            for sock, kind in ((command, "rank"), (watch, "watch")):
                sock.settimeout(DEADLINE_S)
                sock.connect(store.path)
                body = Attach(session="s", kind=kind, worker="w", geometry=small_geometry())
                checked(exchange(sock, 1, body), Attached)

        await in_thread(attach_silent_rank)
        await host.connect(5)
        await host.reserve(lease="a", request="r", keys=keys("1"), write=True, ttl_s=30)
        await host.release("a")
        push = await in_thread(read_answer, watch)
        assert push.body == Revoke(lease="a")
        async with asyncio.timeout(DEADLINE_S):
            await told.wait()
        assert store.states() == {"revoked": 1, "free": 7}
        await host.close()
        command.close()
        watch.close()
        await store.until(lambda: store.states() == {"free": 8}, "freed by the closing")


async def test_a_killed_worker_gives_everything_back(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "d"):
        victim = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.kv_victim",
            store.path,
            msgspec.json.encode(small_geometry()).decode(),
            stdout=subprocess.PIPE,
        )
        assert victim.stdout is not None
        async with asyncio.timeout(30):
            assert await victim.stdout.readline() == b"holding\n"
        assert store.states() == {"reserved": 3, "free": 5}
        victim.kill()
        async with asyncio.timeout(1):
            await store.until(lambda: store.states() == {"free": 8}, "all back")
        assert store.lost == ["victim-0"]
        await victim.wait()


async def test_a_full_arena_makes_a_reservation_wait_and_then_refuses_it(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p", "d") as (one, two):
        await one.host.reserve(lease="a", request="r", keys=keys(*"123456"), write=False, ttl_s=30)
        with pytest.raises(KvMemory):
            await two.host.reserve(lease="b", request="r", keys=keys(*"789"), write=False, ttl_s=30, wait_s=0.05)
        waiting = asyncio.create_task(
            two.host.reserve(lease="c", request="r", keys=keys(*"789"), write=False, ttl_s=30, wait_s=10)
        )
        await store.until(lambda: store.store.gauges()["queued"] == 1, "in line")
        await one.host.release("a")
        assert (await waiting).committed == [False] * 3
        with pytest.raises(KvMemory, match="never fit"):
            await two.host.reserve(lease="e", request="r", keys=keys(*"123456789"), write=False, ttl_s=30, wait_s=10)


async def test_a_reservation_whose_caller_gave_up_is_released(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p") as (worker,):
        await worker.host.reserve(lease="a", request="r", keys=keys(*"123456"), write=False, ttl_s=30)
        waiting = asyncio.create_task(
            worker.host.reserve(lease="b", request="r", keys=keys(*"789"), write=False, ttl_s=30, wait_s=10)
        )
        await store.until(lambda: store.store.gauges()["queued"] == 1, "in line")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await store.until(lambda: store.store.gauges()["queued"] == 0, "out of the line")
        assert worker.host.pending_calls == 0


@pytest.mark.parametrize(
    "bad",
    [
        b"\xff\xff\xff\xff",
        (MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
        b"\x03\x00\x00\x00\xc1\xc1\xc1",
        b"\x01\x00\x00\x00\x01",
        b"\x00\x00\x00\x00",
        b"\x03\x00\x00\x00\x92\x01\x80",
    ],
)
async def test_a_bad_frame_ends_its_connection_and_no_other(tmp_path: Path, bad: bytes) -> None:
    async with running_store(tmp_path) as store, workers(store, "p") as (worker,):
        reader, writer = await asyncio.open_unix_connection(store.path)
        writer.write(bad)
        async with asyncio.timeout(DEADLINE_S):
            assert await reader.read() == b""
        writer.close()
        assert store.metric("baton_kv_bad_frames_total") == 1
        await worker.host.reserve(lease="a", request="r", keys=keys("1"), write=False, ttl_s=30)


async def test_frames_may_arrive_in_pieces_or_together(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p"):
        reader, writer = await asyncio.open_unix_connection(store.path)
        frames = encode(Call(1, Attach(session="x", kind="host", worker="x")))
        frames += encode(Call(2, Release(lease="none"))) + encode(Call(3, Release(lease="none")))
        for byte in frames:
            writer.write(bytes([byte]))
            await writer.drain()
        seen = []
        async with asyncio.timeout(DEADLINE_S):
            while len(seen) < 3:
                size = int.from_bytes(await reader.readexactly(4), "little")
                seen.append((await reader.readexactly(size))[1])
        assert seen == [1, 2, 3]
        writer.close()


async def test_calls_belong_to_a_kind_of_connection(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p"):

        def ask_wrongly() -> None:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(DEADLINE_S)
                sock.connect(store.path)
                with pytest.raises(InvalidRequest, match="attach first"):
                    checked(exchange(sock, 1, Release(lease="a")), Attached)
                checked(exchange(sock, 2, Attach(session="x", kind="host", worker="x")), Attached)
                with pytest.raises(InvalidRequest, match="not for a host"):
                    checked(exchange(sock, 3, Revoked(lease="a")), Attached)
                with pytest.raises(InvalidRequest, match="already"):
                    checked(exchange(sock, 4, Attach(session="x", kind="host", worker="x")), Attached)

        await in_thread(ask_wrongly)


async def test_another_model_and_too_small_an_arena_are_refused_by_name(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store:
        big = RankClient(store.path, session="big", worker="big-0", rank=0)
        with pytest.raises(KvMismatch, match="arena_gib"):
            await in_thread(big.attach, small_geometry(max_model_len=1024), 5.0)
        async with workers(store, "p"):
            other = RankClient(store.path, session="o", worker="other-0", rank=0)
            with pytest.raises(KvMismatch, match=r"other-0 has .*0000.* serves .*ffff.* to p"):
                await in_thread(other.attach, small_geometry(fingerprint="0" * 64), 5.0)


async def test_a_host_that_comes_before_its_ranks_waits_for_them(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store:
        worker = Worker(store.path, "p", small_geometry())
        early = asyncio.create_task(worker.host.connect(DEADLINE_S))
        await store.until(lambda: len(store.server.connections) == 1, "connected")
        await in_thread(worker.ranks[0].attach, worker.geometry, 5.0)
        assert (await early).slots == 8
        await worker.close()


async def test_without_a_store_attaching_ends_at_its_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "nobody.sock")
    rank = RankClient(path, session="p", worker="p", rank=0)
    with pytest.raises(KvLost):
        await in_thread(rank.attach, small_geometry(), 0.1)
    host = KvClient(path, session="p", worker="p")
    with pytest.raises(KvLost):
        await host.connect(0.1)
    with pytest.raises(KvLost):
        await host.reserve(lease="a", request="r", keys=keys("1"), write=True, ttl_s=1)
    await host.release("a")  # nothing to give back
    await in_thread(rank.close)


async def test_after_a_restart_clients_attach_to_the_new_arena_and_a_running_copy_ends_first(tmp_path: Path) -> None:
    arenas: list[str | None] = []
    told = threading.Condition()

    def on_arena(attached: Attached | None) -> None:
        with told:
            arenas.append(attached.arena if attached else None)

    geometry = small_geometry()
    path = str(tmp_path / "kv.sock")
    worker = Worker(path, "p", geometry, KvClient(path, session="p", worker="p", on_arena=on_arena))
    rank = worker.ranks[0]
    async with running_store(tmp_path) as store:
        await worker.attach()
        granted = await worker.host.reserve(lease="a", request="r", keys=keys("1"), write=True, ttl_s=30)
        await worker.host.reserve(lease="w", request="r", keys=keys("2"), write=False, ttl_s=30)
        pending = asyncio.create_task(worker.host.wait("w", 30))
        await store.until(lambda: store.store.gauges()["waits"] == 1, "waiting")
        old = rank.arena
        assert rank.begin_copy("a", old)
        view = rank.slot_view(granted.slots[0])
    assert store.lost == []  # a store that stops accuses nobody
    with pytest.raises(KvLost):
        await pending
    view[:] = b"x" * SLOT_BYTES  # the mapping outlives the store
    async with running_store(tmp_path) as store:
        await store.until(lambda: rank.arena is None, "detached")
        assert not rank.begin_copy("b")
        with pytest.raises(KvLost):
            await in_thread(rank.commit, "a", [0], [0])
        rank.end_copy("a")
        await store.until(lambda: rank.arena is not None and arenas[-1] is not None, "attached again")
        assert rank.arena == store.arena.name != old
        assert arenas == [old, None, store.arena.name]
        assert not rank.begin_copy("c", old)
        again = await worker.host.reserve(lease="c", request="r", keys=keys("1"), write=True, ttl_s=30)
        await worker.write("c", again, [0])
        await worker.close()
        await store.until(lambda: store.states() == {"cached": 1, "free": 7}, "nothing held")


async def test_a_closed_rank_leaves_no_thread_even_while_the_store_is_away(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store:
        worker = Worker(store.path, "p", small_geometry())
        await worker.attach()
    await worker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kv-watch"]


async def test_spans_of_a_hand_off_belong_to_the_leases_trace(tmp_path: Path) -> None:
    exporter = watch_spans()
    async with running_store(tmp_path) as store, workers(store, "p") as (worker,):
        with telemetry.tracer().start_as_current_span("parent") as parent:
            traceparent = telemetry.traceparent()
        granted = await worker.host.reserve(
            lease="a", request="r", keys=keys("1", "2"), write=True, ttl_s=30, traceparent=traceparent
        )
        await worker.write("a", granted, [0])
        await worker.write("a", granted, [1])
        await in_thread(lambda: worker.ranks[0].loaded("a", blocks=1, failed=1, started_ns=5, ended_ns=9))
        await worker.host.release("a")
        assert store.metric("baton_kv_failed_loads_total") == 1
    spans = {span.name: span for span in exporter.get_finished_spans()}
    push, load = spans[telemetry.KV_PUSH], spans[telemetry.KV_LOAD]
    assert dict(push.attributes) == {"blocks": 2, "bytes": 2 * SLOT_BYTES, "path": "local"}
    assert (load.start_time, load.end_time) == (5, 9)
    assert {push.context.trace_id, load.context.trace_id} == {parent.get_span_context().trace_id}


async def test_the_socket_is_the_owners_alone_and_a_dead_ones_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "kv.sock"
    bind(path).close()
    assert path.exists()
    listener = bind(path)
    assert path.stat().st_mode & 0o777 == 0o600
    listener.listen()
    with pytest.raises(SettingsError, match="another kv_transfer"):
        bind(path)
    listener.close()
    (tmp_path / "file").write_text("precious")
    with pytest.raises(SettingsError, match="no socket"):
        bind(tmp_path / "file")


async def test_a_client_has_a_limit_of_waiting_calls(tmp_path: Path) -> None:
    async with running_store(tmp_path) as store, workers(store, "p") as (worker,):
        await worker.host.reserve(lease="w", request="r", keys=keys("2"), write=False, ttl_s=30)
        calls = [asyncio.create_task(worker.host.wait("w", 30)) for _ in range(4096)]
        await store.until(lambda: store.store.gauges()["waits"] == 4096, "all wait")
        with pytest.raises(NoCapacity):
            await worker.host.wait("w", 30)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_whoever_maps_the_arena_hears_of_each_mapping_and_of_its_end(tmp_path: Path) -> None:
    """A device's driver pins it."""
    heard: list[str] = []

    def on_mapped(view: memoryview) -> Callable[[], None]:
        view[-1] = view[-1]  # it is the whole arena, writable
        heard.append("mapped")
        return lambda: heard.append("unmapped")

    async with running_store(tmp_path) as store:
        rank = RankClient(store.path, session="s", worker="w", rank=0, on_mapped=on_mapped)
        await asyncio.to_thread(rank.attach, small_geometry())
        assert heard == ["mapped"]
        await asyncio.to_thread(rank.close)
    assert heard == ["mapped", "unmapped"]
