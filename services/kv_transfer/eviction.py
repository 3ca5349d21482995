"""Which cached block goes first when room is needed.

Pure. An order holds exactly the cached blocks; a block leaves it when it is pinned, and comes back when nobody needs
it any more. `ScanResistant` is 2Q (Johnson and Shasha, 1994) with least recently used in both queues: what is there
for the first time is kept in half of the room, and only a key that was evicted and came back gets into the other. So a
flood of prompts that nobody asks for again evicts its like. Hits do not promote: a hand-off alone is several of them.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol


class EvictionOrder(Protocol):
    def __len__(self) -> int: ...

    def enter(self, block: int, key: bytes) -> None:
        """It is cached: the last to go, of its kind."""
        ...

    def leave(self, block: int) -> None:
        """It is pinned."""
        ...

    def evict(self) -> int:
        """The next one to go; there must be one."""
        ...


Orders = Callable[[int], EvictionOrder]  # gets the arena's blocks


class LeastRecentlyUsed:
    """The plain order, to compare with."""

    def __init__(self, blocks: int) -> None:  # noqa: ARG002 - an Orders
        # Not a plain dict: taking the oldest of one is linear in what was deleted before it.
        self._cached: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cached)

    def enter(self, block: int, key: bytes) -> None:  # noqa: ARG002
        self._cached[block] = None

    def leave(self, block: int) -> None:
        del self._cached[block]

    def evict(self) -> int:
        return self._cached.popitem(last=False)[0]


class ScanResistant:
    """Remembers as many evicted keys as there are blocks."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._new: OrderedDict[int, bytes] = OrderedDict()
        self._returned: OrderedDict[int, bytes] = OrderedDict()
        self._has_returned: set[int] = set()  # blocks, cached or pinned
        self._gone: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._new) + len(self._returned)

    def enter(self, block: int, key: bytes) -> None:
        if key in self._gone:
            del self._gone[key]
            self._has_returned.add(block)
        (self._returned if block in self._has_returned else self._new)[block] = key

    def leave(self, block: int) -> None:
        del (self._returned if block in self._has_returned else self._new)[block]

    def evict(self) -> int:
        if len(self._new) >= len(self._returned):
            block, key = self._new.popitem(last=False)
            self._gone[key] = None
            if len(self._gone) > self._blocks:
                self._gone.popitem(last=False)
        else:
            block, _ = self._returned.popitem(last=False)
            self._has_returned.discard(block)
        return block
