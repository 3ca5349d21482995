"""Frames between stores: what comes through unharmed, and that nothing else does."""

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from services.kv_transfer.peers import frames
from services.kv_transfer.peers.frames import (
    BLOCK,
    HEADER,
    BadFrame,
    Ended,
    Head,
    Offer,
    Packer,
    PeerPing,
    PeerPong,
    Stop,
    Unpacker,
    Want,
    read_source,
    read_target,
)

SEED = 0x5EED

offers = st.builds(
    Offer,
    transfer=st.integers(0, 2**32 - 1),
    lease=st.text(max_size=20),
    fingerprint=st.text(max_size=8),
    block_bytes=st.integers(0, 2**40),
    ranks=st.integers(0, 99),
    keys=st.lists(st.binary(max_size=16), max_size=5),
)
from_source = st.one_of(
    offers, st.builds(Stop, transfer=st.integers(0, 2**32 - 1), lost=st.booleans()), st.just(PeerPing())
)
from_target = st.one_of(
    st.builds(Want, transfer=st.integers(0, 2**32), positions=st.lists(st.integers(0, 2**32), max_size=5)),
    st.builds(Ended, transfer=st.integers(0, 2**32), reason=st.sampled_from(["", *frames.REASONS])),
    st.just(PeerPong()),
)


def read(data: bytes, unpacker: Unpacker) -> tuple[Head, bytes]:
    head = unpacker.head(data[: HEADER.size])
    return head, data[HEADER.size : HEADER.size + head.size]


def reason(data: bytes, unpacker: Unpacker) -> str:
    """Why it is refused; empty: it is not."""
    try:
        head, body = read(data, unpacker)
        if head.kind != BLOCK:
            read_source(head, body)
    except BadFrame as bad:
        return bad.reason
    return ""


@given(st.lists(from_source, max_size=5), st.lists(from_target, max_size=5))
def test_what_is_said_is_heard(ours: list[frames.FromSource], theirs: list[frames.FromTarget]) -> None:
    packer, unpacker = Packer(SEED), Unpacker(SEED)
    assert [read_source(*read(packer.control(message), unpacker)) for message in ours] == ours
    packer, unpacker = Packer(SEED), Unpacker(SEED)
    assert [read_target(*read(packer.control(message), unpacker)) for message in theirs] == theirs


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**30), st.integers(0, 2**64 - 1))
def test_a_blocks_head(transfer: int, position: int, size: int, checksum: int) -> None:
    head = Unpacker(SEED).head(Packer(SEED).block(transfer, position, size, checksum))
    assert head == Head(BLOCK, transfer, position, size, checksum)


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    assert reason(noise, Unpacker(SEED))


@given(st.binary(max_size=200), st.sampled_from(["source", "target"]))
def test_noise_behind_a_right_header_is_refused_or_a_message(noise: bytes, side: str) -> None:
    head = Head(frames.CONTROL, 0, 0, len(noise), xxhash.xxh3_64_intdigest(noise))
    read_it = read_source if side == "source" else read_target
    why, found = "", None
    try:
        found = read_it(head, noise)
    except BadFrame as bad:
        why = bad.reason
    assert isinstance(found, frames.Control) or why == frames.MALFORMED


@given(from_source, st.data())
def test_one_changed_bit_is_seen(message: frames.FromSource, data: st.DataObject) -> None:
    frame = bytearray(Packer(SEED).control(message))
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    frame[bit // 8] ^= 1 << bit % 8
    assert reason(bytes(frame), Unpacker(SEED)) in {frames.HEADER_DAMAGED, frames.CHECKSUM}


@given(from_source, st.data())
def test_a_part_of_a_frame_is_seen(message: frames.FromSource, data: st.DataObject) -> None:
    frame = Packer(SEED).control(message)
    part = frame[: data.draw(st.integers(0, len(frame) - 1))]
    assert reason(part, Unpacker(SEED)) in {frames.TRUNCATED, frames.CHECKSUM}


def test_what_is_repeated_left_out_or_moved_is_seen() -> None:
    packer = Packer(SEED)
    first, second, third = (packer.control(PeerPing()) for _ in range(3))
    for order in ([first, first], [first, third], [second]):
        unpacker = Unpacker(SEED)
        assert [reason(frame, unpacker) for frame in order][-1] == frames.SEQUENCE


def test_a_frame_of_another_connection_is_seen() -> None:
    assert reason(Packer(SEED + 1).control(PeerPing()), Unpacker(SEED)) == frames.HEADER_DAMAGED


def test_sizes_have_limits() -> None:
    for kind, limit in ((frames.CONTROL, frames.MAX_CONTROL_BYTES), (frames.BLOCK, frames.MAX_BLOCK_BYTES)):
        within, beyond = (Packer(SEED)._head(kind, 0, 0, size, 0) for size in (limit, limit + 1))
        assert Unpacker(SEED).head(within).size == limit
        assert reason(beyond, Unpacker(SEED)) == frames.OVERSIZED
    assert reason(Packer(SEED)._head(9, 0, 0, 0, 0), Unpacker(SEED)) == frames.MALFORMED


def test_a_block_of_several_ranks_has_one_checksum_of_all() -> None:
    data = memoryview(bytes(2048) + bytes(range(256)) * 8)
    sums = frames.checksums_of(data, 2)
    assert sums == [xxhash.xxh3_64_intdigest(data[:2048]), xxhash.xxh3_64_intdigest(data[2048:])]
    assert frames.joint_checksum(sums) != frames.joint_checksum(sums[::-1])
    assert frames.joint_checksum(sums[:1]) == sums[0]
