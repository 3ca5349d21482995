"""The sim's KV blocks: who holds them, which tokens they are known by, and in what order they are given out again.

As vLLM's BlockPool: blocks without a name go first, latest freed first; named ones, which a prompt may yet hit, in the
order in which they were freed. Invariants: a block is free when nobody holds it; a free block keeps its name, and its
bytes, until it is given out; a name belongs to one block.
"""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Pure. Block ids are 0 … count-1; names are integers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.fills = [0] * count  # tokens written in each block's page; see pages.py
        self._holders = [0] * count
        self._names: list[int | None] = [None] * count
        self._by_name: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._copied: dict[int, int] = {}  # blocks that are being copied out, and how often

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        return 1 - len(self._free) / self.count

    def take(self, count: int) -> list[int]:
        """Empty blocks, held once. The caller has looked at `free`."""
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            name = self._names[block]
            if name is not None:
                del self._by_name[name]
                self._names[block] = None
            self._holders[block] = 1
            self.fills[block] = 0
            taken.append(block)
        return taken

    def find(self, names: Iterable[int]) -> list[int]:
        """The blocks of the longest known prefix, not yet held."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def free_among(self, blocks: Iterable[int]) -> int:
        """How many of them holding would take out of the free ones."""
        return sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one hold each. In the order in which they may be given out again: the last of a prompt first."""
        for block in blocks:
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            self._free[block] = None
            if self._names[block] is None:
                self._free.move_to_end(block, last=False)

    def name(self, block: int, name: int) -> None:
        """Full of known tokens from here on. Of two blocks with the same tokens, the first one keeps the name."""
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    # ---- copies ----------------------------------------------------------------------------------------------

    def begin_copy(self, blocks: Iterable[int]) -> None:
        """Held, and not to be written to, while they are copied out."""
        for block in blocks:
            self.hold((block,))
            self._copied[block] = self._copied.get(block, 0) + 1

    def end_copy(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._copied[block] -= 1
            if not self._copied[block]:
                del self._copied[block]
            self.release((block,))

    def is_copied(self, block: int) -> bool:
        return block in self._copied
