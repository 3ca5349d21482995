"""One attachment of an engine rank to its node's store: two blocking sockets and the mapped arena.

Ends for good when either socket fails; the next attachment is a new `RankLink`. Must be closed only when no copy into
or out of the arena runs: its closing tells the store so.
"""

import contextlib
import mmap
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from shared.errors import BatonError, KvLost, from_wire
from shared.kv.messages import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    Answer,
    AnyCall,
    Attach,
    Attached,
    Body,
    Call,
    Geometry,
    Refusal,
    decode_answer,
    encode,
)

CALL_S = 5.0
WORD_BYTES = 8

B = TypeVar("B", bound=Body)


class RankLink:
    """Use `open_link`."""

    def __init__(self, command: socket.socket, watch: socket.socket, attached: Attached) -> None:
        """Map the arena. Raises KvLost when it is gone already."""
        self.attached = attached
        self.watch = watch
        self._command = command
        self._lock = threading.Lock()  # one call at a time
        self._calls = 1
        self.is_broken = False
        self.before_unmapping: Callable[[], None] = lambda: None
        try:
            fd = os.open(attached.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvLost(f"the arena cannot be opened: {error.strerror}") from error
        try:
            self._mapped = mmap.mmap(fd, attached.size_bytes)
        except (OSError, ValueError) as error:
            raise KvLost("the arena cannot be mapped") from error
        finally:
            os.close(fd)
        self.view = memoryview(self._mapped)
        words_end = attached.words_offset + attached.slots * WORD_BYTES
        self._words = self.view[attached.words_offset : words_end].cast("Q")

    def call(self, body: AnyCall, expect: type[B]) -> B:
        """Ask on the command socket. Raises what the store refuses with, or KvLost when the socket fails."""
        with self._lock:
            if self.is_broken:
                raise KvLost("the store is away")
            self._calls += 1
            self.is_broken = True  # until an answer proves that both ends agree on what comes next
            answer = exchange(self._command, self._calls, body)
            self.is_broken = False
        return checked(answer, expect)

    def call_all(self, bodies: Sequence[AnyCall]) -> list[Body]:
        """Ask several things at once, and read all answers. Raises KvLost when the socket fails.

        Only as many as fit the sockets' buffers: the store reads nothing more while its answers are not read.
        """
        with self._lock:
            if self.is_broken:
                raise KvLost("the store is away")
            first = self._calls + 1
            self._calls += len(bodies)
            self.is_broken = True
            found = exchange_all(self._command, first, bodies)
            self.is_broken = False
        return found

    def tell(self, body: AnyCall) -> None:
        """Send on the watch socket; the answer comes with the pushes. Raises OSError."""
        self.watch.sendall(encode(Call(1, body)))

    def word(self, slot: int) -> int:
        return self._words[self._checked(slot)]

    def slot_view(self, slot: int) -> memoryview:
        start = self.attached.slots_offset + self._checked(slot) * self.attached.slot_bytes
        return self.view[start : start + self.attached.slot_bytes]

    def close(self) -> None:
        self._command.close()
        self.watch.close()
        self.before_unmapping()
        self._words.release()
        self.view.release()
        with contextlib.suppress(BufferError):  # somebody still holds a view: unmapped when that goes
            self._mapped.close()

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self.attached.slots:
            raise IndexError(f"slot {slot} of {self.attached.slots}")
        return slot


def open_link(path: str, *, session: str, worker: str, rank: int, geometry: Geometry) -> RankLink:
    """Attach both sockets and map the arena. Raises KvLost, or what the store refuses with."""
    command = watch = None
    try:
        command, watch = _connect(path), _connect(path)
        as_rank = Attach(session=session, kind="rank", worker=worker, rank=rank, geometry=geometry)
        as_watch = Attach(session=session, kind="watch", worker=worker, rank=rank)
        attached = checked(exchange(command, 1, as_rank), Attached)
        checked(exchange(watch, 1, as_watch), Attached)
        return RankLink(command, watch, attached)
    except BaseException as error:
        for opened in (command, watch):
            if opened is not None:
                opened.close()
        if isinstance(error, OSError):
            raise KvLost(f"no store answers on its socket: {error.strerror}") from error
        raise


def exchange(sock: socket.socket, call_id: int, body: AnyCall) -> Answer:
    """Raises KvLost when the socket fails; it must not be used again then."""
    try:
        sock.sendall(encode(Call(call_id, body)))
        while (answer := read_answer(sock)).id != call_id:
            pass  # a push
    except (OSError, msgspec.DecodeError) as error:
        raise KvLost(f"the store does not answer: {type(error).__name__}") from error
    return answer


def exchange_all(sock: socket.socket, first_id: int, bodies: Sequence[AnyCall]) -> list[Body]:
    """The answers' bodies, in order. Raises KvLost like `exchange`."""
    found: list[Body] = []
    try:
        sock.sendall(b"".join(encode(Call(first_id + number, body)) for number, body in enumerate(bodies)))
        while len(found) < len(bodies):
            answer = read_answer(sock)
            if answer.id == first_id + len(found):
                found.append(answer.body)
    except (OSError, msgspec.DecodeError) as error:
        raise KvLost(f"the store does not answer: {type(error).__name__}") from error
    return found


def checked(answer: Answer, expect: type[B]) -> B:
    """The answer's body; raises what the store refuses with."""
    if isinstance(answer.body, Refusal):
        raise from_wire(answer.body.code, answer.body.message)
    if not isinstance(answer.body, expect):
        raise KvLost(f"the store answered with {type(answer.body).__name__}")
    return answer.body


def read_answer(sock: socket.socket) -> Answer:
    """One frame. Raises OSError, ConnectionError at the end of the stream, or DecodeError."""
    length = int.from_bytes(_read_exactly(sock, HEADER_BYTES), "little")
    if length > MAX_FRAME_BYTES:
        raise msgspec.DecodeError(f"a frame of {length} bytes")
    return decode_answer(_read_exactly(sock, length))


def is_fatal(error: BatonError) -> bool:
    """Whether another try could not help."""
    return not error.retryable


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(CALL_S)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _read_exactly(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        received = sock.recv_into(view)
        if received == 0:
            raise ConnectionResetError("the store closed the connection")
        view = view[received:]
    return data
