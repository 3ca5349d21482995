"""Ears of a transport that write down what they are told, and wait for it."""

import asyncio
from collections.abc import Callable

import xxhash

from services.kv_transfer.peers.frames import Offer, joint_checksum
from services.kv_transfer.peers.transport import Arrived, Block, Incoming, PeerTarget

DEADLINE_S = 10.0
SLOT_BYTES = 64 * 1024


class Heard:
    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def tell(self) -> None:
        self._changed.set()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not reached():
                self._changed.clear()
                await self._changed.wait()


class Source(Heard):
    """A SourceEar."""

    def __init__(self) -> None:
        super().__init__()
        self.wants: dict[int, list[int]] = {}
        self.done: list[Block] = []
        self.ends: dict[int, str] = {}
        self.losses: list[str] = []

    def wanted(self, transfer: int, positions: list[int]) -> None:
        assert not self.losses
        self.wants[transfer] = positions
        self.tell()

    def sent(self, blocks: list[Block]) -> None:
        assert not self.losses
        self.done += blocks
        self.tell()

    def ended(self, transfer: int, reason: str) -> None:
        assert not self.losses
        self.ends[transfer] = reason
        self.tell()

    def lost(self, reason: str) -> None:
        self.losses.append(reason)
        self.tell()


class Target_(Heard):  # noqa: N801 - PeerTarget is where a block belongs
    """A TargetEar that wants what `choose` says, each into memory of its own."""

    def __init__(self, choose: Callable[[Offer], list[int]] = lambda offer: list(range(len(offer.keys)))) -> None:
        super().__init__()
        self.choose = choose
        self.is_held = True
        self.offers: list[Offer] = []
        self.links: list[Incoming] = []
        self.memory: dict[tuple[int, int], bytearray] = {}
        self.blocks: list[Arrived] = []
        self.spoils: list[tuple[int, str]] = []
        self.stops: list[tuple[int, bool]] = []
        self.withdrawals: list[int] = []
        self.losses: list[str] = []

    def offered(self, link: Incoming, offer: Offer) -> None:
        self.offers.append(offer)
        self.links.append(link)
        targets = {}
        for position in self.choose(offer):
            self.memory[offer.transfer, position] = bytearray(offer.block_bytes)
            view = memoryview(self.memory[offer.transfer, position])
            targets[position] = PeerTarget(view, lambda: self.is_held)
        link.want(offer.transfer, offer.ranks, targets)
        self.tell()

    def arrived(self, link: Incoming, blocks: list[Arrived]) -> None:
        self.blocks += blocks
        self.tell()

    def spoiled(self, link: Incoming, transfer: int, reason: str) -> None:
        self.spoils.append((transfer, reason))
        self.tell()

    def stopped(self, link: Incoming, transfer: int, *, lost: bool) -> None:
        self.stops.append((transfer, lost))
        self.tell()

    def withdrawn(self, link: Incoming, transfer: int) -> None:
        self.withdrawals.append(transfer)
        self.tell()

    def lost(self, link: Incoming, reason: str) -> None:
        self.losses.append(reason)
        self.tell()


def offer_of(transfer: int, count: int, *, size: int = SLOT_BYTES, ranks: int = 1) -> Offer:
    keys = [f"{transfer}-{position}".encode().ljust(16, b".") for position in range(count)]
    return Offer(transfer=transfer, lease="l", fingerprint="f", block_bytes=size, ranks=ranks, keys=keys)


def content_of(transfer: int, position: int, size: int = SLOT_BYTES) -> bytes:
    return bytes((transfer * 31 + position * 7 + index) & 0xFF for index in range(256)) * (size // 256)


def block_of(transfer: int, position: int, *, size: int = SLOT_BYTES, ranks: int = 1) -> Block:
    data = memoryview(content_of(transfer, position, size))
    slot = size // ranks
    sums = [xxhash.xxh3_64_intdigest(data[rank * slot : (rank + 1) * slot]) for rank in range(ranks)]
    return Block(transfer, position, data, joint_checksum(sums))
