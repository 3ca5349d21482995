"""What stores say to each other, as bytes: a header, then a control message or a block.

Pure. A frame is HEADER (little-endian) and `size` bytes. `sequence` counts a connection's frames in one direction from
0, and `check` is an xxh3 of what stands before it, seeded by the connection's handshake: a frame that is lost,
repeated, moved, changed in its header or taken from another connection shows at once. A block's bytes have their own
checksum, made when the block was committed. Whoever gets a bad frame cannot know where the next one begins, so the
connection ends; only a block whose bytes are wrong leaves it in order.
"""

import struct
from typing import Final, NamedTuple, TypeVar

import msgspec
import xxhash

FORMAT: Final = 1
CONTROL: Final = 1
BLOCK: Final = 2
HEADER = struct.Struct("<HxxIIIQQQ")  # kind, transfer, position, size, sequence, checksum, check
CHECKED_BYTES = HEADER.size - 8
MAX_CONTROL_BYTES = 4 * 1024 * 1024  # an Offer of 200,000 keys
MAX_BLOCK_BYTES = 1 << 30

# Why something was refused: labels of `baton_kv_refused_frames_total`.
TRUNCATED = "truncated"
HEADER_DAMAGED = "header"
SEQUENCE = "sequence"
OVERSIZED = "oversized"
MALFORMED = "malformed"
SIZE = "size"
TRANSFER = "transfer"  # never offered
POSITION = "position"  # not wanted, or sent twice
CHECKSUM = "checksum"
LATE = "late"  # for a slot that is no longer the transfer's
STALLED = "stalled"
KEY = "key"
LEASE = "lease"
FINGERPRINT = "fingerprint"
MEMORY = "kv_memory"
TOO_MANY = "too_many"
AUTHENTICATION = "authentication"
CLUSTER = "cluster"
VERSION = "version"
REASONS = (
    *(TRUNCATED, HEADER_DAMAGED, SEQUENCE, OVERSIZED, MALFORMED, SIZE, TRANSFER, POSITION, CHECKSUM, LATE, STALLED),
    *(KEY, LEASE, FINGERPRINT, MEMORY, TOO_MANY, AUTHENTICATION, CLUSTER, VERSION),
)


class BadFrame(Exception):
    """`reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Head(NamedTuple):
    kind: int
    transfer: int
    position: int
    size: int
    checksum: int


class Control(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Base of control messages."""


# ---- from the source ----------------------------------------------------------------------------------------


class Offer(Control, frozen=True):
    """These blocks are held here, or are being computed: which of them does that lease want?"""

    transfer: int  # grows with every offer of a connection
    lease: str  # of the target, set aside for these keys
    fingerprint: str
    block_bytes: int  # of all ranks together
    ranks: int
    keys: list[bytes]


class Stop(Control, frozen=True):
    """No more of this transfer comes. `lost`: nobody will bring the rest either."""

    transfer: int
    lost: bool = False


class PeerPing(Control, frozen=True, tag="Ping"):
    pass


# ---- from the target ----------------------------------------------------------------------------------------


class Want(Control, frozen=True):
    transfer: int
    positions: list[int]  # in the offer's keys


class Ended(Control, frozen=True):
    """The target has all it wanted, or takes no more of it, for one of REASONS."""

    transfer: int
    reason: str = ""


class PeerPong(Control, frozen=True, tag="Pong"):
    pass


FromSource = Offer | Stop | PeerPing
FromTarget = Want | Ended | PeerPong

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()
_from_source: msgspec.msgpack.Decoder[FromSource] = msgspec.msgpack.Decoder(FromSource)
_from_target: msgspec.msgpack.Decoder[FromTarget] = msgspec.msgpack.Decoder(FromTarget)


class Packer:
    """One direction of a connection, at its sender."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sequence = 0

    def block(self, transfer: int, position: int, size: int, checksum: int) -> bytes:
        """The header; the block's bytes follow it."""
        return self._head(BLOCK, transfer, position, size, checksum)

    def control(self, message: FromSource | FromTarget) -> bytes:
        body = _encoder.encode(message)
        if len(body) > MAX_CONTROL_BYTES:
            raise ValueError(f"a control message of {len(body)} bytes")
        return self._head(CONTROL, 0, 0, len(body), xxhash.xxh3_64_intdigest(body)) + body

    def _head(self, kind: int, transfer: int, position: int, size: int, checksum: int) -> bytes:
        head = HEADER.pack(kind, transfer, position, size, self._sequence, checksum, 0)[:CHECKED_BYTES]
        self._sequence += 1
        return head + xxhash.xxh3_64_intdigest(head, self._seed).to_bytes(8, "little")


class Unpacker:
    """One direction of a connection, at its receiver."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._sequence = 0

    def head(self, data: bytes | bytearray | memoryview) -> Head:
        """Raises BadFrame."""
        if len(data) != HEADER.size:
            raise BadFrame(TRUNCATED)
        kind, transfer, position, size, sequence, checksum, check = HEADER.unpack(data)
        if xxhash.xxh3_64_intdigest(data[:CHECKED_BYTES], self._seed) != check:
            raise BadFrame(HEADER_DAMAGED)
        if sequence != self._sequence:
            raise BadFrame(SEQUENCE)
        self._sequence += 1
        limit = {CONTROL: MAX_CONTROL_BYTES, BLOCK: MAX_BLOCK_BYTES}.get(kind)
        if limit is None:
            raise BadFrame(MALFORMED)
        if size > limit:
            raise BadFrame(OVERSIZED)
        return Head(kind, transfer, position, size, checksum)


def read_source(head: Head, body: bytes | bytearray | memoryview) -> FromSource:
    """What a source says. Raises BadFrame."""
    return _read(_from_source, head, body)


def read_target(head: Head, body: bytes | bytearray | memoryview) -> FromTarget:
    """What a target says. Raises BadFrame."""
    return _read(_from_target, head, body)


def _read(decoder: msgspec.msgpack.Decoder[M], head: Head, body: bytes | bytearray | memoryview) -> M:
    if head.kind != CONTROL:
        raise BadFrame(MALFORMED)
    if xxhash.xxh3_64_intdigest(body) != head.checksum:
        raise BadFrame(CHECKSUM)
    try:
        return decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(MALFORMED) from error


def joint_checksum(checksums: list[int]) -> int:
    """One for a block of several ranks; of one rank it is its own."""
    if len(checksums) == 1:
        return checksums[0]
    return int(xxhash.xxh3_64_intdigest(struct.pack(f"<{len(checksums)}Q", *checksums)))


def checksums_of(block: memoryview, ranks: int) -> list[int]:
    """Of each rank's slot."""
    slot = len(block) // ranks
    return [xxhash.xxh3_64_intdigest(block[rank * slot : (rank + 1) * slot]) for rank in range(ranks)]
