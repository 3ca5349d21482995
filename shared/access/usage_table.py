"""Tokens used, in Redis: by day (UTC), tenant, model and kind.

`baton:{cluster}:usage:{day}`  hash  tenant, model and kind, between tabs -> count; expires KEEP_S after its last change
"""

import datetime as dt
from collections.abc import Iterable, Mapping

import msgspec
from redis.asyncio import Redis

KEEP_S = 400 * 86_400
KINDS = ("requests", "prompt", "cached", "completion")

Place = tuple[str, str, str]  # day, tenant, model


class Used(msgspec.Struct, kw_only=True):
    """`cached` tokens are among those of `prompt`."""

    requests: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def add(self, other: "Used") -> None:
        for kind in KINDS:
            setattr(self, kind, getattr(self, kind) + getattr(other, kind))


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    day: str
    tenant: str
    model: str
    used: Used


def day_name(cluster: str, day: str) -> str:
    return f"baton:{cluster}:usage:{day}"


def today() -> str:
    return dt.datetime.now(dt.UTC).date().isoformat()


async def write(redis: Redis, cluster: str, pending: Mapping[Place, Used]) -> None:
    """All of it or nothing, in one round trip."""
    pipe = redis.pipeline(transaction=True)
    for (day, tenant, model), used in pending.items():
        for kind in KINDS:
            if count := getattr(used, kind):
                pipe.hincrby(day_name(cluster, day), f"{tenant}\t{model}\t{kind}", count)
    for day in {day for day, _, _ in pending}:
        pipe.expire(day_name(cluster, day), KEEP_S)
    await pipe.execute()


async def read(redis: Redis, cluster: str, days: Iterable[str]) -> list[UsageRow]:
    """By day, then tenant, then model."""
    wanted = list(days)
    pipe = redis.pipeline(transaction=False)
    for day in wanted:
        pipe.hgetall(day_name(cluster, day))
    rows = []
    for day, fields in zip(wanted, await pipe.execute(), strict=True):
        found: dict[tuple[str, str], Used] = {}
        for field, count in fields.items():
            tenant, rest = field.decode().split("\t", 1)
            model, kind = rest.rsplit("\t", 1)
            if kind in KINDS:
                setattr(found.setdefault((tenant, model), Used()), kind, int(count))
        rows += [UsageRow(day=day, tenant=who, model=model, used=used) for (who, model), used in sorted(found.items())]
    return rows
