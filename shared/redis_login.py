"""Whether Redis lets us in: without Redis all goes on; with a wrong password or certificate nothing should begin."""

import logging
import ssl
from collections.abc import Iterator

from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError

from shared.errors import SettingsError

log = logging.getLogger(__name__)


async def check_login(redis: Redis) -> None:
    """Raises SettingsError when Redis is there and refuses us, or is not who it says."""
    try:
        await redis.ping()
    except NoPermissionError:
        return  # this user may not ping, but is one
    except AuthenticationError as error:
        raise SettingsError("setting 'redis_url': Redis refuses this user or password") from error
    except (RedisError, OSError, TimeoutError) as error:
        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError):
                why = cause.reason or cause
                raise SettingsError(
                    f"setting 'redis_url': no TLS with Redis: {why} (see tls_ca, tls_cert and tls_key)"
                ) from error
        log.warning("Redis is away: %s; requests go on without it", type(error).__name__)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
