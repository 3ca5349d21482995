"""`python -m services.kv_transfer` as the launcher starts it: on the bus, on its socket, and gone without a trace."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from shared import subjects, wire
from shared.bus import Bus
from shared.errors import Internal, InvalidRequest
from shared.kv.client import KvClient
from shared.kv.rank_client import RankClient
from shared.prefix_index import PrefixReader, open_redis
from shared.settings import to_environ
from tests.support.nats import nats_server
from tests.support.redis import RedisServer
from tests.support.running_store import small_geometry

START_S = 30.0
ANSWER_S = 10.0
C = "kvtest"


@pytest.fixture
def nats_url(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "nats"
    folder.mkdir()
    with nats_server(folder) as url:
        yield url


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


class Beats:
    """All heartbeats of role kv, and a way to wait for one."""

    def __init__(self) -> None:
        self.seen: list[wire.Heartbeat] = []
        self._changed = asyncio.Event()

    def hear(self, message: wire.AnyMessage) -> None:
        if isinstance(message, wire.Heartbeat):
            self.seen.append(message)
            self._changed.set()

    async def wait_for(self, wanted: Callable[[wire.Heartbeat], bool], timeout_s: float = ANSWER_S) -> wire.Heartbeat:
        async with asyncio.timeout(timeout_s):
            while True:
                for beat in self.seen:
                    if wanted(beat):
                        return beat
                self._changed.clear()
                await self._changed.wait()


def environment(tmp_path: Path, **changes: object) -> dict[str, str]:
    values = {
        "cluster": C,
        "id": "kv-0",
        "node": "node-0",
        "kv_socket": str(tmp_path / "kv.sock"),
        "arena_gib": 0.001,
        "shm_dir": str(tmp_path),
        **changes,
    }
    return {**{k: v for k, v in os.environ.items() if not k.startswith("BATON_")}, **to_environ(values)}


@asynccontextmanager
async def process(env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.kv_transfer", env=env, stderr=subprocess.PIPE
    )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.kill()
        await started.communicate()


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[tuple[Bus, Beats]]:
    bus = await Bus.connect(url, "test")
    beats = Beats()
    await bus.listen(subjects.all_beats(C), beats.hear)
    await bus.flush()
    yield bus, beats
    await bus.close()


def arenas(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.arena"))


async def test_a_store_serves_and_leaves_nothing_behind(tmp_path: Path, nats_url: str, redis: RedisServer) -> None:
    env = environment(tmp_path, nats_url=nats_url, redis_url=redis.url)
    async with listening(nats_url) as (bus, beats), process(env) as store:
        first = await beats.wait_for(lambda _: True, START_S)
        assert (first.role, first.id, first.node, first.state) == ("kv", "kv-0", "node-0", "ready")
        assert len(arenas(tmp_path)) == 1
        rank = RankClient(env["BATON_KV_SOCKET"], session="w", worker="w-0", rank=0)
        await asyncio.to_thread(rank.attach, small_geometry())
        async with KvClient(env["BATON_KV_SOCKET"], session="w", worker="w-0") as host:
            await host.connect()
            key = b"k" * 16
            granted = await host.reserve(lease="a", request="r", keys=[key], write=True, ttl_s=30)
            await asyncio.to_thread(rank.commit, "a", [0], [1])
            subject = subjects.kv(C, "node-0")
            held = await bus.request(subject, wire.KvLookup(keys=[key, b"x" * 16]), wire.KvHeld, timeout_s=ANSWER_S)
            assert held == wire.KvHeld(node="node-0", blocks=1)
            stats = await bus.request(subject, wire.KvStatsRequest(), wire.KvStats, timeout_s=ANSWER_S)
            assert (stats.leases, stats.slots["pinned"], stats.fingerprint) == (1, 1, "f" * 64)
            await bus.request(subject, wire.KvRelease(lease="a"), wire.Done, timeout_s=ANSWER_S)
            stats = await bus.request(subject, wire.KvStatsRequest(), wire.KvStats, timeout_s=ANSWER_S)
            assert (stats.leases, stats.slots["cached"]) == (0, 1)
            with pytest.raises((InvalidRequest, Internal)):
                await bus.request(subject, wire.Ping(), wire.Done, timeout_s=ANSWER_S)
            full = await beats.wait_for(lambda beat: beat.slots.get("cached") == 1)
            assert sum(full.slots.values()) == sum(stats.slots.values())
            assert granted.slots == [0]
            async with httpx.AsyncClient() as probe:
                for page in ("/health", "/ready"):
                    assert (await probe.get(full.metrics_url + page)).status_code == 200
                metrics = (await probe.get(full.metrics_url + "/metrics")).text
            assert 'baton_kv_slots{state="cached"} 1.0' in metrics
            assert "baton_kv_index_connected 1.0" in metrics
            reader = open_redis(redis.url)
            assert await PrefixReader(reader, C).holders([key]) == {"node-0": 1}
            await reader.aclose()
        gone = await beats.wait_for(lambda beat: bool(beat.lost))
        assert gone.lost == ["w-0"]
        await asyncio.to_thread(rank.close)
        store.send_signal(signal.SIGTERM)
        async with asyncio.timeout(ANSWER_S):
            assert await store.wait() == 0
        await beats.wait_for(lambda beat: beat.state == "draining")
    assert arenas(tmp_path) == []
    assert not (tmp_path / "kv.sock").exists()


async def test_a_killed_store_is_cleaned_up_by_the_next_and_redis_is_not_needed(tmp_path: Path, nats_url: str) -> None:
    env = environment(tmp_path, nats_url=nats_url, redis_url=f"unix://{tmp_path}/nobody.sock")
    async with listening(nats_url) as (_, beats):
        async with process(env) as store:
            first = await beats.wait_for(lambda _: True, START_S)
            store.kill()
            await store.wait()
        left = arenas(tmp_path)
        assert len(left) == 1
        async with process(env) as store:
            await beats.wait_for(lambda beat: beat.incarnation != first.incarnation, START_S)
            assert len(arenas(tmp_path)) == 1
            assert arenas(tmp_path) != left
            store.terminate()
            async with asyncio.timeout(ANSWER_S):
                assert await store.wait() == 0
    assert arenas(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arena_gib": 100000.0}, "arena_gib"),
        ({"shm_dir": "/nowhere"}, "shm_dir"),
        ({"kv_socket": "/proc/kv.sock"}, "kv_socket"),
        ({"surprise": 1}, "surprise"),
        ({"peer_tls": "on", "peer_secret": "x"}, "setting 'tls_ca'"),
    ],
)
async def test_bad_configuration_is_one_line_and_exit_2(
    tmp_path: Path, nats_url: str, changes: dict[str, object], words: str
) -> None:
    async with process(environment(tmp_path, nats_url=nats_url, **changes)) as store:
        async with asyncio.timeout(START_S):
            _, stderr = await store.communicate()
    assert store.returncode == 2
    assert words in stderr.decode().splitlines()[-1]
    assert arenas(tmp_path) == []
