"""Keys, quotas and usage as a request's journey sees them: `client`, then `charge`, and `settle` on every way out.

Invariants: without keys configured everybody is anonymous and Redis is never asked; what was charged and not used is
given back exactly once; a request that was refused costs nothing.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from services.gateway.access.buckets import Amount, duration, reset_s
from services.gateway.access.client import ANONYMOUS, Client
from services.gateway.access.figures import AccessFigures
from services.gateway.access.gateways import GatewayCount
from services.gateway.access.keyring import FileSource, Keyring, TableSource
from services.gateway.access.quotas import Quotas, Taken
from services.gateway.access.shared_buckets import SharedBuckets
from services.gateway.access.usage import UsageLog
from services.gateway.answer.errors import Headers
from services.gateway.answer.render import Usage
from services.gateway.background import BackgroundTasks
from shared import wire
from shared.access.connection import open_redis
from shared.access.key import BadKey
from shared.access.usage_table import Used
from shared.errors import BatonError, ExceedsQuota, RateLimited, Refused, SettingsError
from shared.settings import GatewaySettings

log = logging.getLogger(__name__)

IN_REDIS = "redis"


@dataclass(slots=True, kw_only=True)
class Bill:
    """What one request was charged. `usage`: set when it ends well."""

    client: Client
    model: str
    prompt: int  # tokens
    charged: Amount
    shared: bool
    usage: Usage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Tokens that a request may use. `bounded`: the client said how many the completion may have."""

    prompt: int
    completion: int
    bounded: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What there is when keys are configured."""

    redis: Redis
    keyring: Keyring
    gateways: GatewayCount
    quotas: Quotas
    usage: UsageLog


class Access:
    """Create with `open`, then `start`, and `close` at the end. Without parts everybody is anonymous."""

    def __init__(self, parts: Parts | None = None) -> None:
        self.parts = parts
        self._background: BackgroundTasks | None = None

    @classmethod
    def open(cls, settings: GatewaySettings, registry: CollectorRegistry) -> "Access":
        """Raises SettingsError for a file that cannot be used."""
        if not settings.keys:
            return cls()
        figures = AccessFigures(registry)
        redis = open_redis(settings.redis_url, tls=settings.tls)
        gateways = GatewayCount()
        shared = SharedBuckets(redis, settings.cluster)
        parts = Parts(
            redis=redis,
            keyring=_keyring(settings, redis, figures),
            gateways=gateways,
            quotas=Quotas(shared, gateways, figures),
            usage=UsageLog(redis, settings.cluster, figures),
        )
        figures.live(
            keys=lambda: len(parts.keyring),
            buckets=lambda: len(parts.quotas),
            waiting=lambda: len(shared),
            pending=lambda: len(parts.usage),
        )
        return cls(parts)

    def start(self, background: BackgroundTasks) -> None:
        self._background = background
        if self.parts is not None:
            background.start(self.parts.keyring.run())
            background.start(self.parts.usage.run())

    async def close(self) -> None:
        """The last sums are written, if Redis is there."""
        if self.parts is None:
            return
        if not await self.parts.usage.flush():
            log.warning("usage: Redis is away: %d sums are lost", len(self.parts.usage))
        await self.parts.redis.aclose()

    @property
    def wants_keys(self) -> bool:
        return self.parts is not None

    def not_ready(self) -> str | None:
        known = self.parts is None or self.parts.keyring.is_known
        return None if known else "the API keys could not be read yet"

    def hear(self, beat: wire.Heartbeat, now: float) -> None:
        """Of a gateway, this one's included."""
        if self.parts is not None:
            self.parts.gateways.hear(beat.id, now)

    def client(self, authorization: bytes) -> Client:
        """Whose key this header holds. Raises Unauthorized or KeysUnavailable."""
        return ANONYMOUS if self.parts is None else self.parts.keyring.client(authorization)

    async def charge(self, client: Client, model: str, wanted: Wanted, headers: Headers) -> Bill:
        """Take what may be used. Raises RateLimited or ExceedsQuota.

        `headers`: of the answer, whatever it will be; x-ratelimit-* are put there.
        """
        if self.parts is None or self._background is None or not client.is_limited:
            return Bill(client=client, model=model, prompt=wanted.prompt, charged=Amount(0, 0), shared=False)
        cost = Amount(1, _tokens(wanted, client.limits.tokens))
        taken = await self.parts.quotas.take(self._background, client, cost)
        headers += rate_headers(client.limits, taken)
        if not taken.allowed:
            what = " and ".join(lacking(taken, cost))
            raise RateLimited(f"this key's limit of {what} in a minute is reached", retry_after_s=taken.wait_s)
        return Bill(client=client, model=model, prompt=wanted.prompt, charged=cost, shared=taken.shared)

    def settle(self, bill: Bill, error: BatonError | None, *, began: bool, generated: int) -> None:
        """On every way out. `began`: a worker was asked; `generated`: tokens that came, where `usage` does not say."""
        if self.parts is None or self._background is None:
            return
        used = spent(bill, error, began=began, generated=generated)
        if used.requests:
            self.parts.usage.add(bill.client.tenant, bill.model, used)
        if bill.client.is_limited:
            tokens = bill.charged.tokens - used.prompt - used.completion
            back = Amount(bill.charged.requests - used.requests, tokens)
            if any(back):
                self._background.start(self.parts.quotas.give(self._background, bill.client, back, shared=bill.shared))


def _keyring(settings: GatewaySettings, redis: Redis, figures: AccessFigures) -> Keyring:
    if settings.keys == IN_REDIS:
        return Keyring(TableSource(redis, settings.cluster), figures)
    try:
        source = FileSource(Path(settings.keys).expanduser())
    except (BadKey, OSError) as error:
        why = error if isinstance(error, BadKey) else error.strerror
        raise SettingsError(f"setting 'keys': {settings.keys}: {why}") from None
    return Keyring(source, figures, source.keys)


def _tokens(wanted: Wanted, limit: float) -> float:
    """How many are taken. Raises ExceedsQuota where the bucket can never hold them.

    Without a bound the completion may fill the context, which a small limit cannot hold: then all of it is taken.
    """
    tokens = wanted.prompt + wanted.completion
    if limit and tokens > limit:
        if wanted.bounded or wanted.prompt > limit:
            raise ExceedsQuota(
                f"this request may use {tokens} tokens, and its key {limit:.0f} in a minute: shorten the prompt or "
                "ask for fewer tokens"
            )
        return limit
    return tokens


def spent(bill: Bill, error: BatonError | None, *, began: bool, generated: int) -> Used:
    """A refused request is free; of one that failed, or whose client left, counts what was done for it."""
    if bill.usage is not None:
        usage = bill.usage
        return Used(requests=1, prompt=usage.prompt, cached=usage.cached, completion=usage.completion)
    if isinstance(error, Refused) and not generated:
        return Used()
    return Used(requests=1, prompt=bill.prompt if began else 0, completion=generated)


def rate_headers(limits: Amount, taken: Taken) -> Headers:
    """Of the limits that there are. `limits`: the key's own."""
    found: Headers = []
    for what, whole, limit, left in zip(Amount._fields, limits, taken.limits, taken.left, strict=True):
        if limit:
            found += [
                (f"x-ratelimit-limit-{what}".encode(), f"{whole:.0f}".encode()),
                (f"x-ratelimit-remaining-{what}".encode(), f"{max(0, int(left))}".encode()),
                (f"x-ratelimit-reset-{what}".encode(), duration(reset_s(left, limit)).encode()),
            ]
    return found


def lacking(taken: Taken, cost: Amount) -> list[str]:
    """Of what there was too little."""
    return [
        what
        for what, limit, left, wanted in zip(Amount._fields, taken.limits, taken.left, cost, strict=True)
        if limit and left < min(wanted, limit)
    ]
