"""The sending end of a TCP link: one thread that writes, one that reads what the target says.

Invariants: control messages go before blocks, blocks of several transfers in turns; a link that fails tells so once,
when neither thread touches memory or socket any more; a link that is idle proves every `limit_s / 4` that it lives.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from services.kv_transfer.peers.channel import Channel
from services.kv_transfer.peers.frames import (
    HEADER,
    Ended,
    FromSource,
    Offer,
    Packer,
    PeerPing,
    PeerPong,
    Stop,
    Unpacker,
    Want,
    read_target,
)
from services.kv_transfer.peers.frames import BadFrame as Bad
from services.kv_transfer.peers.handshake import Seeds
from services.kv_transfer.peers.mailbox import Mailbox
from services.kv_transfer.peers.transport import Block, SourceEar

log = logging.getLogger(__name__)

RUN_BYTES = 512 * 1024
RUN_BLOCKS = 64
TELL_BYTES = 4 * 1024 * 1024

Dial = Callable[[], tuple[Channel, Seeds]]  # may raise Bad, EOFError or OSError


class TcpOutgoing:
    def __init__(self, node: str, dial: Dial, ear: SourceEar, mailbox: Mailbox, limit_s: float) -> None:
        self._node = node
        self._dial = dial
        self._ear = ear
        self._mailbox = mailbox
        self._ping_s = limit_s / 4
        self._ready = threading.Condition()
        self._controls: deque[FromSource] = deque()
        self._queues: dict[int, deque[Block]] = {}
        self._turns: deque[int] = deque()
        self._sent: list[Block] = []
        self._untold_bytes = 0
        self._is_over = False
        self._reason = "closed"
        self._channel: Channel | None = None
        self.thread = threading.Thread(target=self._run, name=f"push-{node}", daemon=True)

    # ---- Outgoing, on the loop -------------------------------------------------------------------------------

    def offer(self, offer: Offer) -> None:
        self._say(offer)

    def send(self, blocks: Sequence[Block]) -> None:
        with self._ready:
            for block in blocks:
                queue = self._queues.get(block.transfer)
                if queue is None:
                    queue = self._queues[block.transfer] = deque()
                    self._turns.append(block.transfer)
                queue.append(block)
            self._ready.notify()

    def stop(self, transfer: int, *, lost: bool) -> None:
        with self._ready:
            dropped = self._queues.pop(transfer, ())
            if dropped:
                self._turns.remove(transfer)
                self._has_sent(dropped)
        self._say(Stop(transfer=transfer, lost=lost))

    def close(self) -> None:
        self._give_up("closed")

    # ---- the writing thread ----------------------------------------------------------------------------------

    def _say(self, message: FromSource) -> None:
        with self._ready:
            self._controls.append(message)
            self._ready.notify()

    def _run(self) -> None:
        reader: threading.Thread | None = None
        try:
            channel, seeds = self._dial()
            with self._ready:
                self._channel = channel
                if self._is_over:
                    channel.shut()
            reader = threading.Thread(target=self._read, args=(channel, seeds), name=f"heard-{self._node}", daemon=True)
            reader.start()
            self._write(channel, Packer(seeds.source))
        except (Bad, OSError, EOFError) as error:
            self._give_up(reason_of(error))
        except Exception:  # the thread's boundary: whoever waits for this link must hear of its end
            log.exception("kv: the link to %s failed", self._node)
            self._give_up("failed")
        if reader is not None:
            reader.join()
        if self._channel is not None:
            self._channel.close()
        self._mailbox.put(lambda: self._ear.lost(self._reason))

    def _write(self, channel: Channel, packer: Packer) -> None:
        pinged = time.monotonic()
        while True:
            work = self._next(pinged + self._ping_s)
            if work is None:
                return
            if isinstance(work, list):
                parts: list[bytes | memoryview] = []
                for block in work:
                    parts += (packer.block(block.transfer, block.position, len(block.data), block.checksum), block.data)
                channel.send(*parts)
                with self._ready:
                    self._has_sent(work)
            else:
                channel.send(packer.control(work))
            if time.monotonic() >= pinged + self._ping_s:
                pinged = time.monotonic()
                channel.send(packer.control(PeerPing()))

    def _next(self, until: float) -> list[Block] | FromSource | None:
        """What is to be sent now; a PeerPing when nothing has come until then; None at the end."""
        with self._ready:
            while not self._is_over:
                if self._controls:
                    return self._controls.popleft()
                if self._turns:
                    return self._take_turns()
                left_s = until - time.monotonic()
                if left_s <= 0:
                    return PeerPing()
                self._ready.wait(left_s)
        return None

    def _take_turns(self) -> list[Block]:
        """With the lock: one block, or as many small ones as are worth a call."""
        taken: list[Block] = []
        size = 0
        while self._turns and len(taken) < RUN_BLOCKS and size < RUN_BYTES:
            transfer = self._turns.popleft()
            queue = self._queues[transfer]
            taken.append(queue.popleft())
            size += len(taken[-1].data)
            if queue:
                self._turns.append(transfer)
            else:
                del self._queues[transfer]
        return taken

    def _has_sent(self, blocks: Iterable[Block]) -> None:
        """With the lock. The loop hears of it when nothing is left to send, or of many at once."""
        for block in blocks:
            self._sent.append(block)
            self._untold_bytes += len(block.data)
        if self._untold_bytes >= TELL_BYTES or not self._turns:
            self._untold_bytes = 0
            self._mailbox.put(self._tell_sent)

    def _tell_sent(self) -> None:
        with self._ready:
            sent, self._sent = self._sent, []
        if sent:
            self._ear.sent(sent)

    def _give_up(self, reason: str) -> None:
        with self._ready:
            if self._is_over:
                return
            self._is_over = True
            self._reason = reason
            if self._channel is not None:
                self._channel.shut()
            self._ready.notify()

    # ---- the reading thread ----------------------------------------------------------------------------------

    def _read(self, channel: Channel, seeds: Seeds) -> None:
        unpacker, head_bytes = Unpacker(seeds.target), bytearray(HEADER.size)
        try:
            while True:
                channel.receive(head_bytes, fresh=True)
                head = unpacker.head(head_bytes)
                body = bytearray(head.size)
                channel.receive(body)
                self._hear(read_target(head, body))
        except (Bad, OSError, EOFError) as error:
            self._give_up(reason_of(error))
        except Exception:  # the thread's boundary
            log.exception("kv: what %s said was not read", self._node)
            self._give_up("failed")

    def _hear(self, message: Want | Ended | PeerPong) -> None:
        if isinstance(message, Want):
            self._mailbox.put(lambda: self._ear.wanted(message.transfer, message.positions))
        elif isinstance(message, Ended):
            self._mailbox.put(lambda: self._ear.ended(message.transfer, message.reason))


def reason_of(error: Exception) -> str:
    """For logs and metrics: one of few."""
    if isinstance(error, Bad):
        return error.reason
    if isinstance(error, EOFError):
        return "closed"
    return "unreachable" if isinstance(error, ConnectionRefusedError | TimeoutError) else "broken"
