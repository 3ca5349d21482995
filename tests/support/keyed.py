"""Gateways that want keys, sharing one NATS and one Redis, and the keys to them."""

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import openai

from services.gateway.access.access import Parts
from shared.access import key_file
from shared.access.key import Key, digest, new_secret
from shared.settings import GatewaySettings
from tests.support.gateway_cluster import Cluster
from tests.support.running_gateway import WAIT_S, Running, running_gateway


class Keyed:
    """A key file, and gateways that read it."""

    def __init__(self, cluster: Cluster, path: Path, redis_url: str) -> None:
        self.cluster = cluster
        self.path = path
        self.redis_url = redis_url
        self.secrets: dict[str, str] = {}  # by key id
        key_file.change(path, lambda keys: keys)

    def made(self, name: str, tenant: str = "acme", **more) -> Key:
        secret = self.secrets[name] = new_secret()
        return Key(id=name, tenant=tenant, hash=digest(secret), **more)

    def add(self, name: str, tenant: str = "acme", **more) -> None:
        key = self.made(name, tenant, **more)
        key_file.change(self.path, lambda keys: [*keys, key])

    def revoke(self, name: str) -> None:
        key_file.change(self.path, lambda keys: [key for key in keys if key.id != name])

    @asynccontextmanager
    async def gateway(self, gateway_id: str = "gateway-0", *, keys: str = "", **more):
        settings = GatewaySettings(
            id=gateway_id,
            cluster="test",
            nats_url=self.cluster.url,
            redis_url=self.redis_url,
            model=self.cluster._model,
            keys=keys or str(self.path),
            queue_s=5.0,
            **more,
        )
        async with running_gateway(settings) as running:
            yield running

    def client(self, running: Running, name: str) -> openai.AsyncOpenAI:
        return running.client.with_options(api_key=self.secrets[name])


def parts(running: Running) -> Parts:
    found = running.deps.access.parts
    assert found is not None
    return found


async def until_keys(running: Running, condition: Callable[[], bool]) -> None:
    """Wait until the keys have changed so that this holds."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await parts(running).keyring.change()


async def until_beats(*gateways: Running) -> None:
    """Wait until each gateway knows how many there are."""
    async with asyncio.timeout(WAIT_S):
        while any(parts(one).gateways.count() != len(gateways) for one in gateways):
            await gateways[0].deps.fleet.change()  # workers beat more often than gateways do
