"""The arena's blocks: their states, generation words, keys, pins and the eviction order.

Pure: it writes only the words it was given. A block is `ranks` consecutive slots that live and die together, so all
accounting is in blocks; slots appear only where a client sees them. Invariants: the counts of all states add up to
the arena; a block is in the eviction order exactly while it is `cached`; a word changes its generation whenever the
block is given to a new writer, and its last bit is set exactly while the block has a key.
"""

import enum
from collections.abc import Callable
from typing import Protocol

import msgspec

from services.kv_transfer.eviction import Orders, ScanResistant
from shared.errors import KvMismatch
from shared.kv.blocks import blocks_of
from shared.kv.messages import Geometry

PAGE_BYTES = 4096
WORD_BYTES = 8
GIB = 1024**3
NO_BLOCK = -1


class SlotState(enum.IntEnum):
    FREE = 0
    RESERVED = 1  # private to a lease, or set aside for one
    PINNED = 2  # committed, read by at least one lease
    CACHED = 3  # committed, nobody's: evicted when room is needed
    REVOKED = 4  # its lease is over, but a rank may still be copying into it

    @property
    def label(self) -> str:
        return self.name.lower()


NEXT_STATES: dict[SlotState, frozenset[SlotState]] = {
    SlotState.FREE: frozenset({SlotState.RESERVED}),
    SlotState.RESERVED: frozenset({SlotState.FREE, SlotState.PINNED, SlotState.REVOKED}),
    SlotState.PINNED: frozenset({SlotState.CACHED}),
    SlotState.CACHED: frozenset({SlotState.PINNED, SlotState.FREE}),
    SlotState.REVOKED: frozenset({SlotState.FREE, SlotState.RESERVED}),
}


class Words(Protocol):
    """One uint64 a slot, readable by others."""

    def __getitem__(self, slot: int, /) -> int: ...
    def __setitem__(self, slot: int, word: int, /) -> None: ...


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """Where things lie in the arena file, for one geometry."""

    words_offset: int
    slots_offset: int  # page-aligned
    slot_bytes: int
    ranks: int
    blocks: int

    @property
    def slots(self) -> int:
        return self.blocks * self.ranks


def cut(size_bytes: int, geometry: Geometry) -> Layout:
    """Cut an arena of this size into slots: a word each, then, from the next page on, the slots.

    Raises KvMismatch when the arena cannot hold two prompts of maximum length: one could then never be received
    while another is read.
    """
    if min(geometry.block_size, geometry.slot_bytes, geometry.ranks, geometry.max_model_len) < 1:
        raise KvMismatch("a geometry's sizes must be positive")
    block_bytes = geometry.ranks * (geometry.slot_bytes + WORD_BYTES)
    blocks = max(0, size_bytes - PAGE_BYTES) // block_bytes
    least = 2 * blocks_of(geometry.max_model_len, geometry.block_size)
    if blocks < least:
        needed_gib = (least * block_bytes + PAGE_BYTES) / GIB
        raise KvMismatch(
            f"the arena has {size_bytes / GIB:.3f} GiB, but two prompts of {geometry.max_model_len} tokens need "
            f"{needed_gib:.3f} GiB: set arena_gib to at least {needed_gib:.3f} or lower the engine's max_model_len"
        )
    words_bytes = blocks * geometry.ranks * WORD_BYTES
    return Layout(
        words_offset=0,
        slots_offset=-(-words_bytes // PAGE_BYTES) * PAGE_BYTES,
        slot_bytes=geometry.slot_bytes,
        ranks=geometry.ranks,
        blocks=blocks,
    )


class Blocks:
    """All blocks of one cut of the arena."""

    def __init__(
        self,
        layout: Layout,
        words: Words,
        on_evict: Callable[[bytes], None],
        generation: int = 0,
        orders: Orders = ScanResistant,
    ) -> None:
        """Take over `words`, one a slot.

        Args:
            layout: of this cut.
            words: where readers look; written here alone.
            on_evict: told of each key that is dropped to make room.
            generation: the last one of an earlier cut; it never goes back, so that stale readers always notice.
            orders: makes the eviction order.
        """
        self.layout = layout
        self.generation = generation
        self.bound: dict[bytes, int] = {}  # key -> its committed block
        self.checksums: list[int] = [0] * layout.slots
        self._words = words
        self._on_evict = on_evict
        self._states = [SlotState.FREE] * layout.blocks
        self._counts = [0] * len(SlotState)
        self._counts[SlotState.FREE] = layout.blocks
        self._free = list(range(layout.blocks - 1, -1, -1))
        self._pins = [0] * layout.blocks
        self._keys: list[bytes | None] = [None] * layout.blocks
        self._cached = orders(layout.blocks)
        for slot in range(layout.slots):
            words[slot] = generation << 1

    def room(self) -> int:
        """Blocks that `take` can give now."""
        return len(self._free) + len(self._cached)

    def counts(self) -> dict[str, int]:
        """Slots by state; they add up to the arena."""
        return {state.label: self._counts[state] * self.layout.ranks for state in SlotState}

    def state(self, block: int) -> SlotState:
        return self._states[block]

    def word(self, block: int) -> int:
        return self._words[block * self.layout.ranks]

    def shown(self, blocks: list[int], visible: list[bool]) -> tuple[list[int], list[int]]:
        """First slot and word of each block, as a client sees them; -1 and 0 for what it must not touch."""
        ranks = self.layout.ranks
        pairs = list(zip(blocks, visible, strict=True))
        return (
            [block * ranks if is_visible else NO_BLOCK for block, is_visible in pairs],
            [self._words[block * ranks] if is_visible else 0 for block, is_visible in pairs],
        )

    def held_prefix(self, keys: list[bytes]) -> int:
        """How many leading keys are committed here."""
        bound = self.bound
        for position, key in enumerate(keys):
            if key not in bound:
                return position
        return len(keys)

    def is_pinned(self, block: int) -> bool:
        return self._pins[block] > 0

    def take(self) -> int:
        """A block for a new reservation, evicting one if none is free. Check `room` before."""
        if not self._free:
            self._evict()
        block = self._free.pop()
        self._enter(block, SlotState.RESERVED)
        self.renew(block)
        return block

    def renew(self, block: int) -> None:
        """Give a reserved block to another writer: whoever knew its old word must not trust it any more."""
        self.generation += 1
        self._write_word(block, self.generation << 1)

    def commit(self, block: int, key: bytes) -> None:
        """All ranks have written: bind the key, with one pin for the committer."""
        self._enter(block, SlotState.PINNED)
        self._pins[block] = 1
        self._keys[block] = key
        self.bound[key] = block
        self._write_word(block, self.word(block) | 1)

    def pin(self, block: int) -> None:
        if self._pins[block] == 0:
            self._enter(block, SlotState.PINNED)
            self._cached.leave(block)
        self._pins[block] += 1

    def unpin(self, block: int) -> None:
        """With its last pin it becomes a cached block."""
        if self._pins[block] == 1:
            self._enter(block, SlotState.CACHED)
            self._cached.enter(block, self._key(block))
        self._pins[block] -= 1

    def free(self, block: int) -> None:
        """Give back a block that was never committed and that nobody writes."""
        self._enter(block, SlotState.FREE)
        self._free.append(block)

    def revoke(self, block: int) -> None:
        self._enter(block, SlotState.REVOKED)

    def restore(self, block: int) -> None:
        """A revoked block goes back to the lease that had set it aside."""
        self._enter(block, SlotState.RESERVED)

    def _evict(self) -> None:
        block = self._cached.evict()
        key = self._key(block)
        self._keys[block] = None
        del self.bound[key]
        # A late reader of the evicted block must see at once that it is not committed any more.
        self._write_word(block, self.word(block) & ~1)
        self.free(block)
        self._on_evict(key)

    def _key(self, block: int) -> bytes:
        key = self._keys[block]
        if key is None:
            raise AssertionError(f"committed block {block} has no key")
        return key

    def _write_word(self, block: int, word: int) -> None:
        first = block * self.layout.ranks
        for slot in range(first, first + self.layout.ranks):
            self._words[slot] = word

    def _enter(self, block: int, state: SlotState) -> None:
        before = self._states[block]
        if state not in NEXT_STATES[before]:
            raise AssertionError(f"block {block} cannot go from {before.label} to {state.label}")
        self._states[block] = state
        self._counts[before] -= 1
        self._counts[state] += 1
