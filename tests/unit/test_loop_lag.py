"""The measure of a loop's lateness: what it keeps, and that a loop that stands still is seen."""

import asyncio
import time

from prometheus_client import CollectorRegistry

from shared.loop_lag import PERIOD_S, WINDOW_S, LoopLag

COUNT = "baton_event_loop_lag_seconds_count"


async def test_the_worst_is_kept_for_two_windows():
    lag = LoopLag(CollectorRegistry())
    lag.note(0.2, WINDOW_S * 10)
    lag.note(0.1, WINDOW_S * 10.5)
    assert lag.worst_s == 0.2
    lag.note(0.1, WINDOW_S * 12)
    assert lag.worst_s == 0.2
    lag.note(0.05, WINDOW_S * 14)
    assert lag.worst_s == 0.1
    lag.note(0.01, WINDOW_S * 16)
    assert lag.worst_s == 0.05


async def test_a_loop_that_stands_still_is_seen():
    registry = CollectorRegistry()
    LoopLag(registry).start()
    stall_s = 10 * PERIOD_S
    time.sleep(stall_s)  # noqa: ASYNC251 - this is what it is for
    async with asyncio.timeout(10):
        while not registry.get_sample_value(COUNT):  # noqa: ASYNC110 - the timer tells nobody
            await asyncio.sleep(0)
    # The timer was due after one period and could not be called before the end.
    assert registry.get_sample_value("baton_event_loop_worst_lag_seconds") >= stall_s - PERIOD_S - 0.001
    assert registry.get_sample_value("baton_event_loop_lag_seconds_bucket", {"le": "0.1"}) == 0
