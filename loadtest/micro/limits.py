"""Raw limits: what this machine does without Baton, to put beside what Baton does.

All buffers are cut out of one region that no cache holds, because KV blocks are in no cache either. Nothing is
allocated while a clock runs.
"""

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import xxhash

from loadtest.cluster.stream import percentile
from loadtest.micro.raw_peer import HEADER, receive, unix_frame

RING_BYTES = 1 << 29
TCP_PIECE_BYTES = 1 << 20
TCP_TOTAL_BYTES = 1 << 28
GB = 1e9

Bytes = npt.NDArray[np.uint8]


class Ring:
    """Buffers of one size, handed out in turns."""

    def __init__(self, region: Bytes, size_bytes: int) -> None:
        """`region`: at least four buffers long."""
        self._buffers = region[: len(region) // size_bytes * size_bytes].reshape(-1, size_bytes)
        self._turn = 0

    def take(self) -> Bytes:
        self._turn = (self._turn + 1) % len(self._buffers)
        taken: Bytes = self._buffers[self._turn]
        return taken

    def copy_s(self, times: int = 1) -> float:
        """From one buffer to the next, and on from there: two copies are the least that any hand-off makes."""
        stations = [self.take() for _ in range(times + 1)]
        started = time.perf_counter()
        for source, target in itertools.pairwise(stations):
            np.copyto(target, source)
        return time.perf_counter() - started

    def paged_copies_s(self, page_bytes: int) -> float:
        """Two copies, page by page through slices: what reading from and writing to an engine's pages costs."""
        first, second, third = (self.take().data for _ in range(3))
        started = time.perf_counter()
        for source, target in ((first, second), (second, third)):
            for start in range(0, len(source), page_bytes):
                target[start : start + page_bytes] = source[start : start + page_bytes]
        return time.perf_counter() - started

    def checksum_s(self) -> float:
        taken = self.take()
        started = time.perf_counter()
        xxhash.xxh3_64_intdigest(taken.data)
        return time.perf_counter() - started


def region() -> Bytes:
    """Touched, so that no page is missing later."""
    return np.ones(RING_BYTES, np.uint8)


def memcpy_s(size_bytes: int, rounds: int = 32) -> float:
    """Median of plain copies of this size."""
    count = max(4, RING_BYTES // size_bytes)
    ring = Ring(np.ones(count * size_bytes, np.uint8), size_bytes)
    return percentile([ring.copy_s() for _ in range(rounds)], 0.5)


def threads_copy_gb_s(memory: Bytes, threads: int, seconds: float, size_bytes: int = 1 << 24) -> float:
    """Plain copies by several threads at once; numpy copies without the interpreter's lock."""
    share = len(memory) // threads
    rings = [Ring(memory[number * share : (number + 1) * share], size_bytes) for number in range(threads)]
    barrier = threading.Barrier(threads)

    def copy(ring: Ring) -> float:
        barrier.wait()
        copies, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds:
            ring.copy_s()
            copies += 1
        return copies * size_bytes / elapsed / GB

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(copy, rings))


def round_trip_s(peer: socket.socket, asked_bytes: int, answer_bytes: int) -> float:
    """There and back over a unix socket, blocking at both ends, both messages of a known size and no meaning."""
    frame = unix_frame(asked_bytes, answer_bytes)
    started = time.perf_counter()
    peer.sendall(frame)
    receive(peer, answer_bytes)
    return time.perf_counter() - started


def tcp_gb_s(peer: socket.socket, buffer: Bytes, total_bytes: int = TCP_TOTAL_BYTES) -> float:
    """One-way, in hot pieces of 1 MiB, until the peer has all of it."""
    pieces = total_bytes // TCP_PIECE_BYTES
    piece = buffer.data[:TCP_PIECE_BYTES]
    started = time.perf_counter()
    peer.sendall(HEADER.pack(pieces * TCP_PIECE_BYTES, 0))
    for _ in range(pieces):
        peer.sendall(piece)
    receive(peer, 1)
    return pieces * TCP_PIECE_BYTES / (time.perf_counter() - started) / GB
