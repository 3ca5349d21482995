"""A gateway in the test's own loop, behind a real HTTP server, wired by the same classes as `__main__`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import openai

from services.gateway import gateway as parts
from services.gateway.access.access import Access
from services.gateway.background import BackgroundTasks
from services.gateway.gateway import Gateway
from services.gateway.http.server import bound_sends, make_server
from services.gateway.http.tokenizer import ChatTokenizer
from services.gateway.observe.metrics import Metrics
from services.gateway.request.context import Deps
from shared.access.connection import open_redis
from shared.bus import Bus
from shared.probes import listen
from shared.settings import GatewaySettings

MODEL = "tiny"
WAIT_S = 10.0


@dataclass
class Running:
    gateway: Gateway
    tokenizer: ChatTokenizer
    url: str
    client: openai.AsyncOpenAI

    @property
    def deps(self) -> Deps:
        return self.gateway.deps

    async def until(self, condition) -> None:
        """Wait until the fleet has changed so that this holds."""
        async with asyncio.timeout(WAIT_S):
            while not condition(self.deps):
                await self.deps.fleet.change()

    async def until_idle(self) -> None:
        assert await parts.until_idle(self.deps, WAIT_S)

    def sample(self, name: str, **labels: str) -> float:
        return self.deps.metrics.registry.get_sample_value(name, labels) or 0.0


@asynccontextmanager
async def running_gateway(settings: GatewaySettings) -> AsyncIterator[Running]:
    tokenizer = ChatTokenizer.load(settings.model)
    metrics = Metrics(MODEL)
    access = Access.open(settings, metrics.registry)
    listener = listen("127.0.0.1", 0, setting="port")
    bound_sends(listener)
    bus = await Bus.connect(settings.nats_url, settings.id)
    try:
        async with (
            open_redis(settings.redis_url) as redis,
            BackgroundTasks() as background,
            asyncio.TaskGroup() as tasks,
        ):
            gateway = parts.make(
                settings, MODEL, bus=bus, redis=redis, metrics=metrics, background=background, access=access
            )
            await parts.listen(gateway)
            server = make_server(gateway, tokenizer)
            serving = tasks.create_task(server._serve([listener]))
            watching = tasks.create_task(parts.watch(gateway, "1", ""))
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=WAIT_S)
            try:
                yield Running(gateway, tokenizer, url, client)
            finally:
                await client.close()
                server.should_exit = True
                await serving
                watching.cancel()
    finally:
        await access.close()
        await bus.close()
