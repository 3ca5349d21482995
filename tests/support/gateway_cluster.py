"""A gateway with fake workers around it, over a real NATS."""

import json

from shared.settings import GatewaySettings
from tests.support.fake_workers import FakeWorker, Handoffs
from tests.support.running_gateway import Running, running_gateway


class Cluster:
    """A gateway with fake workers around it."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self._model = model
        self.workers: dict[str, FakeWorker] = {}
        self.handoffs = Handoffs()
        self.settings: dict[str, object] = {}

    def gateway(self):
        values = {"arrangement": "split", "queue_s": 5.0, "progress_s": 5.0, **self.settings}
        return running_gateway(
            GatewaySettings(id="gateway-0", cluster="test", nats_url=self.url, model=self._model, **values)
        )

    async def add(self, running: Running, *ids: str, **beat) -> list[FakeWorker]:
        added = [
            await FakeWorker(self.url, self.handoffs, worker=one, role=one.split("-")[0], **beat).start() for one in ids
        ]
        self.workers.update((worker.id, worker) for worker in added)
        await running.until(lambda gateway: all(gateway.fleet.beats(one) for one in ids))
        return added


def receipt(response) -> dict:
    return json.loads(response.headers["x-baton-receipt"])


async def assert_nothing_left(running: Running) -> None:
    await running.until_idle()
    assert len(running.deps.streams) == 0
    assert len(running.deps.queue) == 0
