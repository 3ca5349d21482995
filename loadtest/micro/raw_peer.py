"""The other end of the raw limits: answers meaningless messages as fast as a socket can.

`python -m loadtest.micro.raw_peer UNIX_PATH TCP_PORT`. A frame is a header of two uint64, what follows and what is
wanted, and so many bytes; over TCP the answer is one byte when all has arrived.
"""

import contextlib
import socket
import struct
import sys
import threading
from collections.abc import Callable

Turn = Callable[[socket.socket, memoryview, int, int], None]  # peer, buffer, bytes that follow, bytes wanted

HEADER = struct.Struct("<QQ")
SWALLOW_BYTES = 1 << 20
PEER_S = 60.0


def unix_frame(asked_bytes: int, answer_bytes: int) -> bytes:
    """`asked_bytes` in all, the header included."""
    following = max(0, asked_bytes - HEADER.size)
    return HEADER.pack(following, answer_bytes) + bytes(following)


def receive(peer: socket.socket, size_bytes: int) -> bytes:
    """Raises ConnectionError when the other end has gone."""
    data = peer.recv(size_bytes, socket.MSG_WAITALL) if size_bytes else b""
    if len(data) < size_bytes:
        raise ConnectionError("the raw peer has gone")
    return data


def connect(address: str | tuple[str, int]) -> socket.socket:
    """A unix path or a TCP address. Raises OSError."""
    peer = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
    peer.settimeout(PEER_S)
    try:
        peer.connect(address)
    except OSError:
        peer.close()
        raise
    return peer


def main(path: str, port: int) -> None:
    with socket.socket(socket.AF_UNIX) as local, socket.create_server(("127.0.0.1", port)) as remote:
        local.bind(path)
        local.listen()
        threading.Thread(target=_serve, args=(remote, _swallow), daemon=True).start()
        _serve(local, _answer)


def _serve(listener: socket.socket, turn: Turn) -> None:
    while True:
        peer, _ = listener.accept()
        threading.Thread(target=_talk, args=(peer, turn), daemon=True).start()


def _talk(peer: socket.socket, turn: Turn) -> None:
    buffer = memoryview(bytearray(SWALLOW_BYTES))
    with peer, contextlib.suppress(ConnectionError):
        while True:
            turn(peer, buffer, *HEADER.unpack(receive(peer, HEADER.size)))


def _answer(peer: socket.socket, _: memoryview, following: int, wanted: int) -> None:
    receive(peer, following)
    peer.sendall(bytes(wanted))


def _swallow(peer: socket.socket, buffer: memoryview, following: int, _: int) -> None:
    left = following
    while left:
        got = peer.recv_into(buffer[: min(left, SWALLOW_BYTES)], 0, socket.MSG_WAITALL)
        if not got:
            raise ConnectionError("the other end has gone")
        left -= got
    peer.sendall(b".")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
