"""What comes to this node: blocks that another node pushes into the slots that a lease has set aside here.

Lives on the loop. Each transfer writes under a lease of its own that takes over the slots of the one that waits, as a
local prefill job's does; so a slot is given back only when nobody writes into it any more, and late bytes find no slot.
Invariants: nothing is taken but for a lease that waits, of the same fingerprint, and only keys that it names; what does
not come right ends the wait, and the engine computes it.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from services.kv_transfer.arena import Arena
from services.kv_transfer.leases import Lease
from services.kv_transfer.peers.frames import FINGERPRINT, KEY, LEASE, MEMORY, TOO_MANY, Offer
from services.kv_transfer.peers.transport import Arrived, Incoming, PeerTarget
from services.kv_transfer.slots import Words
from services.kv_transfer.store import Store
from shared.errors import BatonError, KvLost
from shared.kv.messages import Commit, Reserve

log = logging.getLogger(__name__)

MAX_TRANSFERS = 1024  # of one link
TTL_S = 86400.0  # the waiting lease's end is this one's


@dataclass(slots=True, eq=False)
class _Arrival:
    link: Incoming
    guest: str  # the link's session in the store
    transfer: int
    waits: str  # the lease that the blocks are for
    lease: str  # under which they are written
    places: dict[int, int]  # position in the offer -> in that lease
    missing: int


class Arrivals:
    """The TargetEar of a node."""

    def __init__(
        self,
        store: Store,
        arena: Arena,
        *,
        changed: Callable[[], None],
        refused: Callable[[str], None],
        failed: Callable[[str], None],
        moved: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with none.

        Args:
            store: this node's.
            arena: its memory.
            changed: called after the store was.
            refused: counts offers that were refused, by frames.REASONS.
            failed: counts transfers that ended before their time, by reason.
            moved: counts bytes that have arrived.
            clock: of the store.
        """
        self._store = store
        self._arena = arena
        self._changed = changed
        self._refused = refused
        self._failed = failed
        self._moved = moved
        self._clock = clock
        self._serial = 0
        self._links: dict[Incoming, dict[int, _Arrival]] = {}
        self._leaving: dict[tuple[Incoming, int], _Arrival] = {}  # over, but something is being written into it
        self._guests: dict[Incoming, str] = {}
        self._by_waiting: dict[str, set[_Arrival]] = {}

    def __len__(self) -> int:
        return sum(len(arrivals) for arrivals in self._links.values())

    def lease_ended(self, lease: str) -> None:
        """Whoever waited does so no more."""
        for arrival in list(self._by_waiting.get(lease, ())):
            arrival.link.end(arrival.transfer, LEASE)
            self._over(arrival)

    # ---- TargetEar -------------------------------------------------------------------------------------------

    def offered(self, link: Incoming, offer: Offer) -> None:
        lease = self._store.find_lease(offer.lease)
        reason = self._refusal(link, offer, lease)
        if reason or lease is None:
            log.warning("kv: %s's offer for lease %s was refused: %s", link.peer, offer.lease, reason)
            self._refused(reason)
            link.end(offer.transfer, reason)
            return
        wanted = [position for position, key in enumerate(offer.keys) if not self._store.holds(key)]
        self._store.hope(lease.id)
        if not wanted:
            link.want(offer.transfer, offer.ranks, {})
            link.end(offer.transfer, "")
            return
        try:
            self._receive(link, offer, lease, wanted)
        except BatonError as error:
            log.warning("kv: %s's offer for lease %s was refused: %s", link.peer, offer.lease, error.message)
            self._refused(MEMORY)
            link.end(offer.transfer, MEMORY)
        self._changed()

    def arrived(self, link: Incoming, blocks: list[Arrived]) -> None:
        for transfer, some in groupby(blocks, key=lambda block: block.transfer):
            arrival = self._links.get(link, {}).get(transfer)
            if arrival is not None:
                self._commit(arrival, list(some))
        self._changed()

    def spoiled(self, link: Incoming, transfer: int, reason: str) -> None:
        arrival = self._links.get(link, {}).get(transfer)
        if arrival is not None:
            log.warning("kv: a block from %s is not what was sent: %s", link.peer, reason)
            link.end(transfer, reason)
            self._fail(arrival, reason)
            self._changed()

    def stopped(self, link: Incoming, transfer: int, *, lost: bool) -> None:
        arrival = self._links.get(link, {}).get(transfer)
        if arrival is not None:
            if lost:
                self._fail(arrival, "evicted")
            else:
                self._over(arrival)
            self._changed()

    def withdrawn(self, link: Incoming, transfer: int) -> None:
        arrival = self._leaving.pop((link, transfer), None)
        if arrival is not None:
            self._store.revoked(arrival.guest, 0, arrival.lease, self._clock())
            self._changed()

    def lost(self, link: Incoming, reason: str) -> None:
        for arrival in list(self._links.get(link, {}).values()):
            self._fail(arrival, reason)
        for _, transfer in [left for left in self._leaving if left[0] is link]:
            self.withdrawn(link, transfer)
        self._links.pop(link, None)
        guest = self._guests.pop(link, None)
        if guest is not None:
            self._store.sessions.dismiss(guest)
        log.info("kv: the link from %s ended: %s", link.peer, reason)
        self._changed()

    # ---- inside ----------------------------------------------------------------------------------------------

    def _refusal(self, link: Incoming, offer: Offer, lease: Lease | None) -> str:
        geometry = self._store.sessions.geometry
        if lease is None or lease.write or geometry is None:
            return LEASE
        ours = (geometry.fingerprint, geometry.ranks, geometry.ranks * geometry.slot_bytes)
        if ours != (offer.fingerprint, offer.ranks, offer.block_bytes):
            return FINGERPRINT
        named = set(offer.keys)
        if not named or len(named) != len(offer.keys) or not named <= set(lease.keys):
            return KEY
        return TOO_MANY if len(self._links.get(link, ())) >= MAX_TRANSFERS else ""

    def _receive(self, link: Incoming, offer: Offer, lease: Lease, wanted: list[int]) -> None:
        """Reserve and ask for it. Raises KvMemory."""
        store, blocks = self._store, self._store.blocks
        if blocks is None:
            raise KvLost("the arena has no geometry yet")
        self._serial += 1
        call = Reserve(
            lease=f"{lease.id}-from-{link.peer}-{self._serial}",
            request=lease.request,
            keys=[offer.keys[position] for position in wanted],
            write=True,
            ttl_s=TTL_S,
            take_from=lease.id,
        )
        guest = self._guest(link)
        granted = store.reserve(guest, call, call.lease, self._clock())
        if granted is None:
            raise AssertionError("a reservation that does not wait was queued")
        words = self._arena.words_now()
        targets = {
            position: PeerTarget(
                self._arena.block(blocks.layout, slot // offer.ranks), partial(_shows, words, slot, word)
            )
            for position, slot, word in zip(wanted, granted.slots, granted.words, strict=True)
        }
        places = {position: place for place, position in enumerate(wanted)}
        arrival = _Arrival(link, guest, offer.transfer, lease.id, call.lease, places, len(wanted))
        self._links.setdefault(link, {})[offer.transfer] = arrival
        self._by_waiting.setdefault(lease.id, set()).add(arrival)
        link.want(offer.transfer, offer.ranks, targets)

    def _guest(self, link: Incoming) -> str:
        guest = self._guests.get(link)
        if guest is None:
            self._serial += 1
            guest = self._guests[link] = f"the store of {link.peer}, link {self._serial}"
            self._store.sessions.admit(guest)
        return guest

    def _commit(self, arrival: _Arrival, blocks: list[Arrived]) -> None:
        places = [arrival.places[block.position] for block in blocks]
        try:
            for rank in range(len(blocks[0].checksums)):
                call = Commit(lease=arrival.lease, blocks=places, checksums=[block.checksums[rank] for block in blocks])
                self._store.commit(arrival.guest, rank, call, self._clock())
        except KvLost:
            return  # revoked meanwhile
        geometry = self._store.sessions.geometry
        if geometry is not None:
            self._moved(len(blocks) * geometry.ranks * geometry.slot_bytes)
        arrival.missing -= len(blocks)
        if arrival.missing == 0:
            arrival.link.end(arrival.transfer, "")
            self._over(arrival)

    def _fail(self, arrival: _Arrival, reason: str) -> None:
        self._failed(reason)
        self._over(arrival)
        self._store.give_up(arrival.waits)

    def _over(self, arrival: _Arrival) -> None:
        """Give back what has not come, when nobody writes there any more."""
        del self._links[arrival.link][arrival.transfer]
        waiting = self._by_waiting[arrival.waits]
        waiting.remove(arrival)
        if not waiting:
            del self._by_waiting[arrival.waits]
        is_quiet = arrival.link.withdraw(arrival.transfer)
        self._store.release(arrival.lease, self._clock())
        if is_quiet:
            self._store.revoked(arrival.guest, 0, arrival.lease, self._clock())
        else:
            self._leaving[arrival.link, arrival.transfer] = arrival


def _shows(words: Words, slot: int, word: int) -> bool:
    return words[slot] == word
