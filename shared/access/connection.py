"""A connection to Redis that says soon when Redis is away: no retries of its own, few sockets."""

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from shared.tls import NO_TLS, Tls

TIMEOUT_S = 1.0
CONNECTIONS = 8

AWAY = (RedisError, OSError, TimeoutError)


def open_redis(url: str, *, timeout_s: float = TIMEOUT_S, tls: Tls = NO_TLS) -> Redis:
    """Answers come within a few times `timeout_s`, or raise one of AWAY; nothing connects yet."""
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=CONNECTIONS,
        timeout=timeout_s,  # for a free one
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        **tls.redis_options(url),
    )
    return Redis.from_pool(pool)
