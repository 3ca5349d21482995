"""Named deadlines in one heap, so that the store needs a single timer however many leases it has.

Invariant: the heap holds at most twice the live deadlines plus a constant; entries that were dropped or moved are
skipped when they come up.
"""

import heapq
from typing import Generic, TypeVar

K = TypeVar("K")
SLACK = 1024


class Deadlines(Generic[K]):
    def __init__(self) -> None:
        self._at: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._at)

    def set(self, name: K, at: float) -> None:
        self._serial += 1
        self._at[name] = (at, self._serial)
        heapq.heappush(self._heap, (at, self._serial, name))
        if len(self._heap) > 2 * len(self._at) + SLACK:
            self._heap = [(when, serial, key) for key, (when, serial) in self._at.items()]
            heapq.heapify(self._heap)

    def drop(self, name: K) -> None:
        """Unknown names are fine."""
        self._at.pop(name, None)

    def earliest(self) -> float | None:
        while self._heap and self._is_stale(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> list[K]:
        """Names whose time has come, earliest first; they are forgotten."""
        names = []
        while (at := self.earliest()) is not None and at <= now:
            name = heapq.heappop(self._heap)[2]
            del self._at[name]
            names.append(name)
        return names

    def _is_stale(self, entry: tuple[float, int, K]) -> bool:
        return self._at.get(entry[2], (0.0, -1))[1] != entry[1]
