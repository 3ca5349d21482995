"""The jobs of one worker: who runs, who was cancelled. Nothing else about a request is kept here."""

import asyncio
import collections
from collections.abc import Coroutine
from typing import Any

from shared.errors import BatonError, Cancelled

Key = tuple[str, int]  # request, attempt

REMEMBER_S = 60.0
REMEMBER_MOST = 100_000
STOP_S = 10.0


class Jobs:
    """Every job is a task under its (request, attempt). A cancel stops it, or bars it if it has not come yet."""

    def __init__(self) -> None:
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._gateways: dict[Key, str] = {}  # who asked
        self._cancelled: collections.OrderedDict[Key, float] = collections.OrderedDict()
        self._verdict: BatonError | None = None

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, key: Key, job: Coroutine[Any, Any, None], gateway: str) -> "asyncio.Task[None]":
        """Start a job, which answers by itself. Raises Cancelled when its cancel was here first."""
        if key in self._cancelled or key in self._tasks:
            job.close()
            raise Cancelled("the request was cancelled" if key in self._cancelled else "this attempt already runs")
        task = asyncio.get_running_loop().create_task(job)
        self._tasks[key] = task
        self._gateways[key] = gateway
        task.add_done_callback(lambda _: self._ended(key))
        return task

    async def cancel(self, key: Key, now: float) -> None:
        """Returns when the job has cleaned up behind itself."""
        self._remember(key, now)
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=STOP_S)

    def abandon(self, gateway: str) -> int:
        """Stop the jobs of a gateway that has died. Returns how many there were."""
        orphans = [key for key, asked in self._gateways.items() if asked == gateway]
        for key in orphans:
            self._tasks[key].cancel()
        return len(orphans)

    def stopped(self) -> BatonError:
        """Why a job that was stopped had to."""
        return self._verdict or Cancelled("the request was cancelled")

    async def drain(self, seconds: float, verdict: BatonError) -> None:
        """Wait for all to end, then stop the rest: each tells its gateway the verdict."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=seconds)
        self._verdict = verdict
        for task in list(self._tasks.values()):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=STOP_S)

    def _ended(self, key: Key) -> None:
        self._tasks.pop(key, None)
        self._gateways.pop(key, None)

    def _remember(self, key: Key, now: float) -> None:
        self._cancelled[key] = now
        self._cancelled.move_to_end(key)
        while self._cancelled:
            oldest = next(iter(self._cancelled))
            if now - self._cancelled[oldest] < REMEMBER_S and len(self._cancelled) <= REMEMBER_MOST:
                break
            del self._cancelled[oldest]
