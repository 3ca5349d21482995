"""Where the keys of a cluster are, for the commands that change them: a file or the cluster's Redis."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from redis.asyncio import Redis

from services.launcher.options import home
from services.launcher.refusal import UserError
from services.launcher.state import ClusterRecord
from shared.access import key_file, key_table
from shared.access.connection import AWAY, open_redis
from shared.access.key import BadKey, Key
from shared.settings import CommonSettings, load
from shared.tls import Tls

T = TypeVar("T")

IN_REDIS = "redis"


class KeyStore(Protocol):
    name: str

    def read(self) -> list[Key]: ...

    def add(self, key: Key) -> None: ...

    def revoke(self, key_id: str) -> bool:
        """False: there is no such key."""
        ...


class FileStore:
    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def read(self) -> list[Key]:
        try:
            return key_file.read(self._path)
        except FileNotFoundError:
            return []
        except (BadKey, OSError) as error:
            raise _unusable(self._path, error) from error

    def add(self, key: Key) -> None:
        self._change(lambda keys: [*keys, key])

    def revoke(self, key_id: str) -> bool:
        if all(key.id != key_id for key in self.read()):
            return False
        self._change(lambda keys: [key for key in keys if key.id != key_id])
        return True

    def _change(self, edit: Callable[[list[Key]], list[Key]]) -> None:
        try:
            key_file.change(self._path, edit)
        except (BadKey, OSError) as error:
            raise _unusable(self._path, error) from error


class RedisStore:
    def __init__(self, url: str, cluster: str) -> None:
        self.name = f"the Redis of {cluster}"
        self._url = url
        self._cluster = cluster

    def read(self) -> list[Key]:
        return in_redis(self._url, lambda redis: key_table.read(redis, self._cluster)).keys

    def add(self, key: Key) -> None:
        in_redis(self._url, lambda redis: key_table.add(redis, self._cluster, key))

    def revoke(self, key_id: str) -> bool:
        return in_redis(self._url, lambda redis: key_table.revoke(redis, self._cluster, key_id))


def in_redis(url: str, work: Callable[[Redis], Awaitable[T]]) -> T:
    """Raises UserError when Redis does not answer."""

    async def run() -> T:
        redis = open_redis(url, tls=_tls(os.environ))
        try:
            return await work(redis)
        finally:
            await redis.aclose()

    try:
        return asyncio.run(run())
    except AWAY as error:
        raise UserError(f"Redis does not answer ({type(error).__name__}): see baton status") from error
    except BadKey as error:
        raise UserError(f"the keys in Redis cannot be used: {error}") from error


def _tls(environ: Mapping[str, str]) -> Tls:
    """As a gateway would read it from this environment; a cluster on one machine has none."""
    return Tls(**{part: environ.get(f"BATON_TLS_{part.upper()}", "") for part in ("ca", "cert", "key")})


def find_store(file: str | None, record: ClusterRecord | None, environ: Mapping[str, str]) -> KeyStore:
    """The file that was named; else where the running cluster, or this environment, has its keys; else the usual."""
    if file is not None:
        return FileStore(Path(file).expanduser().absolute())
    keys = configured(record, environ)
    if keys == IN_REDIS:
        return RedisStore(*find_redis_url(record, environ))
    return FileStore(Path(keys).expanduser().absolute()) if keys else FileStore(usual_file(environ))


def configured(record: ClusterRecord | None, environ: Mapping[str, str]) -> str:
    """The setting `keys` of the gateways, as far as it is known here."""
    return str(_gateway(record).get("keys", "")) if record is not None else environ.get("BATON_KEYS", "")


def find_redis_url(record: ClusterRecord | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """And the cluster's name there. Without a cluster on this machine: as a gateway would read this environment."""
    if record is not None:
        return str(_gateway(record)["redis_url"]), record.cluster
    usual = load(CommonSettings, environ)
    return usual.redis_url, usual.cluster


def usual_file(environ: Mapping[str, str]) -> Path:
    return home(environ) / "keys.yaml"


def check_keys(keys: str) -> None:
    """Before anything is started. Raises UserError for a file that is not there or cannot be used."""
    if keys in ("", IN_REDIS):
        return
    if not Path(keys).exists():
        raise UserError(f"--keys: there is no {keys}: make a first key with baton keys add --tenant NAME --file {keys}")
    FileStore(Path(keys)).read()


def _gateway(record: ClusterRecord) -> dict[str, object]:
    return next(service.settings for service in record.services if service.role == "gateway")


def _unusable(path: Path, error: BadKey | OSError) -> UserError:
    return UserError(f"{path}: {error if isinstance(error, BadKey) else error.strerror}")
