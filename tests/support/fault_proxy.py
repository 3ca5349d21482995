"""Between two stores: passes on what they say frame by frame, and corrupts, cuts or delays as it is told.

`mode` in its folder says what it does: `clean`, `corrupt P`, `cut P` or `delay P`, with P the share of blocks that it
does it to. What it did is appended to `done`, one JSON object a line. Seeded: the same frames meet the same fate.
"""

import contextlib
import json
import random
import socket
import struct
import threading
import time
from pathlib import Path

from services.kv_transfer.peers.frames import BLOCK, HEADER, Head, Offer, read_source

DELAY_S = 0.03


class FaultProxy:
    def __init__(self, folder: Path, port: int, seed: int) -> None:
        """Listen; connections are passed on to `port`."""
        self._folder = folder
        self._port = port
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            source, _ = self._listener.accept()
            try:
                target = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                source.close()
                continue
            for sock in (source, target):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._forward, args=(source, target), daemon=True).start()
            threading.Thread(target=_backward, args=(target, source), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        offered: dict[int, int] = {}  # transfer -> blocks
        corrupted: set[int] = set()
        with contextlib.suppress(OSError, EOFError):
            for _ in range(2):  # Hello and Answer
                length = _exactly(source, 4)
                target.sendall(length + _exactly(source, struct.unpack("<I", length)[0]))
            while True:
                head_bytes = _exactly(source, HEADER.size)
                kind, transfer, position, size, _, checksum, _ = HEADER.unpack(head_bytes)
                body = bytearray(_exactly(source, size))
                if kind != BLOCK:
                    message = read_source(Head(kind, transfer, position, size, checksum), bytes(body))
                    if isinstance(message, Offer):
                        offered[message.transfer] = len(message.keys)
                else:
                    fate = self._fate()
                    if fate == "cut":
                        self._note({"cut": transfer})
                        target.sendall(head_bytes + body[: size // 2])
                        break
                    if fate == "corrupt":
                        body[self._random.randrange(size)] ^= 0x40
                        if transfer not in corrupted:
                            corrupted.add(transfer)
                            self._note({"corrupt": position, "of": offered[transfer]})
                    elif fate == "delay":
                        self._note({"delay": position})
                        time.sleep(DELAY_S)
                target.sendall(head_bytes + body)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _fate(self) -> str:
        mode, _, share = (self._folder / "mode").read_text().partition(" ")
        with self._lock:
            return mode if share and self._random.random() < float(share) else ""

    def _note(self, what: dict[str, int]) -> None:
        with self._lock, (self._folder / "done").open("a") as file:
            file.write(json.dumps(what) + "\n")


def _backward(target: socket.socket, source: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := target.recv(1 << 16):
            source.sendall(data)
    for sock in (source, target):
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = sock.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) < size:
        raise EOFError
    return data
