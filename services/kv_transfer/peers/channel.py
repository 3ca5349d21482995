"""A connected socket between two stores, for one thread that reads and one that writes.

Blocking, with the kernel's own time-outs: a read of a whole slot is one call, straight into the arena. Invariants: no
call takes longer than `limit_s` without failing, also against a peer that was stopped, whose kernel goes on answering;
`shut` ends every call at once. TLS belongs into `Secure` (secure.py): it gets the fresh socket before anything is said.
"""

import contextlib
import errno
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from services.kv_transfer.peers.frames import STALLED, TRUNCATED, BadFrame

BUFFER_BYTES = 1024 * 1024  # measured: with less throughput falls; it also bounds what is under way
TIMEOUT_ERRORS = {errno.EAGAIN, errno.EWOULDBLOCK, errno.ETIMEDOUT}

Secure = Callable[[socket.socket, bool], socket.socket]  # fresh socket, whether it was accepted; may raise OSError


def plain(sock: socket.socket, _accepted: bool) -> socket.socket:
    return sock


class Channel:
    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        """`limit_s`: how long the peer may take no byte, or not complete what it has begun to send."""
        self._limit_s = limit_s
        tune(sock, limit_s)
        self._sock = sock

    def secure(self, secure: Secure, *, accepted: bool) -> None:
        """Before anything is said. Raises OSError."""
        self._sock = secure(self._sock, accepted)

    def receive(self, view: memoryview | bytearray, *, fresh: bool = False) -> None:
        """Fill it. Raises BadFrame, OSError, or EOFError where the peer may close: at a `fresh` frame."""
        view = memoryview(view)
        wanted, got = len(view), 0
        until = time.monotonic() + self._limit_s
        while got < wanted:
            try:
                count = self._sock.recv_into(view[got:], wanted - got, socket.MSG_WAITALL)
            except OSError as error:
                raise _judged(error) from error
            if count == 0:
                if fresh and got == 0:
                    raise EOFError
                raise BadFrame(TRUNCATED)
            got += count
            if got < wanted and time.monotonic() > until:
                raise BadFrame(STALLED)

    def begins(self, view: bytearray) -> int:
        """What has come of a frame so far, 0 if nothing has; does not wait. Raises BadFrame, OSError or EOFError."""
        try:
            count = self._sock.recv_into(view, len(view), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        if count == 0:
            raise EOFError
        return count

    def send(self, *parts: bytes | memoryview) -> None:
        """All of them, in as few calls as may be. Raises BadFrame or OSError."""
        left = [memoryview(part) for part in parts if len(part)]
        until = time.monotonic() + self._limit_s
        while left:
            try:
                count = self._sock.sendmsg(left)
            except OSError as error:
                raise _judged(error) from error
            sent = 0
            while sent < len(left) and count >= len(left[sent]):
                count -= len(left[sent])
                sent += 1
            del left[:sent]
            if left:
                left[0] = left[0][count:]
                if time.monotonic() > until:
                    raise BadFrame(STALLED)

    def send_now(self, data: bytes) -> None:
        """From a thread that must not wait: a peer that has left no room for a few bytes does not read any more."""
        try:
            sent = self._sock.send(data, socket.MSG_DONTWAIT)
        except OSError as error:
            raise _judged(error) from error
        if sent < len(data):
            raise BadFrame(STALLED)

    def shut(self) -> None:
        """From any thread; whoever reads or writes gets an error now."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Once nobody reads or writes any more."""
        self._sock.close()


def tune(sock: socket.socket, limit_s: float) -> None:
    """The same for both ends."""
    sock.setblocking(True)
    seconds = int(limit_s)
    timeout = struct.pack("ll", seconds, int((limit_s - seconds) * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))


def enlarge(sock: socket.socket) -> None:
    """Before it connects or listens. Where the kernel would allow less, it does better by itself."""
    for option, limit in ((socket.SO_SNDBUF, "wmem_max"), (socket.SO_RCVBUF, "rmem_max")):
        with contextlib.suppress(OSError, ValueError):
            if int(Path(f"/proc/sys/net/core/{limit}").read_text()) >= BUFFER_BYTES:
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)


def _judged(error: OSError) -> Exception:
    return BadFrame(STALLED) if error.errno in TIMEOUT_ERRORS else error
