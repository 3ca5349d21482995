"""Stores that say what they are told to, right or wrong: the far end of a link, by hand. Blocking."""

import socket
import struct
from collections.abc import Callable

from services.kv_transfer.peers import handshake
from services.kv_transfer.peers.channel import Channel, enlarge
from services.kv_transfer.peers.frames import (
    HEADER,
    Ended,
    FromTarget,
    Offer,
    Packer,
    PeerPong,
    Unpacker,
    Want,
    read_target,
)
from services.kv_transfer.peers.handshake import Identity
from tests.support.peer_node import SECRET, PeerNode, content, keys_of

LIMIT_S = 5.0


def identity(node: str = "raw", **changes: object) -> Identity:
    return Identity(**{"cluster": "c", "node": node, "secret": SECRET, **changes})


def dial(address: str) -> socket.socket:
    host, port = address.rsplit(":", 1)
    sock = socket.create_connection((host, int(port)), timeout=LIMIT_S)
    sock.settimeout(None)
    return sock


class RawSource:
    """Has shown who it is, and pushes."""

    def __init__(self, target: PeerNode) -> None:
        self.sock = dial(target.peers.address)
        self.channel = Channel(self.sock, LIMIT_S)
        seeds = handshake.greet(self.channel, identity(), target.node)
        self.packer = Packer(seeds.source)
        self._unpacker = Unpacker(seeds.target)
        self._geometry = target.geometry

    def offer(self, lease: str, keys: list[bytes], *, transfer: int = 0, **changes: object) -> Offer:
        made = Offer(
            **{
                "transfer": transfer,
                "lease": lease,
                "fingerprint": self._geometry.fingerprint,
                "block_bytes": self._geometry.slot_bytes,
                "ranks": 1,
                "keys": keys,
                **changes,
            }
        )
        self.channel.send(self.packer.control(made))
        return made

    def hear(self) -> FromTarget:
        """The next thing that is no PeerPong."""
        while True:
            head_bytes = bytearray(HEADER.size)
            self.channel.receive(head_bytes)
            head = self._unpacker.head(head_bytes)
            body = bytearray(head.size)
            self.channel.receive(body)
            message = read_target(head, body)
            if not isinstance(message, PeerPong):
                return message

    def is_closed(self) -> bool:
        """Wait for the end of the link; whatever comes before it is read."""
        try:
            while self.sock.recv(1 << 16):
                pass
        except ConnectionError:
            pass
        return True

    def close(self) -> None:
        self.sock.close()


def offered(source: RawSource, count: int = 3, lease: str = "d") -> list[bytes]:
    """An offer for a lease that wants it all."""
    keys = keys_of("raw", count)
    source.offer(lease, keys)
    assert source.hear() == Want(transfer=0, positions=list(range(count)))
    return keys


def frame(source: RawSource, keys: list[bytes], which: int, **changes: int) -> bytes:
    """A block as it should be, but for the changes to its header."""
    import xxhash

    data = content(keys[which])
    values = {"transfer": 0, "position": which, "size": len(data), "checksum": xxhash.xxh3_64_intdigest(data)}
    return source.packer.block(**{**values, **changes}) + data


class RawTarget:
    """Accepts one link and answers its offers by hand."""

    def __init__(self, node: str, *, small: bool = False) -> None:
        self.listener = socket.socket()
        if small:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        else:
            enlarge(self.listener)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen()
        self.listener.settimeout(LIMIT_S)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self._node = node

    def accept(self) -> None:
        self.sock, _ = self.listener.accept()
        self.sock.settimeout(None)
        self.channel = Channel(self.sock, LIMIT_S)
        _, seeds = handshake.receive(self.channel, identity(self._node))
        self.packer = Packer(seeds.target)

    def say(self, message: FromTarget | Ended) -> None:
        self.channel.send(self.packer.control(message))

    def close(self) -> None:
        self.listener.close()
        if hasattr(self, "sock"):
            self.sock.close()


def recorded(address: str, talk: Callable[[Channel], object]) -> bytes:
    """What one side of a handshake said: for whoever would say it again."""
    said = bytearray()

    class Recording(Channel):
        def send(self, *parts: bytes | memoryview) -> None:
            said.extend(b"".join(parts))
            super().send(*parts)

    sock = dial(address)
    talk(Recording(sock, LIMIT_S))
    sock.close()
    return bytes(said)


def messages_of(said: bytes) -> list[bytes]:
    found, start = [], 0
    while start < len(said):
        (size,) = struct.unpack_from("<I", said, start)
        found.append(said[start : start + 4 + size])
        start += 4 + size
    return found
