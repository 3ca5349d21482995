"""Tasks that outlive the coroutine which starts them: cancels on the way out, another prefill worker, flushes.

Invariants: all are in one TaskGroup, so none is left when the gateway ends; a failing task is logged and ends alone.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)


class BackgroundTasks:
    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._running)

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._running:
            task.cancel()
        await self._group.__aexit__(kind, error, trace)

    def start(
        self, work: Coroutine[Any, Any, None], on_error: Callable[[Exception], None] | None = None
    ) -> asyncio.Task[None]:
        task = self._group.create_task(_guarded(work, on_error))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # A task that is cancelled before its first step never gets to its coroutine.
        task.add_done_callback(lambda _: work.close())
        return task


async def _guarded(work: Coroutine[Any, Any, None], on_error: Callable[[Exception], None] | None) -> None:
    try:
        await work
    except Exception as error:  # the boundary of a task: one that fails must not end the others of its group
        log.exception("a background task failed")
        if on_error is not None:
            on_error(error)
