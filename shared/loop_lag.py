"""How late an event loop is: whoever stands still for 5 ms makes every stream on that loop stutter.

A timer that is due every PERIOD_S says how long after its time it was called. Invariants: a stall as long as a period
is never missed, though it may show up to one period shorter; nothing is kept but the worst of two windows.
"""

import asyncio

from prometheus_client import CollectorRegistry, Gauge, Histogram

PERIOD_S = 0.02  # 50 calls a second, about a thousandth of a core
WINDOW_S = 30.0  # a scraper that comes twice a minute sees every stall in the worst of its window
LAGS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


class LoopLag:
    """Create and `start` on the loop that it is about; it ends with the loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._lag = Histogram(
            "baton_event_loop_lag_seconds", "Lateness of a timer on the event loop", buckets=LAGS, registry=registry
        )
        Gauge(
            "baton_event_loop_worst_lag_seconds", "The worst of the last half to one minute", registry=registry
        ).set_function(lambda: self.worst_s)
        self._worst_s = 0.0
        self._worst_before_s = 0.0
        self._window_ends_at = 0.0
        self._due_at = 0.0

    @property
    def worst_s(self) -> float:
        """Of this window and the one before."""
        return max(self._worst_s, self._worst_before_s)

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._window_ends_at = loop.time() + WINDOW_S
        self._again(loop)

    def note(self, lag_s: float, now: float) -> None:
        self._lag.observe(lag_s)
        if now > self._window_ends_at:
            self._window_ends_at = now + WINDOW_S
            self._worst_before_s, self._worst_s = self._worst_s, 0.0
        self._worst_s = max(self._worst_s, lag_s)

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_at = loop.time() + PERIOD_S
        loop.call_at(self._due_at, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self.note(max(0.0, now - self._due_at), now)
        self._again(loop)
