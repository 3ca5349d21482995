"""How much room a reservation needs, beyond what is committed or set aside for it."""

from services.kv_transfer.claims import Claims
from services.kv_transfer.slots import Blocks
from shared.kv.messages import Reserve


def shortage(call: Reserve, blocks: Blocks, claims: Claims) -> tuple[int, int]:
    """Blocks that must be found for this call, and how many could be: its own hits are not to be evicted for it."""
    missing, unpinned_hits = 0, 0
    bound = blocks.bound
    for key in call.keys:
        block = bound.get(key)
        if block is None:
            missing += claims.set_aside(call, key) is None
        elif not blocks.is_pinned(block):
            unpinned_hits += 1
    return missing, blocks.room() - unpinned_hits


def needs_none(call: Reserve, blocks: Blocks, claims: Claims) -> bool:
    """Cheaper than `shortage`: most of a long queue is told apart at its first key."""
    return all(key in blocks.bound or claims.set_aside(call, key) is not None for key in call.keys)
