"""A transport between stores of one process, without sockets or threads: a frame arrives at the loop's next turn."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from services.kv_transfer.peers.frames import CHECKSUM, Offer, checksums_of, joint_checksum
from services.kv_transfer.peers.transport import Arrived, Block, PeerTarget, SourceEar, TargetEar


class Exchange:
    """All addresses there are."""

    def __init__(self) -> None:
        self.nodes: dict[str, MemoryTransport] = {}


class MemoryTransport:
    def __init__(self, exchange: Exchange, node: str, ear: TargetEar) -> None:
        self.address = f"memory:{node}"
        self.node = node
        self.ear = ear
        self.links: list[MemoryOutgoing] = []
        self._exchange = exchange
        exchange.nodes[self.address] = self

    def connect(self, node: str, address: str, ear: SourceEar) -> "MemoryOutgoing":
        link = MemoryOutgoing(self, self._exchange.nodes.get(address), ear)
        self.links.append(link)
        return link

    async def close(self) -> None:
        self._exchange.nodes.pop(self.address, None)
        for other in [self, *self._exchange.nodes.values()]:
            for link in other.links:
                if other is self or (link.incoming and link.incoming.owner is self):
                    link.close()
        await asyncio.sleep(0)


class MemoryIncoming:
    """Whatever is written is written within one turn of the loop, so a withdrawal is always at once."""

    def __init__(self, owner: MemoryTransport, outgoing: "MemoryOutgoing") -> None:
        self.owner = owner
        self.peer = outgoing.owner.node
        self.wanted: dict[int, tuple[int, dict[int, PeerTarget]]] = {}
        self._outgoing = outgoing

    def want(self, transfer: int, ranks: int, targets: dict[int, PeerTarget]) -> None:
        self.wanted[transfer] = (ranks, dict(targets))
        self._outgoing.soon(lambda: self._outgoing.ear.wanted(transfer, list(targets)))

    def end(self, transfer: int, reason: str) -> None:
        self.withdraw(transfer)
        self._outgoing.soon(lambda: self._outgoing.ear.ended(transfer, reason))

    def withdraw(self, transfer: int) -> bool:
        self.wanted.pop(transfer, None)
        return True

    def close(self) -> None:
        self._outgoing.close()


class MemoryOutgoing:
    def __init__(self, owner: MemoryTransport, other: MemoryTransport | None, ear: SourceEar) -> None:
        self.owner = owner
        self.ear = ear
        self.incoming = None if other is None else MemoryIncoming(other, self)
        self._queues: dict[int, deque[Block]] = {}
        self._is_over = False
        self._is_busy = False
        if other is None:
            self.close()

    def soon(self, call: Callable[[], None]) -> None:
        def unless_over() -> None:
            if not self._is_over:
                call()

        asyncio.get_running_loop().call_soon(unless_over)

    def offer(self, offer: Offer) -> None:
        if self.incoming is not None:
            incoming = self.incoming
            self.soon(lambda: incoming.owner.ear.offered(incoming, offer))

    def send(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            self._queues.setdefault(block.transfer, deque()).append(block)
        if not self._is_busy:
            self._is_busy = True
            self.soon(self._send_next)

    def stop(self, transfer: int, *, lost: bool) -> None:
        dropped = list(self._queues.pop(transfer, ()))
        if dropped:
            self.soon(lambda: self.ear.sent(dropped))
        if self.incoming is not None:
            incoming = self.incoming
            self.soon(lambda: incoming.owner.ear.stopped(incoming, transfer, lost=lost))

    def close(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        loop = asyncio.get_running_loop()
        loop.call_soon(self.ear.lost, "closed")
        if self.incoming is not None:
            loop.call_soon(self.incoming.owner.ear.lost, self.incoming, "closed")

    def _send_next(self) -> None:
        self._is_busy = bool(self._queues)
        if not self._queues:
            return
        transfer = next(iter(self._queues))
        queue = self._queues.pop(transfer)
        block = queue.popleft()
        if queue:
            self._queues[transfer] = queue
        self._arrive(block)
        self.ear.sent([block])
        self.soon(self._send_next)

    def _arrive(self, block: Block) -> None:
        incoming = self.incoming
        assert incoming is not None
        ranks, targets = incoming.wanted.get(block.transfer, (1, {}))
        target = targets.pop(block.position, None)
        if target is None or not target.is_held():
            return
        target.data[:] = block.data
        sums = checksums_of(target.data, ranks)
        if joint_checksum(sums) == block.checksum:
            incoming.owner.ear.arrived(incoming, [Arrived(block.transfer, block.position, sums)])
        else:
            incoming.owner.ear.spoiled(incoming, block.transfer, CHECKSUM)
