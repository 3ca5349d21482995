"""TLS between stores: both show a certificate of the cluster's authority before anything is said.

A link has one thread that reads and one that writes, and Python's TLS sockets take neither two threads nor reads of a
whole slot. So the link gets one end of a socket pair, and a thread at its other end seals and opens what passes.
Invariants: a peer without a certificate of that authority is never heard; the thread ends with either side; it holds
no more than a few pieces, so that whoever does not read is noticed as without TLS. Names are not checked: pods'
addresses are in no certificate, and who knows the peer secret says which node he is.
"""

import contextlib
import select
import socket
import ssl
import threading
import time

from services.kv_transfer.peers.channel import Secure, enlarge, tune
from shared.tls import Tls

PIECE_BYTES = 256 * 1024


def mutual(tls: Tls, limit_s: float) -> Secure:
    """For TcpTransport. `limit_s`: for the handshake, and as of channels. Raises SettingsError."""
    ours, theirs = tls.client(), tls.server()
    ours.check_hostname = False

    def secure(sock: socket.socket, accepted: bool) -> socket.socket:
        sealed = _Sealed(sock, theirs if accepted else ours, accepted=accepted)
        sealed.shake_hands(time.monotonic() + limit_s)
        near, far = socket.socketpair()
        enlarge(near)
        tune(near, limit_s)
        threading.Thread(target=sealed.pump, args=(far,), name="sealed", daemon=True).start()
        return near

    return secure


class _Sealed:
    """One TCP connection, of which it takes a descriptor of its own."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, accepted: bool) -> None:
        self._sock = sock.dup()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=accepted)

    def shake_hands(self, until: float) -> None:
        """Raises OSError, of which ssl.SSLError is one."""
        try:
            while not self._shaken():
                if time.monotonic() > until:
                    raise TimeoutError("the peer does not complete its TLS handshake")
                data = self._sock.recv(PIECE_BYTES)
                if not data:
                    raise ConnectionResetError("the peer closed during its TLS handshake")
                self._incoming.write(data)
        except OSError:
            self._sock.close()
            raise

    def _shaken(self) -> bool:
        done = True
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            done = False
        finally:
            if data := self._outgoing.read():  # an alert, too: it tells the peer why
                self._sock.sendall(data)
        return done

    def pump(self, plain: socket.socket) -> None:
        """Until either side ends."""
        with self._sock, plain:
            with contextlib.suppress(OSError):
                self._pass_on(plain)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # whoever accepted it may hold a descriptor yet

    def _pass_on(self, plain: socket.socket) -> None:
        """Raises OSError at the end of either side."""
        self._sock.setblocking(False)
        plain.setblocking(False)
        opened, sealed = self._read_all(), b""  # some may have come with the end of the handshake
        while True:
            for descriptor, event in _wait(plain, self._sock, opened, sealed):
                can_write = event & ~select.POLLIN
                if descriptor == plain.fileno():
                    if opened and can_write:
                        opened = opened[plain.send(opened) :]
                    elif not sealed:
                        sealed = self._seal(plain)
                elif sealed and can_write:
                    sealed = sealed[self._sock.send(sealed) :]
                elif not opened:
                    opened = self._open()

    def _seal(self, plain: socket.socket) -> bytes:
        data = plain.recv(PIECE_BYTES)
        if not data:
            raise ConnectionResetError
        self._tls.write(data)
        return self._outgoing.read()

    def _open(self) -> bytes:
        data = self._sock.recv(PIECE_BYTES)
        if not data:
            raise ConnectionResetError
        self._incoming.write(data)
        return self._read_all()

    def _read_all(self) -> bytes:
        """What is whole by now."""
        pieces = []
        with contextlib.suppress(ssl.SSLWantReadError):
            while piece := self._tls.read(PIECE_BYTES):
                pieces.append(piece)
        return b"".join(pieces)


def _wait(plain: socket.socket, sock: socket.socket, opened: bytes, sealed: bytes) -> list[tuple[int, int]]:
    """What can go on. Nothing is read while what was read before has not gone out at the other side."""
    poller = select.poll()
    for one, out, into in ((plain, opened, sealed), (sock, sealed, opened)):
        if mask := (select.POLLOUT if out else 0) | (0 if into else select.POLLIN):
            poller.register(one, mask)
    return poller.poll()
