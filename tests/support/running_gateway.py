"""A gateway in the test's own loop, behind a real HTTP server, wired by the same classes as `__main__`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import openai

from services.gateway.access.access import Access
from services.gateway.chores import Chores
from services.gateway.edge.tokens import ChatTokenizer
from services.gateway.gateway import Gateway
from services.gateway.metrics import Metrics
from services.gateway.server import bound_sends, make_server
from shared.access.connection import open_redis
from shared.bus import Bus
from shared.probes import listen
from shared.settings import GatewaySettings

MODEL = "tiny"
WAIT_S = 10.0


@dataclass
class Running:
    gateway: Gateway
    url: str
    client: openai.AsyncOpenAI

    async def until(self, condition) -> None:
        """Wait until the fleet has changed so that this holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition(self.gateway):
                await self.gateway.fleet_change()

    async def until_idle(self) -> None:
        assert await self.gateway._empty(WAIT_S)

    def sample(self, name: str, **labels: str) -> float:
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running_gateway(settings: GatewaySettings) -> AsyncIterator[Running]:
    tokenizer = ChatTokenizer.load(settings.model)
    metrics = Metrics(MODEL)
    access = Access.open(settings, metrics.registry)
    listener = listen("127.0.0.1", 0, setting="port")
    bound_sends(listener)
    bus = await Bus.connect(settings.nats_url, settings.id)
    try:
        async with open_redis(settings.redis_url) as redis, Chores() as chores, asyncio.TaskGroup() as tasks:
            gateway = Gateway(
                settings,
                MODEL,
                bus=bus,
                tokenizer=tokenizer,
                redis=redis,
                metrics=metrics,
                chores=chores,
                access=access,
            )
            await gateway.listen()
            server = make_server(gateway)
            serving = tasks.create_task(server._serve([listener]))
            watching = tasks.create_task(gateway.watch("1", ""))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
            try:
                yield Running(gateway, url, client)
            finally:
                await client.close()
                server.should_exit = True
                await serving
                watching.cancel()
    finally:
        await access.close()
        await bus.close()
