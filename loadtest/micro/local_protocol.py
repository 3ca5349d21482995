"""The local protocol's calls for a prompt of 32 blocks, each beside a raw round trip of as many bytes.

Reserve, wait and release go over the host's asyncio connection, commit over the rank's blocking one, as in a worker.
The raw round trip is blocking at both ends: the least that a socket between two processes takes.
"""

import socket
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from loadtest.cluster.stream import percentile
from loadtest.micro import limits
from loadtest.micro.kv_engine import TTL_S, Engine
from loadtest.micro.store_bench import KEYS, new_keys
from shared.kv.messages import Answer, AnyAnswer, AnyCall, Call, Commit, Ok, Release, Reserve, Wait, encode

CALLS = 200  # of each kind, in one round
CALL_ID = 1000  # of the middle of a run: ids grow by a byte or two
T = TypeVar("T")
NAMES = ("reserve", "commit", "wait", "release")


class LocalProtocol:
    def __init__(self, engine: Engine, peer: socket.socket) -> None:
        self._engine = engine
        self._peer = peer
        self._seconds: dict[str, list[float]] = {name: [] for name in NAMES}
        self._raw: dict[str, list[float]] = {name: [] for name in NAMES}
        self._bytes: dict[str, tuple[int, int]] = {}
        self._rounds: dict[str, list[float]] = {name: [] for name in NAMES}  # ratios of the medians

    async def round(self, *, warm_up: bool = False) -> None:
        """All calls of CALLS prompts, then their raw round trips."""
        calls = [await self._prompt() for _ in range(CALLS)]
        raw = {name: [limits.round_trip_s(self._peer, *self._bytes[name]) for _ in range(CALLS)] for name in NAMES}
        if warm_up:
            return
        for name in NAMES:
            mine = [call[name] for call in calls]
            self._seconds[name] += mine
            self._raw[name] += raw[name]
            self._rounds[name].append(percentile(mine, 0.5) / percentile(raw[name], 0.5))

    def figures(self) -> dict[str, Any]:
        return {
            name: {
                "asked_bytes": self._bytes[name][0],
                "answer_bytes": self._bytes[name][1],
                "p50_us": 1e6 * percentile(self._seconds[name], 0.5),
                "p99_us": 1e6 * percentile(self._seconds[name], 0.99),
                "raw_p50_us": 1e6 * percentile(self._raw[name], 0.5),
                "raw_p99_us": 1e6 * percentile(self._raw[name], 0.99),
                "of_raw": percentile(self._rounds[name], 0.5),
            }
            for name in NAMES
        }

    async def _prompt(self) -> dict[str, float]:
        host, rank, lease, keys = self._engine.host, self._engine.rank, uuid.uuid4().hex, new_keys()
        everything, sums = list(range(KEYS)), [1 << 63] * KEYS

        async def commit() -> None:
            rank.commit(lease, everything, sums)

        reserve_s, reserved = await _timed(
            lambda: host.reserve(lease=lease, request=lease, keys=keys, write=True, ttl_s=TTL_S)
        )
        commit_s, _ = await _timed(commit)
        wait_s, ready = await _timed(lambda: host.wait(lease, TTL_S))
        release_s, _ = await _timed(lambda: host.release(lease))
        if not self._bytes:
            self._bytes = {
                "reserve": _sizes(Reserve(lease=lease, request=lease, keys=keys, write=True, ttl_s=TTL_S), reserved),
                "commit": _sizes(Commit(lease=lease, blocks=everything, checksums=sums), Ok()),
                "wait": _sizes(Wait(lease=lease, timeout_s=TTL_S), ready),
                "release": _sizes(Release(lease=lease), Ok()),
            }
        return {"reserve": reserve_s, "commit": commit_s, "wait": wait_s, "release": release_s}


async def _timed(call: Callable[[], Awaitable[T]]) -> tuple[float, T]:
    started = time.perf_counter()
    found = await call()
    return time.perf_counter() - started, found


def _sizes(call: AnyCall, answer: AnyAnswer) -> tuple[int, int]:
    return len(encode(Call(CALL_ID, call))), len(encode(Answer(CALL_ID, answer)))
