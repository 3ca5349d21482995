"""What an API key is, and what is kept of it: never the key itself, only its SHA-256.

A plain fast hash is right here: a key is 256 random bits, so there is nothing to guess that a slow hash would protect,
and every request is looked up by it. Invariants: ids and hashes are unique in a set of keys; the public id, which logs
and lists show, says nothing about the key.
"""

import datetime as dt
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import msgspec

PREFIX = "sk-baton-"
RANDOM_BYTES = 32
MAX_SECRET_CHARS = 256  # longer ones are no keys, and not worth a hash
MAX_KEYS = 100_000

Tier = Literal["priority", "default", "flex"]
TIERS: tuple[str, ...] = get_args(Tier)
USUAL_TIERS: tuple[Tier, ...] = ("default", "flex")

Limit = Annotated[int, msgspec.Meta(ge=0, le=10**12)]
# A label of metrics and a part of Redis fields: no spaces, no control characters.
Tenant = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]


class BadKey(Exception):
    """A key that cannot be used. The message names the entry and what is wrong, and never holds a secret."""


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`hash`: SHA-256 of the whole key, in hex."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$")]
    hash: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
    tenant: Tenant
    name: Annotated[str, msgspec.Meta(max_length=100)] = ""
    tiers: Annotated[list[Tier], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: list(USUAL_TIERS))
    models: list[str] = []  # empty: all
    requests_per_minute: Limit = 0  # 0: no limit
    tokens_per_minute: Limit = 0
    created: dt.date | None = None


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(RANDOM_BYTES)


def new_id() -> str:
    return f"key-{secrets.token_hex(4)}"


def read_key(entry: Any, place: str) -> Key:
    """Raises BadKey that begins with `place`."""
    try:
        return msgspec.convert(entry, Key)
    except msgspec.ValidationError as error:
        shown = entry.get("id") if isinstance(entry, Mapping) else None
        raise BadKey(f"{place}{f' ({shown})' if isinstance(shown, str) else ''}: {error}") from None


def check_unique(keys: Sequence[Key]) -> None:
    """Raises BadKey."""
    if len(keys) > MAX_KEYS:
        raise BadKey(f"{len(keys)} keys: at most {MAX_KEYS} are held")
    ids: set[str] = set()
    hashes: set[str] = set()
    for key in keys:
        if key.id in ids:
            raise BadKey(f"key {key.id}: its id is there twice")
        if key.hash in hashes:
            raise BadKey(f"key {key.id}: its hash is there twice")
        ids.add(key.id)
        hashes.add(key.hash)
