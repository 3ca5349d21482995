"""The page's figures: heard from every service, worked out once a second, handed to whoever watches.

Invariants: one frame a second is made for all viewers, and none while nobody watches; a viewer who reads slowly misses
frames, and nothing waits for it; viewers are bounded, and all are let go when the gateway drains.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from prometheus_client import Gauge

from services.gateway.observe.dashboard import counts
from services.gateway.observe.dashboard.attendance import Attendance
from services.gateway.observe.dashboard.figures import Figures
from services.gateway.observe.metrics import Metrics
from services.gateway.scheduling.fleet import Fleet
from shared import subjects, wire
from shared.bus import Bus
from shared.errors import BusUnavailable, Draining, NoCapacity
from shared.settings import GatewaySettings
from shared.version import VERSION

TICK_S = 1.0
NEW_S = 3.0  # a gateway that has run for less has counted nothing that is not news
GATHER_S = 0.2  # for what the others report in the same moment
MIDDLE_S = 0.4  # of a figured second: what is gathered falls into it, too
STALL_S = 10.0  # without a tick: the viewer is let go
MAX_VIEWERS = 64
RETRY_AFTER_S = 5.0


class Feed:
    """Let it hear, run `run`, and `watch`."""

    def __init__(
        self,
        settings: GatewaySettings,
        model: str,
        *,
        bus: Bus,
        fleet: Fleet,
        metrics: Metrics,
        price_per_hour: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`price_per_hour`: of the whole cluster."""
        self._settings = settings
        self._model = model
        self._bus = bus
        self._metrics = metrics
        self._price_per_hour = price_per_hour
        self._incarnation = uuid.uuid4().hex
        self._began = self._ticked_at = time.monotonic()
        self._offset_s = 0.0
        self._figures = Figures(self._began)
        self._attendance = Attendance(model, lambda worker: fleet.beats(worker) > 0)
        self._viewers = 0
        self._closed = False
        self._frame = b""
        self._history = b""
        self._history_number = -1
        self._tick = asyncio.Event()
        for name, text, read in (
            ("baton_dashboard_viewers", "Who watches the dashboard", lambda: self._viewers),
            ("baton_dashboard_services", "Services that the dashboard shows", lambda: len(self._attendance)),
        ):
            Gauge(name, text, registry=metrics.registry).set_function(read)

    # ---- what is heard -------------------------------------------------------------------------------------

    def hear(self, beat: wire.Heartbeat, now: float) -> None:
        self._attendance.hear(beat, now)

    def hear_traffic(self, message: wire.AnyMessage) -> None:
        """Of other gateways; this one's own counts do not go round by the bus."""
        if isinstance(message, wire.Traffic) and message.gateway != self._settings.id:
            new = message.up_s < NEW_S
            self._figures.hear(
                message.gateway, message.incarnation, message.counts, self._figured(time.monotonic()), new=new
            )

    async def run(self) -> None:
        """Until cancelled. All gateways report with the wall clock's second, so that a frame soon has what all say."""
        while True:
            await asyncio.sleep(TICK_S - time.time() % TICK_S)
            await self.report(time.monotonic())
            await asyncio.sleep(GATHER_S)
            self.tick(time.monotonic())

    async def report(self, now: float) -> None:
        """Count what has happened here, and tell the others."""
        own = counts.read(self._metrics)
        self._offset_s = MIDDLE_S - now % TICK_S
        self._figures.hear(self._settings.id, self._incarnation, own, self._figured(now), new=True)
        report = wire.Traffic(
            gateway=self._settings.id, incarnation=self._incarnation, up_s=now - self._began, counts=own
        )
        with contextlib.suppress(BusUnavailable):  # the next one says it all
            await self._bus.publish(subjects.traffic(self._settings.cluster, self._settings.id), report)

    def tick(self, now: float) -> None:
        """See who is there, and make the frame if anybody watches."""
        self._attendance.look(now)
        for store in self._attendance.alive("kv", now):
            self._figures.hear(store.id, store.incarnation, {counts.MOVED: store.moved_bytes}, self._figured(now))
        spent = self._price_per_hour() * (now - self._ticked_at) / 3600
        self._ticked_at = now
        self._figures.level(self._figured(now), spent=spent, **self._load(now))
        if self._viewers:
            self._show(now)
        tick, self._tick = self._tick, asyncio.Event()
        tick.set()

    # ---- who watches ---------------------------------------------------------------------------------------

    async def watch(self) -> AsyncGenerator[bytes]:
        """Server-sent events: `history` first and when it has grown, `now` every second. Ends when the feed closes.

        Raises NoCapacity or Draining before the first one.
        """
        if self._closed:
            raise Draining("this gateway is shutting down", retry_after_s=RETRY_AFTER_S)
        if self._viewers >= MAX_VIEWERS:
            raise NoCapacity(f"{MAX_VIEWERS} viewers watch already", retry_after_s=RETRY_AFTER_S)
        self._viewers += 1
        try:
            self._show(time.monotonic())
            seen = -1
            while not self._closed:
                history = b"" if seen == self._history_number else self._history
                seen = self._history_number
                tick = self._tick
                yield history + self._frame
                try:
                    async with asyncio.timeout(STALL_S):
                        await tick.wait()
                except TimeoutError:
                    return
        finally:
            self._viewers -= 1

    def close(self) -> None:
        """They find another gateway, or say that this one has gone."""
        self._closed = True
        self._tick.set()

    # ---- inside --------------------------------------------------------------------------------------------

    def _show(self, now: float) -> None:
        figured = self._figured(now)
        if (number := self._figures.number(figured)) != self._history_number:
            self._history_number = number
            self._history = _event("history", self._figures.history(figured))
        self._frame = _event("now", self._state(now) | self._figures.now(figured))

    def _figured(self, now: float) -> float:
        """The time that figures go by: reports come in the middle of its seconds, never now in one, now in the next."""
        return now + self._offset_s

    def _state(self, now: float) -> dict[str, Any]:
        targets = msgspec.to_builtins(self._settings.targets)
        return {
            "at_ms": round(time.time() * 1000),
            "gateway": self._settings.id,
            "model": self._model,
            "version": VERSION,
            "arrangement": self._settings.arrangement,
            "up_s": round(now - self._began),
            "bus": self._bus.connected,
            "traces": self._settings.telemetry == "on",
            "targets": targets,
            "price_per_hour": self._price_per_hour(),
            "currency": self._settings.prices.currency,
            "services": self._attendance.rows(now),
            **self._load(now),
        }

    def _load(self, now: float) -> dict[str, float]:
        """Of all gateways."""
        lines = [gateway.backlog for gateway in self._attendance.alive("gateway", now)]
        return {"active": sum(line.running for line in lines), "queued": sum(line.waiting for line in lines)}


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
