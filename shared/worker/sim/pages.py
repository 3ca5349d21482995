"""The sim's KV memory: one page a block, filled with the bytes that its tokens call for, and read back.

Two kinds. `SlicePages`: each token has its slice of the page, the word j of it being its state plus a constant j.
`DigestPages` (`sim_kv: off`): 64 bytes whatever the block holds, of which the first word is its last token's state, so
that the plane's protocol runs at no cost in bytes.

What a page's bytes are is asked through a weighted sum over all of its words, modulo 2^64. For the right bytes that sum
follows from the states alone, so `excess`, the difference, is 0 for a page that is as its tokens call for, and what
it is otherwise depends on every byte: the weights are odd, so no single flipped bit can leave it 0.

Invariants: `fills[id]` tokens of a page are written, whoever wrote them; what is filled is never written again, so that
computing a token beside loaded ones cannot hide what was loaded.
"""

import contextlib
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from shared.worker.sim.contents import MASK, Words, odd_words

WORD_BYTES = 8
DIGEST_BYTES = 64


class SimPages(ABC):
    """Memory of `blocks` pages; touched only as they are used."""

    def __init__(self, fills: list[int], block_size: int, slot_bytes: int) -> None:
        """`fills`: tokens written in each page; shared with the pool, which empties pages that it gives out."""
        self.slot_bytes = slot_bytes
        self.block_size = block_size
        self.fills = fills
        self._memory = mmap.mmap(-1, len(fills) * slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._bytes = memoryview(self._memory)
        self._words: Words = np.frombuffer(self._memory, dtype=np.uint64).reshape(len(fills), -1)

    @abstractmethod
    def compute(self, block_id: int, states: Words, first: int, last: int) -> None:
        """Tokens first … last-1 of the block have been computed; `states` are the block's, at least `last` of them."""

    @abstractmethod
    def excess(self, block_id: int, states: Words) -> int:
        """What the page's filled bytes add up to beyond what these states call for; 0 when they are right."""

    def close(self) -> None:
        """Idempotent."""
        self._words = np.empty((0, 0), dtype=np.uint64)
        self._bytes.release()
        with contextlib.suppress(BufferError):  # a copy that was not waited for: unmapped when it lets go
            self._memory.close()

    # ---- shared.kv.copier.Pages ------------------------------------------------------------------------------

    at_once = 1

    def read(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            slot[:] = self._bytes[block_id * self.slot_bytes : (block_id + 1) * self.slot_bytes]

    def write(self, block_ids: Sequence[int], slots: Sequence[memoryview]) -> None:
        for block_id, slot in zip(block_ids, slots, strict=True):
            self._bytes[block_id * self.slot_bytes : (block_id + 1) * self.slot_bytes] = slot


class SlicePages(SimPages):
    def __init__(self, fills: list[int], block_size: int, token_bytes: int) -> None:
        super().__init__(fills, block_size, block_size * token_bytes)
        width = token_bytes // WORD_BYTES
        self._spread = odd_words(width, "baton-sim-spread")
        self._weights = odd_words(block_size * width, "baton-sim-weight")
        # What a token's slice adds up to: its state times the first, plus the second; both by its place in the block.
        by_place = self._weights.reshape(block_size, width)
        self._factors = by_place.sum(axis=1, dtype=np.uint64)
        self._sums: list[int] = np.cumsum((by_place * self._spread).sum(axis=1, dtype=np.uint64)).tolist()
        self._width = width

    def compute(self, block_id: int, states: Words, first: int, last: int) -> None:
        first = max(first, self.fills[block_id])
        if first >= last:
            return
        width = self._width
        slices = self._words[block_id, first * width : last * width].reshape(last - first, width)
        np.add(states[first:last, None], self._spread, out=slices)
        self.fills[block_id] = last

    def excess(self, block_id: int, states: Words) -> int:
        filled = min(self.fills[block_id], len(states))
        if not filled:
            return 0
        words = filled * self._width
        found = int(np.dot(self._words[block_id, :words], self._weights[:words]))
        called_for = int(np.dot(states[:filled], self._factors[:filled])) + self._sums[filled - 1]
        return (found - called_for) & MASK


class DigestPages(SimPages):
    def __init__(self, fills: list[int], block_size: int) -> None:
        super().__init__(fills, block_size, DIGEST_BYTES)
        self._weights = odd_words(DIGEST_BYTES // WORD_BYTES, "baton-sim-weight")

    def compute(self, block_id: int, states: Words, first: int, last: int) -> None:  # noqa: ARG002
        before = self.fills[block_id]
        if before >= last:
            return
        state, start = int(states[last - 1]), block_id * DIGEST_BYTES
        if before:
            # Moved on by the difference, so that what was wrong stays wrong.
            state = state - int(states[before - 1]) + int(self._words[block_id, 0]) & MASK
            self._words[block_id, 0] = state
        else:
            self._bytes[start : start + DIGEST_BYTES] = _digest(state)
        self.fills[block_id] = last

    def excess(self, block_id: int, states: Words) -> int:
        filled = min(self.fills[block_id], len(states))
        start = block_id * DIGEST_BYTES
        if not filled or self._bytes[start : start + DIGEST_BYTES] == _digest(int(states[filled - 1])):
            return 0
        found = int(np.dot(self._words[block_id], self._weights))
        return (found - int(states[filled - 1]) * int(self._weights[0])) & MASK


def _digest(state: int) -> bytes:
    return state.to_bytes(DIGEST_BYTES, "little")
