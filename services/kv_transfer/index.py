"""Writes what this node holds into the prefix index (shared/prefix_index.py).

Invariants: the store never waits for Redis and never sees its errors; the backlog is bounded, and what does not fit is
dropped and counted; after Redis was away, or had forgotten this node's number, everything held is announced anew.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from shared.backoff import Backoff
from shared.prefix_index import (
    ANNOUNCE_S,
    KEY_TTL_S,
    MAX_NODES,
    NUMBER_TTL_S,
    RENEW_S,
    bits_of,
    block_name,
    nodes_name,
    number_name,
)

log = logging.getLogger(__name__)

MAX_BACKLOG = 200_000
BATCH = 512
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0


# One answer for a whole batch: reading an answer for each command took two thirds of the store's process.
_WRITE = """
for place, name in ipairs(KEYS) do
  redis.call('SETBIT', name, ARGV[1], string.sub(ARGV[2], place, place))
  redis.call('EXPIRE', name, ARGV[3])
end
"""


class IndexWriter:
    """Call `note` as keys come and go; `run` does the rest until cancelled."""

    def __init__(
        self,
        redis: Redis,
        *,
        cluster: str,
        node: str,
        incarnation: str,
        held_keys: Callable[[], Iterable[bytes]],
        holds: Callable[[bytes], bool],
        dropped: Callable[[], None],
        max_backlog: int = MAX_BACKLOG,
    ) -> None:
        """Does nothing yet.

        Args:
            redis: from `prefix_index.open_redis`; the caller closes it.
            cluster: its name.
            node: this node.
            incarnation: of this process; marks the number as leased by it.
            held_keys: all keys that the store holds now.
            holds: whether the store holds a key now.
            dropped: counts an update that did not fit the backlog.
            max_backlog: updates kept while Redis is slow or away.
        """
        self.number: int | None = None  # None while Redis is away
        self._leased: int | None = None  # the number that was ours last
        self._redis = redis
        self._write = redis.register_script(_WRITE)
        self._cluster = cluster
        self._node = node
        self._owner = f"{node} {incarnation}".encode()
        self._held_keys = held_keys
        self._holds = holds
        self._dropped = dropped
        self._max_backlog = max_backlog
        self._backlog: dict[bytes, bool] = {}
        self._announce: dict[bytes, None] = {}
        self._wake = asyncio.Event()

    @property
    def backlog(self) -> int:
        return len(self._backlog) + len(self._announce)

    @property
    def is_settled(self) -> bool:
        """Redis has been told all there is."""
        return self.number is not None and self.backlog == 0

    def note(self, key: bytes, is_held: bool) -> None:
        """A key was bound or evicted. Only its latest state is kept."""
        if key not in self._backlog and len(self._backlog) >= self._max_backlog:
            self._dropped()
            return
        self._backlog[key] = is_held
        self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled."""
        backoff = Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S)
        while True:
            try:
                await self._lease_number()
                self._announce = dict.fromkeys(self._held_keys())
                log.info("index: node number %s, %d keys to announce", self.number, len(self._announce))
                backoff.reset()
                await self._serve()
            except (RedisError, OSError, TimeoutError) as error:
                if self.number is not None:
                    log.warning("index: Redis is away: %s; requests go on without it", type(error).__name__)
                self.number = None
                await asyncio.sleep(backoff.next_s())

    async def retire(self) -> None:
        """Say that this node holds nothing any more; its number stays leased until no key can name it."""
        if self.number is None:
            return
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            if await self._redis.hget(nodes_name(self._cluster), self._node) == str(self.number).encode():
                await self._redis.hdel(nodes_name(self._cluster), self._node)

    async def _serve(self) -> None:
        """Write until Redis fails or has forgotten the number."""
        renewed = announced = time.monotonic()
        while True:
            now = time.monotonic()
            if now - renewed >= RENEW_S:
                renewed = now
                if not await self._renew():
                    return
            if now - announced >= ANNOUNCE_S:
                announced = now
                self._announce = dict.fromkeys(self._held_keys())
            if self._backlog:
                await self._write_changes()
            elif self._announce:
                await self._write_announcement()
            else:
                await self._pause(min(renewed + RENEW_S, announced + ANNOUNCE_S) - now)

    async def _pause(self, pause_s: float) -> None:
        self._wake.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._wake.wait()

    async def _write_changes(self) -> None:
        batch = {key: self._backlog[key] for key in list(self._backlog)[:BATCH]}
        names = [block_name(self._cluster, key) for key in batch]
        bits = bytes(b"01"[is_held] for is_held in batch.values())
        await self._write(keys=names, args=[self._number(), bits, KEY_TTL_S])
        for key, is_held in batch.items():
            if self._backlog.get(key) is is_held:
                del self._backlog[key]

    async def _write_announcement(self) -> None:
        """Set this node's bit again, and clear those of numbers that nobody has any more."""
        batch = list(self._announce)[:BATCH]
        pipe = self._redis.pipeline(transaction=False)
        pipe.hvals(nodes_name(self._cluster))
        pipe.mget([block_name(self._cluster, key) for key in batch])
        living, bitmaps = await pipe.execute()
        known = {int(number) for number in living}
        pipe = self._redis.pipeline(transaction=False)
        for key, bitmap in zip(batch, bitmaps, strict=True):
            if not self._holds(key) or key in self._backlog:
                continue  # evicted meanwhile; its own update follows or was written
            name = block_name(self._cluster, key)
            pipe.setbit(name, self._number(), 1)
            for number in bits_of(bitmap or b""):
                if number not in known and number != self.number:
                    pipe.setbit(name, number, 0)
            pipe.expire(name, KEY_TTL_S)
        await pipe.execute()
        for key in batch:
            self._announce.pop(key, None)

    # ---- the number ------------------------------------------------------------------------------------------

    def _number(self) -> int:
        if self.number is None:
            raise AssertionError("written without a node number")
        return self.number

    async def _lease_number(self) -> None:
        """The one that is still ours, or the lowest that is free."""
        if self._leased is None or await self._redis.get(number_name(self._cluster, self._leased)) != self._owner:
            self._leased = await self._free_number()
        await self._redis.hset(nodes_name(self._cluster), self._node, str(self._leased))
        self.number = self._leased

    async def _free_number(self) -> int:
        for number in range(MAX_NODES):
            if await self._redis.set(number_name(self._cluster, number), self._owner, nx=True, ex=NUMBER_TTL_S):
                return number
        raise RedisError(f"all {MAX_NODES} node numbers are leased")

    async def _renew(self) -> bool:
        """Keep the number; drop from the hash those that were not renewed for half their lease."""
        name = number_name(self._cluster, self._number())
        if await self._redis.get(name) != self._owner:
            log.warning("index: Redis has forgotten this node's number")
            return False
        await self._redis.expire(name, NUMBER_TTL_S)
        numbers = await self._redis.hgetall(nodes_name(self._cluster))
        pipe = self._redis.pipeline(transaction=False)
        for number in numbers.values():
            pipe.ttl(number_name(self._cluster, int(number)))
        for node, left_s in zip(numbers, await pipe.execute(), strict=True):
            if left_s < NUMBER_TTL_S / 2:
                await self._redis.hdel(nodes_name(self._cluster), node)
        return True
