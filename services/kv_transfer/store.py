"""The store's decisions: who may have which blocks of the arena, and when they come back.

Pure: no I/O and no clock; time is an argument, in seconds of any monotonic clock. What happens outside of a call's
own answer is left as events (`take_events`) for the server. Invariants: a committed block never changes until it is
evicted, and a pinned one is never evicted; a block that an engine may be writing is never given to anybody else;
what waits in the queue holds nothing. tests/unit/test_store_model.py checks them against a model.
"""

from collections.abc import Callable

from services.kv_transfer.checks import check_commit, check_reserve, check_wait
from services.kv_transfer.claims import Claims
from services.kv_transfer.deadlines import Deadlines
from services.kv_transfer.eviction import Orders, ScanResistant
from services.kv_transfer.leases import (
    Answered,
    ArenaCut,
    Bound,
    Event,
    Evicted,
    HostClosed,
    Lease,
    LeaseEnded,
    PushBegun,
    PushReady,
    Queued,
    Revocation,
    Session,
    Ticket,
)
from services.kv_transfer.revocations import REVOKE_ANSWER_S, Revocations
from services.kv_transfer.room import needs_none, shortage
from services.kv_transfer.sessions import HOST, Sessions
from services.kv_transfer.slots import NO_BLOCK, Blocks, Layout, Words, cut
from services.kv_transfer.waits import Waits
from shared.errors import BatonError, InvalidRequest, KvLost, KvMemory
from shared.kv.messages import Attach, Commit, Geometry, Keep, Ready, Reserve, Reserved, Wait

MAX_LEASES = 65536
MAX_QUEUED = 256
KEEP_TTL_S = 5.0  # until every rank has copied and committed what it keeps

_LEASE, _QUEUE, _WAIT, _REVOKE = range(4)  # kinds of deadline


class Store:
    """One node's store. Every method that takes `now` may leave events."""

    def __init__(
        self, node: str, size_bytes: int, words: Callable[[Layout], Words], orders: Orders = ScanResistant
    ) -> None:
        """Start without geometry; the first rank brings it.

        Args:
            node: for messages.
            size_bytes: of the arena.
            words: gives the words region of a cut.
            orders: makes the eviction order of a cut.
        """
        self.sessions = Sessions(node, self._recut)
        self.evicted_blocks = 0
        self.written_bytes = 0
        self.kept_blocks = 0
        self.unkept_blocks = 0
        self.blocks: Blocks | None = None  # None until the first rank has attached
        self._size_bytes = size_bytes
        self._words = words
        self._orders = orders
        self._leases: dict[str, Lease] = {}
        self._claims = Claims()
        self._queue: dict[str, Queued] = {}  # by lease, first come first
        self._waits = Waits(self._ready, self._answer, lambda ticket: self._deadlines.drop((_WAIT, ticket)))
        self._revocations = Revocations(self._settle, self._emit)
        self._deadlines: Deadlines[tuple[int, Ticket]] = Deadlines()
        self._events: list[Event] = []

    # ---- looking ---------------------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def next_deadline(self) -> float | None:
        return self._deadlines.earliest()

    def find_lease(self, lease: str) -> Lease | None:
        return self._leases.get(lease)

    def counts(self) -> dict[str, int]:
        """Slots by state; empty before the arena is cut."""
        return {} if self.blocks is None else self.blocks.counts()

    def held_prefix(self, keys: list[bytes]) -> int:
        return 0 if self.blocks is None else self.blocks.held_prefix(keys)

    def holds(self, key: bytes) -> bool:
        return self.blocks is not None and key in self.blocks.bound

    def held_keys(self) -> list[bytes]:
        return [] if self.blocks is None else list(self.blocks.bound)

    def gauges(self) -> dict[str, int]:
        """Sizes of everything that has a limit."""
        return {
            "sessions": len(self.sessions),
            "leases": len(self._leases),
            "queued": len(self._queue),
            "waits": len(self._waits),
            "revocations": len(self._revocations),
            "deadlines": len(self._deadlines),
        }

    # ---- sessions --------------------------------------------------------------------------------------------

    def attach(self, call: Attach) -> Layout | None:
        """Count a connection in; None: no rank has attached yet, try again after `ArenaCut`."""
        session = self.sessions.attach(call)
        if session is None or self.blocks is None:
            return None
        if call.kind != HOST:
            self._revocations.joined(session, call.rank)
        if len(self.sessions) == 1:
            self._emit(ArenaCut())
        return self.blocks.layout

    def detach(self, session_id: str, kind: str, rank: int, now: float) -> None:
        """A connection closed. The last host's ends the session's leases; a rank's whole closing answers revokes."""
        session = self.sessions.get(session_id)
        self.sessions.detach(session, kind, rank)
        if kind == HOST and session.hosts == 0:
            for lease_id in list(session.queued):
                self._unqueue(lease_id)
            for lease in list(session.leases.values()):
                self._end(lease, now)
            self._emit(HostClosed(session.worker))
        elif kind != HOST and rank not in session.ranks:
            for lease_id in list(session.revocations):
                self._hear(session, rank, lease_id)
        self._admit(now)

    # ---- calls -----------------------------------------------------------------------------------------------

    def reserve(self, session_id: str, call: Reserve, ticket: Ticket, now: float) -> Reserved | None:
        """Reserve all or raise KvMemory. None: queued, `Answered` follows."""
        session = self.sessions.get(session_id)
        blocks = self._check_reserve(call)
        missing, room = shortage(call, blocks, self._claims)
        if missing == 0 or (missing <= room and not self._queue):
            return self._grant(session, call, now)
        if call.wait_s <= 0 or len(self._queue) >= MAX_QUEUED:
            raise KvMemory(f"{missing} blocks are needed and {room} can be had")
        self._queue[call.lease] = Queued(session, call, ticket)
        session.queued.add(call.lease)
        self._deadlines.set((_QUEUE, call.lease), now + call.wait_s)
        return None

    def keep(self, session_id: str, call: Keep, now: float) -> Reserved:
        """Slots to write into, if nobody waits for room; to each rank the same. Raises KvMemory or KvLost."""
        lease = self._leases.get(call.lease)
        if lease is None:
            lease = self._begin_to_keep(session_id, call, now)
        elif lease.session != session_id or not lease.ends_complete:
            raise InvalidRequest("a lease's id must be new")
        slots, words = self._cut_blocks().shown(lease.blocks, [True] * len(lease.blocks))
        answer = Reserved(slots=slots, words=words, committed=list(lease.ready))
        self._end_if_kept(lease, now)
        return answer

    def commit(self, session_id: str, rank: int, call: Commit, now: float) -> int:
        """One rank has written these positions; returns how many of them it had not committed before."""
        lease, blocks = self._writable(session_id, call)
        ranks = blocks.layout.ranks
        fresh = 0
        for position, checksum in zip(call.blocks, call.checksums, strict=True):
            bits = lease.written.get(position, 0)
            if lease.ready[position] or bits >> rank & 1:
                continue
            fresh += 1
            bits |= 1 << rank
            lease.written[position] = bits
            blocks.checksums[lease.blocks[position] * ranks + rank] = checksum
            if bits == (1 << ranks) - 1:
                self._bind(lease, position, blocks)
        self.written_bytes += fresh * blocks.layout.slot_bytes
        self._waits.resolve(lease)
        self._end_if_kept(lease, now)
        self._admit(now)
        return fresh

    def wait(self, session_id: str, call: Wait, ticket: Ticket, now: float) -> Ready | None:
        """None: not complete yet, `Answered` follows."""
        lease = self._leases.get(call.lease)
        if lease is None or lease.session != session_id:
            raise KvLost("the lease is over")
        check_wait(call)
        if lease.is_complete or lease.is_hopeless or call.timeout_s == 0:
            return self._ready(lease)
        self._waits.add(ticket, lease)
        self._deadlines.set((_WAIT, ticket), now + call.timeout_s)
        return None

    def release(self, lease_id: str, now: float, session_id: str | None = None) -> None:
        """End a lease or a queued reservation; with a session only if it is that one's. Unknown ones are fine."""
        lease = self._leases.get(lease_id)
        queued = self._queue.get(lease_id)
        if lease is not None and session_id in {None, lease.session}:
            self._end(lease, now)
        elif queued is not None and session_id in {None, queued.session.id}:
            self._answer(self._unqueue(lease_id).ticket, KvLost("released while it waited for room"))
        self._admit(now)

    def revoked(self, session_id: str, rank: int, lease_id: str, now: float) -> None:
        """This rank copies nothing under the lease any more, and never will."""
        self._hear(self.sessions.get(session_id), rank, lease_id)
        self._admit(now)

    def abandon(self, ticket: Ticket, now: float) -> None:
        """Nobody is left to read this late answer."""
        self._waits.drop(ticket)
        for lease_id in [lease_id for lease_id, queued in self._queue.items() if queued.ticket == ticket]:
            self._unqueue(lease_id)
        self._admit(now)

    def advance(self, now: float) -> None:
        """Do what the deadlines up to now ask for."""
        for kind, name in self._deadlines.due(now):
            if kind == _WAIT:
                self._waits.time_out(name)
            elif kind == _QUEUE and name in self._queue:
                queued = self._unqueue(str(name))
                self._answer(queued.ticket, KvMemory(f"no room came in {queued.call.wait_s:g} s"))
            elif kind == _LEASE and name in self._leases:
                self._end(self._leases[str(name)], now, expired=True)
            elif kind == _REVOKE:
                self._revocations.blame(str(name))
        self._admit(now)

    # ---- between nodes ---------------------------------------------------------------------------------------

    def offered(self, lease_id: str) -> None:
        """The other node's store has taken the offer of this lease's blocks. Unknown leases are fine."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.is_offered = True
            self._waits.resolve(lease)

    def give_up(self, lease_id: str) -> None:
        """What this lease waits for does not come: its waits end with what there is. Unknown leases are fine."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            lease.is_hopeless = True
            self._waits.resolve(lease)

    def hope(self, lease_id: str) -> None:
        """Somebody brings it after all."""
        if (lease := self._leases.get(lease_id)) is not None:
            lease.is_hopeless = False

    def lend(self, key: bytes) -> int | None:
        """A block to be sent, pinned until `give_back`; None: it is not held."""
        block = None if self.blocks is None else self.blocks.bound.get(key)
        if block is not None:
            self._cut_blocks().pin(block)
            self.sessions.lent_blocks += 1
        return block

    def give_back(self, block: int, now: float) -> None:
        self.sessions.lent_blocks -= 1
        self._cut_blocks().unpin(block)
        self._admit(now)

    # ---- reserving -------------------------------------------------------------------------------------------

    def _check_reserve(self, call: Reserve) -> Blocks:
        blocks = self._cut_blocks()
        check_reserve(call)
        if call.lease in self._leases or call.lease in self._queue or call.lease in self._revocations:
            raise InvalidRequest("a lease's id must be new")
        if len(call.keys) > blocks.layout.blocks:
            raise KvMemory(f"{len(call.keys)} blocks never fit an arena of {blocks.layout.blocks}")
        if len(self._leases) >= MAX_LEASES:
            raise KvMemory(f"{MAX_LEASES} leases are held")
        return blocks

    def _grant(self, session: Session, call: Reserve, now: float) -> Reserved:
        blocks = self._cut_blocks()
        lease = Lease(call.lease, call.request, session.id, call.write, call.keys, call.traceparent)
        lease.push_node, lease.push_lease, lease.is_offered = call.push_node, call.push_lease, not call.push_node
        found = [blocks.bound.get(key, NO_BLOCK) for key in call.keys]
        lease.ready = [block != NO_BLOCK for block in found]
        for block in found:  # before anything is taken: taking evicts
            if block != NO_BLOCK:
                blocks.pin(block)
        for position, key in enumerate(call.keys):
            if not lease.ready[position]:
                found[position] = self._obtain(lease, position, key, call, blocks)
        lease.blocks = found
        lease.missing = lease.ready.count(False)
        self._leases[lease.id] = session.leases[lease.id] = lease
        self._deadlines.set((_LEASE, lease.id), now + call.ttl_s)
        if lease.push_node:
            self._emit(PushBegun(lease.id))
        slots, words = blocks.shown(found, [True] * len(found) if call.write else lease.ready)
        return Reserved(slots=slots, words=words, committed=list(lease.ready))

    def _begin_to_keep(self, session_id: str, call: Keep, now: float) -> Lease:
        session = self.sessions.get(session_id)
        if session.hosts == 0:
            raise KvLost("the worker's host has gone")
        reserve = Reserve(lease=call.lease, request=call.request, keys=call.keys, write=True, ttl_s=KEEP_TTL_S)
        missing, room = shortage(reserve, self._check_reserve(reserve), self._claims)
        if missing and (self._queue or missing > room):
            self.unkept_blocks += missing
            raise KvMemory(f"{missing} blocks are to be kept, and {0 if self._queue else room} can be had")
        self._grant(session, reserve, now)
        lease = self._leases[call.lease]
        lease.ends_complete = True
        self.kept_blocks += missing
        return lease

    def _end_if_kept(self, lease: Lease, now: float) -> None:
        if lease.ends_complete and lease.missing == 0:
            self._end(lease, now)

    def _obtain(self, lease: Lease, position: int, key: bytes, call: Reserve, blocks: Blocks) -> int:
        claim = self._claims.set_aside(call, key)
        if claim is None:
            if not call.write:
                self._claims.add(lease, position)
            return blocks.take()
        claimant, claimed = claim
        block, claimant.blocks[claimed] = claimant.blocks[claimed], NO_BLOCK
        lease.origins[position] = claim
        blocks.renew(block)
        return block

    def _admit(self, now: float) -> None:
        """Grant what waits: the first as long as it fits, and whatever needs no room."""
        if not self._queue:
            return
        blocks = self._cut_blocks()
        is_first = True
        for queued in list(self._queue.values()):
            if self._fits(queued.call, blocks, is_first=is_first):
                self._unqueue(queued.call.lease)
                self._answer(queued.ticket, self._grant(queued.session, queued.call, now))
            else:
                is_first = False

    def _fits(self, call: Reserve, blocks: Blocks, *, is_first: bool) -> bool:
        if not is_first:
            return needs_none(call, blocks, self._claims)
        missing, room = shortage(call, blocks, self._claims)
        return missing <= room

    def _unqueue(self, lease_id: str) -> Queued:
        queued = self._queue.pop(lease_id)
        queued.session.queued.discard(lease_id)
        self._deadlines.drop((_QUEUE, lease_id))
        return queued

    # ---- committing ------------------------------------------------------------------------------------------

    def _writable(self, session_id: str, call: Commit) -> tuple[Lease, Blocks]:
        lease = self._leases.get(call.lease)
        if lease is None or lease.session != session_id:
            raise KvLost("the lease is over")
        check_commit(call, lease)
        return lease, self._cut_blocks()

    def _bind(self, lease: Lease, position: int, blocks: Blocks) -> None:
        key, block = lease.keys[position], lease.blocks[position]
        existing = blocks.bound.get(key)
        lease.written.pop(position)
        lease.origins.pop(position, None)
        lease.ready[position] = True
        lease.missing -= 1
        if lease.push_node:
            self._emit(PushReady(lease.id, position))
        if existing is not None:
            blocks.pin(existing)
            blocks.free(block)
            lease.blocks[position] = existing
            return
        blocks.commit(block, key)
        self._emit(Bound(key))
        for claimant, claimed in self._claims.fulfil(key):
            blocks.pin(block)
            if claimant.blocks[claimed] != NO_BLOCK:
                blocks.free(claimant.blocks[claimed])
            claimant.blocks[claimed] = block
            claimant.ready[claimed] = True
            claimant.missing -= 1
            self._waits.resolve(claimant)

    def _ready(self, lease: Lease) -> Ready:
        slots, words = self._cut_blocks().shown(lease.blocks, lease.ready)
        return Ready(slots=slots, words=words, committed=list(lease.ready), complete=lease.is_complete)

    # ---- ending ----------------------------------------------------------------------------------------------

    def _end(self, lease: Lease, now: float, *, expired: bool = False) -> None:
        """Unpin; free what nobody writes; ask the ranks about the rest."""
        blocks = self._cut_blocks()
        session = self.sessions.find(lease.session)
        lease.alive = False
        del self._leases[lease.id]
        self._deadlines.drop((_LEASE, lease.id))
        self._waits.end(lease)
        written: list[tuple[int, int]] = []
        # Backwards, so that of a prompt the last blocks are evicted first: a prefix without its end is still useful.
        for position in range(len(lease.keys) - 1, -1, -1):
            block = lease.blocks[position]
            if lease.ready[position]:
                blocks.unpin(block)
            elif lease.write:
                blocks.revoke(block)
                written.append((position, block))
            else:
                self._claims.drop(lease, position)
                if block != NO_BLOCK:
                    blocks.free(block)
        self._emit(LeaseEnded(lease.id, expired))
        if session is not None:
            del session.leases[lease.id]
        if self._revocations.ask(session, Revocation(lease, written, set(session.ranks) if session else set())):
            self._deadlines.set((_REVOKE, lease.id), now + REVOKE_ANSWER_S)

    def _hear(self, session: Session, rank: int, lease_id: str) -> None:
        if self._revocations.answered(session, rank, lease_id):
            self._deadlines.drop((_REVOKE, lease_id))

    def _settle(self, revocation: Revocation) -> None:
        """No rank writes these blocks any more: back to who had set them aside and still waits, or free."""
        blocks = self._cut_blocks()
        for position, block in revocation.blocks:
            claimant, claimed = revocation.lease.origins.get(position, (None, 0))
            if claimant is not None and claimant.alive and not claimant.ready[claimed]:
                blocks.restore(block)
                claimant.blocks[claimed] = block
            else:
                blocks.free(block)

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _answer(self, ticket: Ticket, answer: Reserved | Ready | BatonError) -> None:
        self._emit(Answered(ticket, answer))

    def _recut(self, geometry: Geometry) -> None:
        layout = cut(self._size_bytes, geometry)
        generation = 0
        if self.blocks is not None:
            self._events += [Evicted(key) for key in self.blocks.bound]
            generation = self.blocks.generation + 1
        self.blocks = Blocks(layout, self._words(layout), self._evicted, generation, self._orders)

    def _evicted(self, key: bytes) -> None:
        self.evicted_blocks += 1
        self._emit(Evicted(key))

    def _cut_blocks(self) -> Blocks:
        if self.blocks is None:
            raise KvLost("the arena has no geometry yet")
        return self.blocks
