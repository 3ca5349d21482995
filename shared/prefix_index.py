"""The prefix index in Redis, as its readers and writers must agree on it: which nodes hold which block key.

`baton:{cluster}:kv:{key}`   string  bitmap of node numbers (SETBIT order); expires KEY_TTL_S after the last SETBIT
`baton:{cluster}:nodes`      hash    node -> its number now; a node's older numbers are not in it
`baton:{cluster}:number:{n}` string  who leases the number; expires NUMBER_TTL_S after it was last renewed

A store takes a new number at every start, because its arena starts empty. A number that is not renewed leaves the hash
after half its lease; in the other half the writers that announce a key again clear the bits of numbers that are not in
the hash. So a number that is given again does not inherit what its predecessor held.
"""

from collections.abc import Sequence

from redis.asyncio import Redis

from shared.tls import NO_TLS, Tls

KEY_TTL_S = 3600
ANNOUNCE_S = 2400.0  # each node announces all it holds this often
NUMBER_TTL_S = 7200
RENEW_S = 300.0
MAX_NODES = 1024
TIMEOUT_S = 1.0


def block_name(cluster: str, key: bytes) -> bytes:
    return f"baton:{cluster}:kv:".encode() + key


def nodes_name(cluster: str) -> str:
    return f"baton:{cluster}:nodes"


def number_name(cluster: str, number: int) -> str:
    return f"baton:{cluster}:number:{number}"


def open_redis(url: str, tls: Tls = NO_TLS) -> Redis:
    """Answers come within TIMEOUT_S or raise redis.exceptions.RedisError; nothing connects yet."""
    return Redis.from_url(url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, **tls.redis_options(url))


def has_bit(bitmap: bytes, number: int) -> bool:
    """Redis counts bits from the most significant one of the first byte."""
    byte, bit = divmod(number, 8)
    return byte < len(bitmap) and bool(bitmap[byte] >> (7 - bit) & 1)


def bits_of(bitmap: bytes) -> list[int]:
    return [number for number in range(len(bitmap) * 8) if has_bit(bitmap, number)]


class PrefixReader:
    """Who holds how long a prefix. One round trip; raises RedisError when Redis is away: the caller goes on without."""

    def __init__(self, redis: Redis, cluster: str) -> None:
        self._redis = redis
        self._cluster = cluster

    async def holders(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Leading blocks that each node holds; nodes that hold none are left out.

        A node that died may be named for up to an hour: ask only about those that beat.
        """
        if not keys:
            return {}
        pipe = self._redis.pipeline(transaction=False)
        pipe.mget([block_name(self._cluster, key) for key in keys])
        pipe.hgetall(nodes_name(self._cluster))
        bitmaps, numbers = await pipe.execute()
        return prefix_lengths(bitmaps, {node.decode(): int(number) for node, number in numbers.items()})


def prefix_lengths(bitmaps: Sequence[bytes | None], numbers: dict[str, int]) -> dict[str, int]:
    """Of each node, how many leading bitmaps have its bit."""
    lengths: dict[str, int] = {}
    holding = dict(numbers)
    for length, bitmap in enumerate(bitmaps, start=1):
        holding = {node: number for node, number in holding.items() if bitmap and has_bit(bitmap, number)}
        if not holding:
            break
        for node in holding:
            lengths[node] = length
    return lengths
