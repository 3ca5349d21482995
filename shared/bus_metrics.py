"""What a service sees of the bus: how long a round trip takes, whether it is there, what could not be read."""

import asyncio
import contextlib
import time

from prometheus_client import CollectorRegistry, Gauge, Histogram

from shared.bus import Bus
from shared.errors import BatonError

EVERY_S = 2.0
ROUND_TRIPS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)


class BusMetrics:
    """`run` is a task of the service."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._trip = Histogram(
            "baton_bus_round_trip_seconds", "To the NATS server and back", buckets=ROUND_TRIPS, registry=registry
        )
        self._connected = Gauge("baton_bus_connected", "1 while NATS is there", registry=registry)
        self._reconnects = Gauge("baton_bus_reconnects", "Times that the bus came back", registry=registry)
        self._handlers = Gauge("baton_bus_handlers", "Requests from the bus being answered", registry=registry)

    async def run(self, bus: Bus) -> None:
        self._connected.set_function(lambda: bus.connected)
        self._reconnects.set_function(lambda: bus.reconnects)
        self._handlers.set_function(lambda: bus.running_handlers)
        while True:
            began = time.perf_counter()
            with contextlib.suppress(BatonError):  # it is away: `connected` says so
                await bus.round_trip()
                self._trip.observe(time.perf_counter() - began)
            await asyncio.sleep(EVERY_S)
