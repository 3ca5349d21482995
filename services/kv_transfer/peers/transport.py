"""What a transport between stores must do, whatever carries the bytes: TCP now, RDMA another day.

The source offers blocks for a lease of the target; the target says which it wants and gives the memory they belong in;
the source sends each as soon as it has it. Links and ears are called on the event loop only, and never block; what a
transport does in threads of its own, it tells there too. tests/contract/test_peer_transport.py holds any
implementation to the invariants:

- a block lands only in memory that was given for it, and only while that is still held;
- after `Incoming.withdraw` has said so, or `TargetEar.withdrawn` was called, nothing is written there any more;
- a block is told as arrived once, and only with the bytes that its checksum was made of;
- blocks of several transfers go in turns;
- whatever breaks, each end is told `lost` once and nothing after it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from services.kv_transfer.peers.frames import Offer


class Block(NamedTuple):
    """Bytes to send; they must not change until `SourceEar.sent` or `SourceEar.lost`."""

    transfer: int
    position: int
    data: memoryview
    checksum: int  # frames.joint_checksum


class PeerTarget(NamedTuple):
    """Where a wanted block belongs."""

    data: memoryview
    is_held: Callable[[], bool]  # the generation word still says that the memory is this transfer's; any thread


class Arrived(NamedTuple):
    transfer: int
    position: int
    checksums: list[int]  # of each rank's slot


class Outgoing(Protocol):
    """A link to a peer, at the source."""

    def offer(self, offer: Offer) -> None: ...
    def send(self, blocks: Sequence[Block]) -> None:
        """Wanted ones only. They go in the order given, in turns with other transfers'."""
        ...

    def stop(self, transfer: int, *, lost: bool) -> None:
        """Blocks that were given and not sent are told as sent soon."""
        ...

    def close(self) -> None: ...


class Incoming(Protocol):
    """A link from a peer, at the target."""

    peer: str  # its node

    def want(self, transfer: int, ranks: int, targets: dict[int, PeerTarget]) -> None: ...
    def end(self, transfer: int, reason: str) -> None:
        """Takes no more of it: complete, with an empty reason, or refused. Withdraws what is left."""
        ...

    def withdraw(self, transfer: int) -> bool:
        """Write nothing more into its targets. True: from now on; False: `withdrawn` will tell."""
        ...

    def close(self) -> None: ...


class SourceEar(Protocol):
    """Who offers."""

    def wanted(self, transfer: int, positions: list[int]) -> None: ...
    def sent(self, blocks: list[Block]) -> None:
        """Their memory is not read any more."""
        ...

    def ended(self, transfer: int, reason: str) -> None: ...
    def lost(self, reason: str) -> None:
        """The link is over, and with it every transfer. Memory of blocks given to it is not read any more."""
        ...


class TargetEar(Protocol):
    """Who receives. One for all links of a node."""

    def offered(self, link: Incoming, offer: Offer) -> None: ...
    def arrived(self, link: Incoming, blocks: list[Arrived]) -> None: ...
    def spoiled(self, link: Incoming, transfer: int, reason: str) -> None:
        """A block came that is not what was sent."""
        ...

    def stopped(self, link: Incoming, transfer: int, *, lost: bool) -> None: ...
    def withdrawn(self, link: Incoming, transfer: int) -> None: ...
    def lost(self, link: Incoming, reason: str) -> None:
        """Nothing is written into any target of this link any more."""
        ...


class Transport(Protocol):
    """One node's."""

    address: str  # as peers are to be told

    def connect(self, node: str, address: str, ear: SourceEar) -> Outgoing:
        """At once; what comes of it, `ear` is told."""
        ...

    async def close(self) -> None:
        """Every link ends, and no thread is left."""
        ...
