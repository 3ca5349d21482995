"""What leaves this node: blocks of its prefill jobs, sent on as they are committed, to the leases that wait for them.

Lives on the loop. Invariants: a block is pinned from the moment it is given to a link until the link says that it has
been read, whatever becomes of the lease it was computed under; a push that the other store never took ends the wait of
the job that computes for it, so that the job is moved; a node that could not be reached is left alone for a while.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from services.kv_transfer.arena import Arena
from services.kv_transfer.leases import Lease
from services.kv_transfer.peers.directory import Directory
from services.kv_transfer.peers.frames import MALFORMED, Offer, joint_checksum
from services.kv_transfer.peers.transport import Block, Outgoing, Transport
from services.kv_transfer.store import Store
from shared import telemetry
from shared.backoff import Backoff
from shared.errors import KvLost

log = logging.getLogger(__name__)

MAX_PUSHES = 4096
SEND_BLOCKS = 32
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 5.0


@dataclass(slots=True)
class _Push:
    transfer: int
    keys: list[bytes]
    lease: str = ""  # whose blocks they are while they are computed
    traceparent: str = ""
    ready: set[int] = field(default_factory=set)  # committed before the target has said what it wants
    awaited: set[int] | None = None  # wanted and not committed; None: the target has not answered
    begun_ns: int = field(default_factory=time.time_ns)
    blocks: int = 0
    size_bytes: int = 0


class Pushes:
    def __init__(
        self,
        store: Store,
        arena: Arena,
        directory: Directory,
        *,
        changed: Callable[[], None],
        failed: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start with none; set `transport` before the first.

        Args:
            store: this node's.
            arena: its memory.
            directory: where peers are.
            changed: called after the store was.
            failed: counts pushes that ended before their time, by reason.
            clock: of the store.
        """
        self.transport: Transport | None = None
        self.store = store
        self.clock = clock
        self.changed = changed
        self.failed = failed
        self._arena = arena
        self._directory = directory
        self._links: dict[str, _Link] = {}
        self._by_lease: dict[str, tuple[_Link, _Push]] = {}
        self._rests: dict[str, tuple[str, float, Backoff]] = {}  # node -> its address, until when, and the next

    def __len__(self) -> int:
        return sum(len(link.pushes) for link in self._links.values())

    def check(self, node: str) -> None:
        """Raises KvLost when nothing can be pushed there now."""
        if self.transport is None:
            raise KvLost(f"this node's store pushes nowhere, and {node} waits: set peer_secret on every node")
        address = self._directory.address(node)
        if address is None:
            raise KvLost(f"no store of {node} is known")
        rest = self._rests.get(node)
        if rest is not None and rest[0] == address and self.clock() < rest[1]:
            raise KvLost(f"the store of {node} could not be reached")
        if len(self) >= MAX_PUSHES:
            raise KvLost(f"{MAX_PUSHES} pushes are under way")

    def begin(self, lease: Lease) -> None:
        """A lease was granted whose blocks go to another node."""
        ready = {position for position, is_ready in enumerate(lease.ready) if is_ready}
        try:
            link = self._link(lease.push_node)
        except KvLost as error:
            log.warning("kv: lease %s is not pushed: %s", lease.id, error.message)
            self.store.give_up(lease.id)
            return
        push = link.begin(lease.keys, lease.push_lease, lease=lease.id, traceparent=lease.traceparent, ready=ready)
        self._by_lease[lease.id] = (link, push)

    def fetch(self, node: str, lease: str, keys: list[bytes], traceparent: str = "") -> int:
        """Push what is held here of these keys to a lease of that node; returns how many. Raises KvLost."""
        held = keys[: self.store.held_prefix(keys)]
        if held:
            self._link(node).begin(held, lease, traceparent=traceparent, ready=set(range(len(held))))
        return len(held)

    def ready(self, lease: str, position: int) -> None:
        """A block of this lease has been committed."""
        found = self._by_lease.get(lease)
        if found is not None:
            link, push = found
            link.ready(push, position)

    def lease_ended(self, lease: str) -> None:
        """What was committed is sent all the same; if that is not all, somebody else will bring the rest."""
        found = self._by_lease.pop(lease, None)
        if found is not None:
            link, push = found
            if push.awaited is None or push.awaited:
                link.stop(push, lost=False)

    def forget(self, push: _Push) -> None:
        self._by_lease.pop(push.lease, None)

    def _link(self, node: str) -> "_Link":
        self.check(node)
        address, link = self._directory.address(node), self._links.get(node)
        if link is not None and link.address == address:
            return link
        if self.transport is None or address is None:
            raise AssertionError("checked above")
        if link is not None:
            link.outgoing.close()
        link = self._links[node] = _Link(self, node, address)
        link.outgoing = self.transport.connect(node, address, link)
        return link

    def link_works(self, link: "_Link") -> None:
        self._rests.pop(link.node, None)

    def link_lost(self, link: "_Link", reason: str) -> None:
        if self._links.get(link.node) is link:
            del self._links[link.node]
        _, _, backoff = self._rests.get(link.node, ("", 0.0, Backoff(FIRST_BACKOFF_S, LAST_BACKOFF_S)))
        self._rests[link.node] = (link.address, self.clock() + backoff.next_s(), backoff)
        log.warning("kv: the link to %s ended: %s", link.node, reason)

    def memory(self, block: int) -> tuple[memoryview, int]:
        """A committed block's bytes, and their checksum."""
        blocks = self.store.blocks
        if blocks is None:
            raise AssertionError("a block of no arena")
        ranks = blocks.layout.ranks
        return self._arena.block(blocks.layout, block), joint_checksum(
            blocks.checksums[block * ranks : (block + 1) * ranks]
        )

    def offer(self, push: _Push, lease: str) -> Offer:
        geometry = self.store.sessions.geometry
        if geometry is None:
            raise AssertionError("a lease without a geometry")
        return Offer(
            transfer=push.transfer,
            lease=lease,
            fingerprint=geometry.fingerprint,
            block_bytes=geometry.slot_bytes * geometry.ranks,
            ranks=geometry.ranks,
            keys=push.keys,
        )


class _Link:
    """The SourceEar of one connection."""

    outgoing: Outgoing

    def __init__(self, pushes: Pushes, node: str, address: str) -> None:
        self.node = node
        self.address = address
        self.pushes: dict[int, _Push] = {}
        self._all = pushes
        self._serial = 0
        self._lent: dict[tuple[int, int], int] = {}  # (transfer, position) -> block

    def begin(self, keys: list[bytes], to: str, *, ready: set[int], lease: str = "", traceparent: str = "") -> _Push:
        push = _Push(self._serial, keys, lease, traceparent, ready)
        self._serial += 1
        self.pushes[push.transfer] = push
        self.outgoing.offer(self._all.offer(push, to))
        return push

    def ready(self, push: _Push, position: int) -> None:
        if push.awaited is None:
            push.ready.add(position)
        elif position in push.awaited:
            push.awaited.remove(position)
            self._send(push, [position])

    def stop(self, push: _Push, *, lost: bool) -> None:
        self._forget(push)
        self.outgoing.stop(push.transfer, lost=lost)

    def _send(self, push: _Push, positions: list[int]) -> None:
        blocks: list[Block] = []
        for position in positions:
            block = self._all.store.lend(push.keys[position])
            if block is None:  # evicted since it was offered
                self.outgoing.send(blocks)
                self.stop(push, lost=True)
                return
            self._lent[push.transfer, position] = block
            data, checksum = self._all.memory(block)
            blocks.append(Block(push.transfer, position, data, checksum))
            push.blocks += 1
            push.size_bytes += len(data)
            if len(blocks) == SEND_BLOCKS:  # the first go out while the others are looked up
                self.outgoing.send(blocks)
                blocks = []
        self.outgoing.send(blocks)

    def _forget(self, push: _Push) -> None:
        self.pushes.pop(push.transfer, None)
        self._all.forget(push)

    def _failed(self, push: _Push, reason: str) -> None:
        """If the target knows of it, whoever waits there is told there; else the job must be moved."""
        self._forget(push)
        self._all.failed(reason)
        if push.awaited is None:
            self._all.store.give_up(push.lease)
        self._span(push, reason)

    # ---- SourceEar -------------------------------------------------------------------------------------------

    def wanted(self, transfer: int, positions: list[int]) -> None:
        push = self.pushes.get(transfer)
        if push is None:
            return
        wanted = set(positions)
        if push.awaited is not None or len(wanted) != len(positions) or not wanted <= set(range(len(push.keys))):
            log.warning("kv: %s asked for what was not offered", self.node)
            self._all.failed(MALFORMED)
            self.outgoing.close()
            return
        self._all.link_works(self)
        push.awaited = wanted - push.ready
        self._all.store.offered(push.lease)
        self._send(push, sorted(wanted & push.ready))
        self._all.changed()

    def sent(self, blocks: list[Block]) -> None:
        now = self._all.clock()
        for block in blocks:
            self._all.store.give_back(self._lent.pop((block.transfer, block.position)), now)
        self._all.changed()

    def ended(self, transfer: int, reason: str) -> None:
        push = self.pushes.get(transfer)
        if push is None:
            return
        if reason:
            self._failed(push, reason)
            self.outgoing.stop(transfer, lost=False)
        else:
            self._forget(push)
            self._span(push, "")
        self._all.changed()

    def lost(self, reason: str) -> None:
        self._all.link_lost(self, reason)
        now = self._all.clock()
        for push in list(self.pushes.values()):
            self._failed(push, reason)
        for block in self._lent.values():
            self._all.store.give_back(block, now)
        self._lent.clear()
        self._all.changed()

    def _span(self, push: _Push, reason: str) -> None:
        attributes: dict[str, str | int] = {
            "blocks": push.blocks,
            "bytes": push.size_bytes,
            "path": "peer",
            "node": self.node,
        }
        if reason:
            attributes["error.type"] = reason
        context = telemetry.from_traceparent(push.traceparent)
        span = telemetry.tracer().start_span(
            telemetry.KV_PUSH, context=context, start_time=push.begun_ns, attributes=attributes
        )
        span.end(time.time_ns())
