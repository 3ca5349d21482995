"""Which nodes hold how much of a prompt: asked of the index in Redis when a hit could matter.

Redis is an accelerator: what it does not say in `index_s` is not known, and after an error it is left alone for REST_S.
Asked for a few keys first and for more only while all were held, so that a cold prompt costs one short round trip.
"""

import asyncio
import logging
import time
from collections.abc import Callable

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.gateway.scheduling.fleet import Fleet
from shared.kv.blocks import block_keys
from shared.prefix_index import PrefixReader
from shared.wire import TOKEN_BYTES

log = logging.getLogger(__name__)

WORTH_S = 0.005  # what a prompt takes to compute, below which nothing is asked
REST_S = 2.0
FIRST_KEYS = 32  # then twice as many each time
THREAD_BYTES = 8192 * TOKEN_BYTES  # prompts above this are hashed in a thread: 0.2 ms for so many


class Prefixes:
    def __init__(self, redis: Redis, cluster: str, fleet: Fleet, *, index_s: float, failed: Callable[[], None]) -> None:
        """`failed`: told of every look-up that Redis did not answer."""
        self._reader = PrefixReader(redis, cluster)
        self._fleet = fleet
        self._index_s = index_s
        self._failed = failed
        self._rests_until = 0.0

    async def hits(self, tokens: bytes, salt: bytes = b"") -> dict[str, int]:
        """Node -> leading tokens of the packed prompt whose KV it holds. Never raises, and never takes long."""
        count = len(tokens) // TOKEN_BYTES
        shape = self._fleet.shape()
        if shape is None or self._fleet.prompt_s(count) < WORTH_S or time.monotonic() < self._rests_until:
            return {}
        block_size, fingerprint = shape
        try:
            async with asyncio.timeout(self._index_s):
                if len(tokens) > THREAD_BYTES:
                    keys = await asyncio.to_thread(block_keys, tokens, block_size, fingerprint=fingerprint, salt=salt)
                else:
                    keys = block_keys(tokens, block_size, fingerprint=fingerprint, salt=salt)
                blocks = await self._holders(keys)
        except (RedisError, OSError, TimeoutError) as error:
            log.info("prefix index: %s", type(error).__name__)
            self._rests_until = time.monotonic() + REST_S
            self._failed()
            return {}
        return {node: min(held * block_size, count) for node, held in blocks.items()}

    async def _holders(self, keys: list[bytes]) -> dict[str, int]:
        held: dict[str, int] = {}
        asked, size = 0, FIRST_KEYS
        while asked < len(keys):
            part = await self._reader.holders(keys[asked : asked + size])
            for node, blocks in part.items():
                if held.get(node, 0) == asked:
                    held[node] = asked + blocks
            asked, size = asked + size, size * 2
            if not any(blocks == min(asked, len(keys)) for blocks in held.values()):
                break
        return held
