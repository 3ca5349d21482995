"""Keys in Redis, for many gateways on many machines.

`baton:{cluster}:keys`          hash    id -> the key's entry, MessagePack
`baton:{cluster}:keys:version`  string  counts changes; gateways read the hash again when it is another one

Neither expires, so that a Redis which evicts only what expires keeps them. Invariant: both change in one transaction.
"""

import msgspec
from redis.asyncio import Redis

from shared.access.key import BadKey, Key, check_unique, read_key


def table_name(cluster: str) -> str:
    return f"baton:{cluster}:keys"


def version_name(cluster: str) -> str:
    return f"baton:{cluster}:keys:version"


async def version(redis: Redis, cluster: str) -> int | None:
    """None: no key was ever added, or Redis has forgotten them all."""
    found = await redis.get(version_name(cluster))
    return None if found is None else int(found)


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """`complaints`: of entries that cannot be used, as one that a newer Baton wrote. The others count all the same."""

    version: int | None
    keys: list[Key]
    complaints: list[str]


async def read(redis: Redis, cluster: str) -> Table:
    """Raises BadKey when keys contradict each other."""
    pipe = redis.pipeline(transaction=True)
    pipe.get(version_name(cluster))
    pipe.hgetall(table_name(cluster))
    found, entries = await pipe.execute()
    keys, complaints = [], []
    for name, entry in sorted(entries.items()):
        try:
            keys.append(_decoded(name, entry))
        except BadKey as error:
            complaints.append(str(error))
    check_unique(keys)
    return Table(version=None if found is None else int(found), keys=keys, complaints=complaints)


async def add(redis: Redis, cluster: str, key: Key) -> None:
    pipe = redis.pipeline(transaction=True)
    pipe.hset(table_name(cluster), key.id, msgspec.msgpack.encode(key))
    pipe.incr(version_name(cluster))
    await pipe.execute()


async def revoke(redis: Redis, cluster: str, key_id: str) -> bool:
    """False: there is no such key."""
    pipe = redis.pipeline(transaction=True)
    pipe.hdel(table_name(cluster), key_id)
    pipe.incr(version_name(cluster))
    removed, _ = await pipe.execute()
    return bool(removed)


def _decoded(name: bytes, entry: bytes) -> Key:
    place = f"key {name.decode(errors='replace')}"
    try:
        return read_key(msgspec.msgpack.decode(entry), place)
    except msgspec.DecodeError:
        raise BadKey(f"{place}: not MessagePack") from None
