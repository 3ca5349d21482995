"""The receiving end of a TCP link: one thread that reads, straight into the memory that the store has set aside.

Invariants: memory is written only between `_begin` and `_finish`, under a target that was not withdrawn; blocks for
slots that are no longer ours are read into nowhere; a frame that cannot be trusted ends the link.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.kv_transfer.peers.channel import Channel
from services.kv_transfer.peers.frames import (
    BLOCK,
    CHECKSUM,
    HEADER,
    LATE,
    MALFORMED,
    POSITION,
    SIZE,
    TRANSFER,
    Ended,
    FromTarget,
    Head,
    Offer,
    Packer,
    PeerPong,
    Stop,
    Unpacker,
    Want,
    checksums_of,
    joint_checksum,
    read_source,
)
from services.kv_transfer.peers.frames import BadFrame as Bad
from services.kv_transfer.peers.handshake import Seeds
from services.kv_transfer.peers.mailbox import Mailbox
from services.kv_transfer.peers.outgoing import reason_of
from services.kv_transfer.peers.transport import Arrived, PeerTarget, TargetEar

log = logging.getLogger(__name__)

SINK_BYTES = 256 * 1024
TELL_BYTES = 4 * 1024 * 1024


@dataclass(slots=True)
class _Transfer:
    ranks: int
    targets: dict[int, PeerTarget]
    is_written: bool = False  # right now
    is_withdrawn: bool = False


class TcpIncoming:
    def __init__(
        self,
        channel: Channel,
        peer: str,
        seeds: Seeds,
        *,
        ear: TargetEar,
        mailbox: Mailbox,
        refused: Callable[[str], None],
        received: Callable[[int, float], None],
    ) -> None:
        """`refused` and `received` are called by the reading thread."""
        self.peer = peer
        self._channel = channel
        self._unpacker = Unpacker(seeds.source)
        self._packer = Packer(seeds.target)
        self._ear = ear
        self._mailbox = mailbox
        self._refused = refused
        self._received = received
        self._lock = threading.Lock()
        self._say_lock = threading.Lock()
        self._transfers: dict[int, _Transfer] = {}
        self._offered = -1
        self._arrived: list[Arrived] = []
        self._arrived_bytes = 0  # that the loop has not been told of; of the reading thread
        self._sink = bytearray(SINK_BYTES)

    # ---- Incoming, on the loop -------------------------------------------------------------------------------

    def want(self, transfer: int, ranks: int, targets: dict[int, PeerTarget]) -> None:
        with self._lock:
            self._transfers[transfer] = _Transfer(ranks, dict(targets))
        self._say(Want(transfer=transfer, positions=list(targets)))

    def end(self, transfer: int, reason: str) -> None:
        self.withdraw(transfer)
        self._say(Ended(transfer=transfer, reason=reason))

    def withdraw(self, transfer: int) -> bool:
        with self._lock:
            found = self._transfers.get(transfer)
            if found is None:
                return True
            if not found.is_written:
                del self._transfers[transfer]
                return True
            found.is_withdrawn = True
            return False

    def close(self) -> None:
        self._channel.shut()

    # ---- the reading thread ----------------------------------------------------------------------------------

    def run(self) -> None:
        """Until the link ends."""
        head_bytes, reason = bytearray(HEADER.size), "failed"
        try:
            while True:
                self._read_head(head_bytes)
                head = self._unpacker.head(head_bytes)
                if head.kind == BLOCK:
                    self._block(head)
                else:
                    body = bytearray(head.size)
                    self._channel.receive(body)
                    self._hear(read_source(head, body))
        except (Bad, OSError, EOFError) as error:
            reason = reason_of(error)
            if isinstance(error, Bad):
                self._refused(reason)
        except Exception:  # the thread's boundary: transfers of this link must not wait for ever
            log.exception("kv: the link from %s failed", self.peer)
        self._channel.shut()
        self._mailbox.put(lambda: self._tell_lost(reason))

    def _read_head(self, head_bytes: bytearray) -> None:
        """The loop hears of blocks when no more are here, or many have come: it needs the interpreter, too."""
        begun = 0
        if self._arrived_bytes:
            if self._arrived_bytes < TELL_BYTES:
                begun = self._channel.begins(head_bytes)
            if not begun:
                self._arrived_bytes = 0
                self._mailbox.put(self._flush)
        self._channel.receive(memoryview(head_bytes)[begun:], fresh=not begun)

    def _hear(self, message: Offer | Stop | object) -> None:
        if isinstance(message, Offer):
            if message.transfer <= self._offered:
                raise Bad(TRANSFER)
            if message.ranks < 1 or message.block_bytes < message.ranks or message.block_bytes % message.ranks:
                raise Bad(MALFORMED)
            self._offered = message.transfer
            self._mailbox.put(lambda: self._ear.offered(self, message))
        elif isinstance(message, Stop):
            self._mailbox.put(lambda: self._tell_stopped(message))
        else:
            self._say(PeerPong())

    def _block(self, head: Head) -> None:
        target, ranks = self._begin(head)
        if target is None:
            self._drop(head.size)
            return
        is_right = False
        try:
            started = time.perf_counter()
            self._channel.receive(target.data)
            self._received(head.size, time.perf_counter() - started)
            sums = checksums_of(target.data, ranks)
            is_right = joint_checksum(sums) == head.checksum
        finally:
            is_ours = self._finish(head.transfer, target)
        if not is_ours:
            self._refused(LATE)
        elif is_right:
            self._arrived_bytes += head.size
            with self._lock:
                self._arrived.append(Arrived(head.transfer, head.position, sums))
        else:
            self._refused(CHECKSUM)
            self._mailbox.put(lambda: self._tell_spoiled(head.transfer, CHECKSUM))

    def _begin(self, head: Head) -> tuple[PeerTarget | None, int]:
        """Where it goes; None: nowhere any more."""
        if head.transfer > self._offered:
            raise Bad(TRANSFER)
        with self._lock:
            transfer = self._transfers.get(head.transfer)
            if transfer is None:
                return None, 0
            target = transfer.targets.pop(head.position, None)
            if target is None:
                raise Bad(POSITION)
            if head.size != len(target.data):
                raise Bad(SIZE)
            if not target.is_held():
                return None, 0
            transfer.is_written = True
            return target, transfer.ranks

    def _finish(self, transfer: int, target: PeerTarget) -> bool:
        """Whether what was written is still ours."""
        with self._lock:
            found = self._transfers[transfer]
            found.is_written = False
            if found.is_withdrawn:
                del self._transfers[transfer]
                self._mailbox.put(lambda: self._tell_withdrawn(transfer))
                return False
            return target.is_held()

    def _drop(self, size: int) -> None:
        self._refused(LATE)
        sink = memoryview(self._sink)
        while size > 0:
            part = sink[: min(size, SINK_BYTES)]
            self._channel.receive(part)
            size -= len(part)

    def _say(self, message: FromTarget) -> None:
        """From both threads. A peer that does not read loses its link."""
        try:
            with self._say_lock:
                self._channel.send_now(self._packer.control(message))
        except (Bad, OSError):
            self._channel.shut()

    # ---- told on the loop ------------------------------------------------------------------------------------

    def _flush(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        if arrived:
            self._ear.arrived(self, arrived)

    def _tell_spoiled(self, transfer: int, reason: str) -> None:
        self._flush()
        self._ear.spoiled(self, transfer, reason)

    def _tell_stopped(self, message: Stop) -> None:
        self._flush()
        self._ear.stopped(self, message.transfer, lost=message.lost)

    def _tell_withdrawn(self, transfer: int) -> None:
        self._ear.withdrawn(self, transfer)

    def _tell_lost(self, reason: str) -> None:
        self._flush()
        self._ear.lost(self, reason)
