"""The keys that are known here, and where they come from: a file, or a hash in Redis.

Invariants: looking a key up touches neither disk nor network and takes the same time for any; a source that is away or
bad changes nothing: the keys that are known stay, a log line and a metric say so; before any are known, nobody is let
in.
"""

import asyncio
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from redis.asyncio import Redis

from services.gateway.access.client import Client
from services.gateway.access.figures import AccessFigures
from shared.access import key_file, key_table
from shared.access.connection import AWAY
from shared.access.key import MAX_SECRET_CHARS, BadKey, Key, digest
from shared.errors import KeysUnavailable, Unauthorized

log = logging.getLogger(__name__)

LOOK_S = 0.5
RETRY_AFTER_S = 1.0


class Source(Protocol):
    name: str

    async def look(self) -> list[Key] | None:
        """None: nothing new since the last look. Raises BadKey or one of AWAY."""
        ...


class FileSource:
    """`keys`: what it holds now, so that a bad file stops the process at its start."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._seen = self._signature()
        self.keys = key_file.read(path)

    async def look(self) -> list[Key] | None:
        return await asyncio.to_thread(self._look)

    def _look(self) -> list[Key] | None:
        signature = self._signature()
        if signature == self._seen:
            return None
        keys = key_file.read(self._path)
        self._seen = signature  # not of a bad file: that goes on being complained of
        return keys

    def _signature(self) -> tuple[int, int, int]:
        stat = os.stat(self._path)  # noqa: PTH116 - three of its figures
        return stat.st_ino, stat.st_mtime_ns, stat.st_size


class TableSource:
    def __init__(self, redis: Redis, cluster: str) -> None:
        self.name = "redis"
        self._redis = redis
        self._cluster = cluster
        self._version: int | None = None
        self._known = False

    async def look(self) -> list[Key] | None:
        version = await key_table.version(self._redis, self._cluster)
        if self._known and version == self._version:
            return None
        if version is None and self._version is not None:
            raise BadKey("Redis has forgotten all keys")
        table = await key_table.read(self._redis, self._cluster)
        for complaint in table.complaints:
            log.warning("keys: %s: not used", complaint)
        self._known, self._version = True, table.version
        return table.keys


class Keyring:
    def __init__(self, source: Source, figures: AccessFigures, keys: Sequence[Key] | None = None) -> None:
        """`keys`: None where none could be read yet."""
        self._source = source
        self._figures = figures
        self._clients: dict[str, Client] | None = None  # by their key's hash
        self._complaint = ""
        self._change = asyncio.Event()
        if keys is not None:
            self._learn(keys)

    def __len__(self) -> int:
        return len(self._clients or ())

    @property
    def is_known(self) -> bool:
        return self._clients is not None

    def client(self, authorization: bytes) -> Client:
        """Whose key this header holds. Raises Unauthorized or KeysUnavailable."""
        if self._clients is None:
            raise KeysUnavailable("the API keys cannot be read now", retry_after_s=RETRY_AFTER_S)
        scheme, _, secret = authorization.partition(b" ")
        if not authorization:
            raise Unauthorized("no API key was given: send it as 'Authorization: Bearer KEY'")
        if scheme.lower() != b"bearer":
            raise Unauthorized("the API key must be sent as 'Authorization: Bearer KEY'")
        given = secret.strip().decode("latin-1")
        client = self._clients.get(digest(given)) if len(given) <= MAX_SECRET_CHARS else None
        if client is None:
            raise Unauthorized("the API key is wrong, or was revoked")
        return client

    async def run(self) -> None:
        """Follow the source until cancelled."""
        while True:
            try:
                keys = await self._source.look()
            except BadKey as error:
                self._complain(f"{self._source.name}: {error}")
            except AWAY as error:
                self._complain(f"{self._source.name} cannot be read ({type(error).__name__})")
            else:
                self._complaint = ""
                self._figures.stale.set(0)
                if keys is not None:
                    self._learn(keys)
            await asyncio.sleep(LOOK_S)  # neither a file nor a hash in Redis says that it has changed

    async def change(self) -> None:
        """Until other keys are known, or the source has become bad."""
        await self._change.wait()

    def _learn(self, keys: Sequence[Key]) -> None:
        self._clients = {key.hash: Client.of(key) for key in keys}
        log.info("keys: %d of %d tenants from %s", len(keys), len({key.tenant for key in keys}), self._source.name)
        self._changed()

    def _complain(self, words: str) -> None:
        self._figures.stale.set(1)
        if words != self._complaint:
            log.error("keys: %s; %s", words, "the known keys go on" if self.is_known else "nobody is let in")
            self._complaint = words
            self._changed()

    def _changed(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()
