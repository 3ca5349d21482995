"""What a store does with peers that lie, stammer, fall silent or are none: refused with a reason, counted, and no harm."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from services.kv_transfer.peers import frames, handshake
from services.kv_transfer.peers.channel import Channel
from services.kv_transfer.peers.frames import BadFrame, Ended, Want
from tests.support.peer_node import PeerNode, content, keys_of, node, two_nodes
from tests.support.raw_store import (
    LIMIT_S,
    RawSource,
    RawTarget,
    dial,
    frame,
    identity,
    messages_of,
    offered,
    recorded,
)

WAIT_S = 30.0
SHORT_S = 0.5  # a peer that says nothing for so long has gone


@pytest.fixture
async def target(tmp_path: Path) -> AsyncIterator[PeerNode]:
    """A node with a lease `d` that waits for three blocks. In the end nothing is held, and the next push works."""
    async with node(tmp_path, "d", peer_s=WAIT_S) as d:
        await d.want("d", keys_of("raw", 3))
        yield d
        await d.host.release("d")
        await d.until(lambda: not d.held, f"the target holds {d.held}")
        await asyncio.to_thread(whole_hand_over, d, await wanted_anew(d))
        await d.until(lambda: d.store.held_prefix(keys_of("raw", 3)) == 3, "nothing comes any more")
        await d.host.release("anew")


async def wanted_anew(d: PeerNode) -> str:
    await d.want("anew", keys_of("raw", 3))
    return "anew"


def whole_hand_over(d: PeerNode, lease: str) -> None:
    source = RawSource(d)
    keys = keys_of("raw", 3)
    source.offer(lease, keys)
    want = source.hear()
    if isinstance(want, Want):
        for position in want.positions:
            source.channel.send(frame(source, keys, position))
    assert source.hear() == Ended(transfer=0)
    source.close()


# ---- handshake -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"secret": "another"}, frames.AUTHENTICATION),
        ({"cluster": "another"}, frames.CLUSTER),
        ({"format": 99}, frames.VERSION),
    ],
)
async def test_who_does_not_belong_is_refused(target: PeerNode, changes: dict[str, object], reason: str) -> None:
    def knock() -> str:
        channel = Channel(dial(target.peers.address), LIMIT_S)
        with pytest.raises(BadFrame) as bad:
            handshake.greet(channel, identity(**changes), "d")
        channel.close()
        return bad.value.reason

    assert await asyncio.to_thread(knock) == reason
    if reason != frames.AUTHENTICATION:  # there the source itself finds that the target does not know its secret
        await target.until(lambda: target.refused(reason) == 1, "it was not counted")


async def test_a_source_that_cannot_prove_itself_is_refused(target: PeerNode) -> None:
    def knock() -> str:
        channel = Channel(dial(target.peers.address), LIMIT_S)
        nonce = bytes(handshake.NONCE_BYTES)
        handshake._send(channel, handshake.Hello(format=frames.FORMAT, cluster="c", node="raw", nonce=nonce))
        handshake._receive(channel, handshake.Challenge)
        handshake._send(channel, handshake.HandshakeAnswer(proof=bytes(32)))
        with pytest.raises(BadFrame) as bad:
            handshake._receive(channel, handshake.Welcome)
        channel.close()
        return bad.value.reason

    assert await asyncio.to_thread(knock) == frames.AUTHENTICATION
    await target.until(lambda: target.refused(frames.AUTHENTICATION) == 1, "it was not counted")


async def test_an_overheard_handshake_cannot_be_used_again(target: PeerNode) -> None:
    def replay() -> str:
        said = recorded(target.peers.address, lambda channel: handshake.greet(channel, identity(), "d"))
        hello, answer = messages_of(said)
        channel = Channel(dial(target.peers.address), LIMIT_S)
        channel.send(hello)
        handshake._receive(channel, handshake.Challenge)
        channel.send(answer)
        with pytest.raises(BadFrame) as bad:
            handshake._receive(channel, handshake.Welcome)
        channel.close()
        return bad.value.reason

    assert await asyncio.to_thread(replay) == frames.AUTHENTICATION
    await target.until(lambda: target.refused(frames.AUTHENTICATION) == 1, "it was not counted")


async def test_a_false_target_gets_nothing(tmp_path: Path) -> None:
    """It cannot prove that it knows the secret, not even by sending back what it was sent."""
    async with node(tmp_path, "p") as p:
        false = RawTarget("d")

        def pretend() -> None:
            sock, _ = false.listener.accept()
            sock.settimeout(None)
            channel = Channel(sock, LIMIT_S)
            hello = handshake._receive(channel, handshake.Hello)
            challenge = handshake.Challenge(
                format=hello.format, cluster=hello.cluster, node="d", nonce=hello.nonce, proof=bytes(32)
            )
            handshake._send(channel, challenge)
            assert sock.recv(1) == b"", "the source went on"
            sock.close()

        await p.fill(keys_of("raw", 3))
        p.peers.directory.hear(_beat("d", false.address))
        pretending = asyncio.create_task(asyncio.to_thread(pretend))
        await p.host.reserve(
            lease="p", request="r", keys=keys_of("raw", 3), write=True, ttl_s=9, push_node="d", push_lease="d"
        )
        assert not (await p.host.wait("p", WAIT_S)).complete
        await pretending
        assert p.refused(frames.AUTHENTICATION) == 1
        await p.host.release("p")
        false.close()


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", frames.OVERSIZED),
        (struct.pack("<I", 1 << 30), frames.OVERSIZED),
        (struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1", frames.MALFORMED),
        (struct.pack("<I", 40) + b"short", frames.TRUNCATED),
        (messages_of(struct.pack("<I", 1) + b"\x80")[0], frames.MALFORMED),
    ],
)
async def test_noise_before_the_handshake(target: PeerNode, noise: bytes, reason: str) -> None:
    sock = dial(target.peers.address)
    sock.sendall(noise)
    with contextlib.suppress(OSError):  # it has hung up already
        sock.shutdown(1)
    await target.until(lambda: target.refused(reason) == 1, "it was not counted")
    sock.close()


async def test_who_says_nothing_is_hung_up_on(tmp_path: Path) -> None:
    async with node(tmp_path, "d", peer_s=SHORT_S) as d:
        sock = dial(d.peers.address)
        assert await asyncio.to_thread(sock.recv, 1)  # is told why
        await d.until(lambda: d.refused(frames.STALLED) == 1, "it was not counted")
        await d.until(lambda: d.peers.links == 0, "the thread is still there")
        sock.close()


# ---- frames ----------------------------------------------------------------------------------------------------

Bad = Callable[[RawSource, list[bytes]], bytes]

BAD: dict[str, tuple[Bad, str]] = {
    "cut": (lambda source, keys: frame(source, keys, 0)[:5000], frames.TRUNCATED),
    "out of order": (lambda source, keys: (frame(source, keys, 0), frame(source, keys, 1))[1], frames.SEQUENCE),
    "twice": (lambda source, keys: frame(source, keys, 0) * 2, frames.SEQUENCE),
    "header changed": (lambda source, keys: _flipped(frame(source, keys, 0), 4), frames.HEADER_DAMAGED),
    "block too large": (
        lambda source, keys: source.packer.block(0, 0, frames.MAX_BLOCK_BYTES + 1, 0),
        frames.OVERSIZED,
    ),
    "message too large": (
        lambda source, keys: source.packer._head(frames.CONTROL, 0, 0, frames.MAX_CONTROL_BYTES + 1, 0),
        frames.OVERSIZED,
    ),
    "no message": (lambda source, keys: source.packer._head(frames.CONTROL, 0, 0, 1, 0) + b"\xc1", frames.CHECKSUM),
    "unknown kind": (lambda source, keys: source.packer._head(7, 0, 0, 0, 0), frames.MALFORMED),
    "another size": (lambda source, keys: frame(source, keys, 0, size=8), frames.SIZE),
    "never offered": (lambda source, keys: frame(source, keys, 0, transfer=5), frames.TRANSFER),
    "never wanted": (lambda source, keys: frame(source, keys, 0, position=9), frames.POSITION),
    "sent twice": (lambda source, keys: frame(source, keys, 0) + frame(source, keys, 0), frames.POSITION),
    "a target's word": (lambda source, keys: source.packer.control(Ended(transfer=0)), frames.MALFORMED),
}


def _flipped(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 0x10]) + data[index + 1 :]


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_frame_ends_the_link_and_the_wait(target: PeerNode, name: str) -> None:
    make, reason = BAD[name]
    waiting = asyncio.create_task(target.host.wait("d", WAIT_S))

    def misbehave() -> RawSource:
        source = RawSource(target)
        keys = offered(source)
        source.channel.send(make(source, keys))
        if name == "cut":
            source.sock.shutdown(1)
        assert source.is_closed()
        return source

    source = await asyncio.to_thread(misbehave)
    ready = await waiting
    assert not ready.complete
    assert target.refused(reason) == 1
    assert target.failed(reason) == 1
    expected = [True, False, False] if name in ("twice", "sent twice") else [False] * 3
    assert ready.committed == expected
    source.close()


async def test_a_block_with_wrong_bytes_ends_its_transfer_only(target: PeerNode) -> None:
    def misbehave() -> RawSource:
        source = RawSource(target)
        keys = offered(source)
        source.channel.send(_flipped(frame(source, keys, 0), 3000))
        assert source.hear() == Ended(transfer=0, reason=frames.CHECKSUM)
        source.channel.send(frame(source, keys, 1))  # was under way
        source.offer("nobody", keys, transfer=1)
        assert source.hear() == Ended(transfer=1, reason=frames.LEASE)
        return source

    source = await asyncio.to_thread(misbehave)
    assert not (await target.host.wait("d", WAIT_S)).complete
    assert target.refused(frames.LATE) == 1
    assert target.store.held_prefix(keys_of("raw", 3)) == 0
    source.close()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"fingerprint": "another"}, frames.FINGERPRINT),
        ({"ranks": 2}, frames.FINGERPRINT),
        ({"block_bytes": 4096}, frames.FINGERPRINT),
        ({"keys": keys_of("other", 3)}, frames.KEY),
        ({"keys": [keys_of("raw", 1)[0]] * 2}, frames.KEY),
        ({"keys": []}, frames.KEY),
    ],
)
async def test_an_offer_that_does_not_fit(target: PeerNode, changes: dict[str, object], reason: str) -> None:
    def misbehave() -> RawSource:
        source = RawSource(target)
        source.offer("d", **{"keys": keys_of("raw", 3), **changes})
        assert source.hear() == Ended(transfer=0, reason=reason)
        return source

    source = await asyncio.to_thread(misbehave)
    assert target.refused(reason) == 1
    source.close()


async def test_a_source_that_stops_in_the_middle_of_a_block_keeps_its_slot_from_others(tmp_path: Path) -> None:
    """Until the read has ended the slot is nobody's; then it is free, and what came is nowhere."""
    async with node(tmp_path, "d", blocks=8, peer_s=SHORT_S) as d:
        await d.want("d", keys_of("raw", 3))

        def stall() -> RawSource:
            source = RawSource(d)
            keys = offered(source)
            source.channel.send(frame(source, keys, 0)[:4000])
            return source

        source = await asyncio.to_thread(stall)
        await d.until(lambda: _is_writing(d), "the block is not being read")
        await d.host.release("d")
        assert d.store.counts()["revoked"] == 3
        await d.until(lambda: not d.held, "slots were not given back")
        await d.until(lambda: d.refused(frames.STALLED) == 1, "it was not counted")
        source.close()


def _is_writing(d: PeerNode) -> bool:
    return any(t.is_written for link in d.peers.arrivals._links for t in link._transfers.values())


async def test_late_bytes_go_nowhere(tmp_path: Path) -> None:
    """The rest of a block comes when its slot has been asked back; the slot's next owner is not disturbed."""
    async with node(tmp_path, "d", blocks=8, peer_s=WAIT_S) as d:
        await d.want("d", keys_of("raw", 3))

        def half() -> tuple[RawSource, bytes]:
            source = RawSource(d)
            keys = offered(source)
            whole = frame(source, keys, 0)
            source.channel.send(whole[:4000])
            return source, whole

        source, whole = await asyncio.to_thread(half)
        await d.until(lambda: _is_writing(d), "the block is not being read")
        await d.host.release("d")
        others = keys_of("b", 5)
        await d.fill(others)  # all the room there is beside the three slots
        await asyncio.to_thread(source.channel.send, whole[4000:])
        await d.until(lambda: d.refused(frames.LATE) == 1, "the late block was not dropped")
        await d.until(lambda: not d.held, "slots were not given back")
        held = await d.want("look", [*others, *keys_of("c", 3)])
        assert [d.reads(slot)[0] for slot in held.slots[:5]] == [content(key) for key in others]
        assert d.store.held_prefix(keys_of("raw", 1)) == 0
        await d.host.release("look")
        source.close()


# ---- the source's side -----------------------------------------------------------------------------------------


def _beat(name: str, address: str) -> object:
    from shared import wire

    return wire.Heartbeat(role="kv", id=name, incarnation="1", node=name, peer_address=address)


async def test_a_target_that_stops_reading_loses_its_link(tmp_path: Path) -> None:
    async with node(tmp_path, "p", blocks=1200, peer_s=SHORT_S) as p:
        deaf = RawTarget("d", small=True)
        keys = keys_of("raw", 1100)  # more than any buffer between the two
        await p.fill(keys)
        p.peers.directory.hear(_beat("d", deaf.address))

        def listen_and_stop() -> None:
            deaf.accept()
            deaf.say(Want(transfer=0, positions=list(range(1100))))

        listening = asyncio.create_task(asyncio.to_thread(listen_and_stop))
        await p.host.reserve(lease="p", request="r", keys=keys, write=True, ttl_s=9, push_node="d", push_lease="d")
        await listening
        assert (await p.host.wait("p", WAIT_S)).complete  # it was taken; what became of it decode will see
        await p.host.release("p")
        await p.until(lambda: p.failed(frames.STALLED) == 1, "the source waits for ever")
        await p.until(lambda: not p.held and p.peers.links == 0, f"{p.held} is kept")
        deaf.close()


@pytest.mark.parametrize("positions", [[0, 0], [7], [-1]])
async def test_a_target_that_wants_what_was_not_offered(tmp_path: Path, positions: list[int]) -> None:
    async with node(tmp_path, "p") as p:
        greedy = RawTarget("d")
        keys = keys_of("raw", 3)
        await p.fill(keys)
        p.peers.directory.hear(_beat("d", greedy.address))

        def listen() -> None:
            greedy.accept()
            greedy.say(Want(transfer=0, positions=positions))

        listening = asyncio.create_task(asyncio.to_thread(listen))
        await p.host.reserve(lease="p", request="r", keys=keys, write=True, ttl_s=9, push_node="d", push_lease="d")
        await listening
        assert not (await p.host.wait("p", WAIT_S)).complete
        assert p.failed(frames.MALFORMED) == 1
        await p.host.release("p")
        await p.until(lambda: not p.held, f"{p.held} is kept")
        greedy.close()


async def test_both_ends_stay_in_touch_while_nothing_is_sent(tmp_path: Path) -> None:
    """An idle link outlives many deadlines."""
    async with two_nodes(tmp_path, peer_s=0.2) as (p, d):
        keys = keys_of("a", 2)
        await d.want("d", keys)
        slots = await p.produce("p", keys, d, "d")
        await d.until(lambda: len(d.peers.arrivals) == 1, "the offer did not come")
        assert not (await d.host.wait("d", 1.0)).complete  # the prompt takes five deadlines to compute
        await p.write("p", slots, keys, 0, 1)
        assert (await d.host.wait("d", WAIT_S)).complete
        await p.host.release("p")
        await d.host.release("d")
