"""The transport over TCP: a listener, a link out to each peer that is pushed to, a link in from each that pushes here.

Invariants: nobody is heard who has not shown that he knows the secret, and only so many are asked at once; `close`
leaves no thread and no socket.
"""

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable

from services.kv_transfer.peers import handshake
from services.kv_transfer.peers.channel import Channel, Secure, enlarge, plain
from services.kv_transfer.peers.frames import TOO_MANY, BadFrame
from services.kv_transfer.peers.handshake import Identity, Seeds
from services.kv_transfer.peers.incoming import TcpIncoming
from services.kv_transfer.peers.mailbox import Mailbox
from services.kv_transfer.peers.outgoing import TcpOutgoing, reason_of
from services.kv_transfer.peers.transport import SourceEar, TargetEar
from shared.errors import SettingsError

log = logging.getLogger(__name__)

MAX_INCOMING = 256  # links and those who have not shown yet who they are
BACKLOG = 64
JOIN_S = 5.0
ACCEPT_AGAIN_S = 0.05


class TcpTransport:
    """Use `listen`, end with `close`. Lives on one loop."""

    def __init__(
        self,
        own: Identity,
        ear: TargetEar,
        *,
        limit_s: float,
        refused: Callable[[str], None],
        received: Callable[[int, float], None] = lambda _bytes, _seconds: None,
        secure: Secure = plain,
    ) -> None:
        """Does nothing yet.

        Args:
            own: what peers must agree with.
            ear: told of everything that comes in.
            limit_s: a peer that is silent, or takes nothing, for so long has gone.
            refused: counts what was refused, by frames.REASONS; called by any thread.
            received: bytes of a block, and seconds that they took to come; called by any thread.
            secure: makes a fresh socket a secure one.
        """
        self.address = ""
        self._own = own
        self._ear = ear
        self._limit_s = limit_s
        self._refused = refused
        self._received = received
        self._secure = secure
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._lock = threading.Lock()
        self._incoming: dict[Channel, threading.Thread] = {}
        self._outgoing: set[TcpOutgoing] = set()
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._closed = threading.Event()

    @property
    def links(self) -> int:
        """Threads that are connected or about to be, in both directions."""
        with self._lock:
            self._forget_ended()
            return len(self._incoming) + len(self._outgoing)

    def listen(self, host: str, port: int, announced: str = "") -> None:
        """`announced`: host, or host:port, as peers reach it. Raises SettingsError."""
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
            listener = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            raise SettingsError(f"setting 'peer_host': {host}: {error.strerror}") from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            enlarge(listener)
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise SettingsError(f"setting 'peer_port': cannot listen on {host}:{port}: {error.strerror}") from error
        self._listener = listener
        self.address = announced_as(announced or host, listener.getsockname()[1])
        self._accepting = threading.Thread(target=self._accept, args=(listener,), name="peers", daemon=True)
        self._accepting.start()

    def connect(self, node: str, address: str, ear: SourceEar) -> TcpOutgoing:
        link = TcpOutgoing(node, lambda: self._dial(node, address), ear, self._mailbox, self._limit_s)
        with self._lock:
            self._forget_ended()
            self._outgoing.add(link)
            link.thread.start()
        return link

    async def close(self) -> None:
        with self._lock:
            self._closed.set()
            incoming = dict(self._incoming)
        if self._listener is not None:
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        for channel in incoming:
            channel.shut()
        for link in self._outgoing:
            link.close()
        threads = [*incoming.values(), *(link.thread for link in self._outgoing)]
        if self._accepting is not None:
            threads.append(self._accepting)
        await asyncio.to_thread(_join, threads)
        await asyncio.sleep(0)  # what the threads said last is heard before this returns
        if self._listener is not None:
            self._listener.close()

    # ---- threads ---------------------------------------------------------------------------------------------

    def _dial(self, node: str, address: str) -> tuple[Channel, Seeds]:
        host, _, port = address.rpartition(":")
        host = host.strip("[]")
        family, kind, _, _, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind)
        channel: Channel | None = None
        try:
            enlarge(sock)
            sock.settimeout(self._limit_s)
            sock.connect(where)
            channel = Channel(sock, self._limit_s)
            channel.secure(self._secure, accepted=False)
            return channel, handshake.greet(channel, self._own, node)
        except BaseException as error:
            sock.close()
            if channel is not None:
                channel.close()  # what it was secured with
            if isinstance(error, BadFrame):
                self._refused(error.reason)
            log.warning("kv: no link to %s at %s: %s", node, address, _shown(error))
            raise

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, where = listener.accept()
            except OSError:
                if self._closed.wait(ACCEPT_AGAIN_S):
                    return
                continue  # he went away again, or there is no descriptor to be had
            try:
                self._admit(sock, str(where[0]))
            except OSError:  # he is gone already
                sock.close()

    def _admit(self, sock: socket.socket, where: str) -> None:
        with self._lock:
            self._forget_ended()
            if len(self._incoming) >= MAX_INCOMING or self._closed.is_set():
                sock.close()
                self._refused(TOO_MANY)
                return
            channel = Channel(sock, self._limit_s)
            thread = threading.Thread(target=self._serve, args=(channel, where), name=f"peer-{where}", daemon=True)
            self._incoming[channel] = thread
            thread.start()  # within the lock: `close` waits for all that it finds

    def _serve(self, channel: Channel, where: str) -> None:
        try:
            channel.secure(self._secure, accepted=True)
            peer, seeds = handshake.receive(channel, self._own)
        except (BadFrame, OSError, EOFError) as error:
            log.warning("kv: a connection from %s was refused: %s", where, reason_of(error))
            if isinstance(error, BadFrame):
                self._refused(error.reason)
        else:
            log.info("kv: %s pushes to this node", peer)
            TcpIncoming(
                channel,
                peer,
                seeds,
                ear=self._ear,
                mailbox=self._mailbox,
                refused=self._refused,
                received=self._received,
            ).run()
        channel.shut()
        channel.close()

    def _forget_ended(self) -> None:
        """With the lock. Only threads that have ended: `close` waits for all others."""
        self._outgoing = {link for link in self._outgoing if link.thread.is_alive()}
        self._incoming = {channel: thread for channel, thread in self._incoming.items() if thread.is_alive()}


def announced_as(host: str, port: int) -> str:
    """`host`, `host:port`, `address` or `[address]:port` as host:port."""
    if host.startswith("[") or host.count(":") == 1:
        return host if not host.endswith("]") else f"{host}:{port}"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(JOIN_S)
        if thread.is_alive():
            log.warning("kv: thread %s has not ended", thread.name)


def _shown(error: BaseException) -> str:
    if isinstance(error, BadFrame):
        return error.reason
    return getattr(error, "strerror", None) or type(error).__name__
