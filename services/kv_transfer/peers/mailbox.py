"""From threads to the event loop: calls in order, one wake-up for as many as have come.

Invariant: what is put before the loop closes is called there, in the order in which it was put.
"""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class Mailbox:
    """Bounded by those who put: a link has at most a few calls for each block that it was asked for."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._calls: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._calls)

    def put(self, call: Callable[[], None]) -> None:
        """From any thread."""
        with self._lock:
            self._calls.append(call)
            if len(self._calls) > 1:
                return
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            calls, self._calls = self._calls, []
        for call in calls:
            try:
                call()
            except Exception:  # the boundary of a call: the others must be made
                log.exception("kv: a peer's message was not handled")
