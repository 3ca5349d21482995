"""A timer for an event loop that is exact to about a tenth of a millisecond.

uvloop rounds its own timers to a whole millisecond, which would be added to every latency that counts from an intended
time. Times are those of `time.monotonic`.
"""

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import Callable

CLOCK_MONOTONIC = 1
TFD_TIMER_ABSTIME = 1
SOON_S = 1e-9  # a time of zero would disarm the timer

_libc = ctypes.CDLL(None, use_errno=True)


class _Spec(ctypes.Structure):
    """`struct itimerspec`: interval, then the time itself; seconds and nanoseconds each."""

    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("at_s", ctypes.c_long),
        ("at_ns", ctypes.c_long),
    )


class Alarm:
    """Calls `ring` once each time that it was `set`. Linux only: a timerfd."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._fd = _libc.timerfd_create(CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "no timerfd")
        self._loop.add_reader(self._fd, self._fired)

    def set(self, at_s: float) -> None:
        """Replaces an earlier time that has not come."""
        whole, part = divmod(max(at_s, SOON_S), 1.0)
        spec = _Spec(0, 0, int(whole), int(part * 1e9))
        if _libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, ctypes.byref(spec), None) < 0:
            raise OSError(ctypes.get_errno(), "the timer could not be set")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _fired(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it was set anew meanwhile
            os.read(self._fd, 8)
            self._ring()


class Pace:
    """One waiter that sleeps until a time."""

    def __init__(self) -> None:
        self._alarm = Alarm(self._ring)
        self._waiter: asyncio.Future[None] | None = None

    async def until(self, at_s: float) -> None:
        """Returns at once for a time that has passed."""
        if at_s <= time.monotonic():
            return
        self._waiter = asyncio.get_running_loop().create_future()
        self._alarm.set(at_s)
        await self._waiter

    def close(self) -> None:
        self._alarm.close()

    def _ring(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
