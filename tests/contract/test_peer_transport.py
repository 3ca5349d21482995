"""What any transport between stores must do (services/kv_transfer/peers/transport.py), in memory and over TCP."""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.kv_transfer.peers.channel import Secure, plain
from services.kv_transfer.peers.frames import CHECKSUM
from services.kv_transfer.peers.handshake import Identity
from services.kv_transfer.peers.secure import mutual
from services.kv_transfer.peers.tcp import TcpTransport
from services.kv_transfer.peers.transport import Outgoing, Transport
from shared.tls import Tls
from tests.support.certificates import Authority
from tests.support.memory_transport import Exchange, MemoryTransport
from tests.support.peer_ears import Source, Target_, block_of, content_of, offer_of

LIMIT_S = 5.0


@dataclass
class Pair:
    source: Source
    target: Target_
    sender: Transport
    receiver: Transport
    link: Outgoing


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    own = authority.sign("any.store")
    return Tls(ca=authority.ca, cert=own.cert, key=own.key)


@pytest.fixture(params=["memory", "tcp", "tls"])
async def pair(request: pytest.FixtureRequest, tls: Tls) -> AsyncIterator[Pair]:
    source, target, nobody = Source(), Target_(), Target_()
    sender: Transport
    receiver: Transport
    if request.param == "memory":
        exchange = Exchange()
        sender, receiver = MemoryTransport(exchange, "p", nobody), MemoryTransport(exchange, "d", target)
    else:
        secure = mutual(tls, LIMIT_S) if request.param == "tls" else plain
        sender, receiver = tcp("p", nobody, secure), tcp("d", target, secure)
    link = sender.connect("d", receiver.address, source)
    yield Pair(source, target, sender, receiver, link)
    await sender.close()
    await receiver.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("push-", "peer", "heard-"))]
    for thread in threading.enumerate():
        if thread.name == "sealed":  # nobody waits for it: it ends when it hears that its link has
            await asyncio.to_thread(thread.join, LIMIT_S)
            assert not thread.is_alive()


def tcp(node: str, ear: Target_, secure: Secure = plain) -> TcpTransport:
    own = Identity(cluster="c", node=node, secret="s")  # noqa: S106
    transport = TcpTransport(own, ear, limit_s=LIMIT_S, refused=lambda _: None, secure=secure)
    transport.listen("127.0.0.1", 0)
    return transport


@pytest.mark.parametrize("ranks", [1, 2])
async def test_blocks_land_in_the_memory_given_for_them(pair: Pair, ranks: int) -> None:
    pair.target.choose = lambda _: [3, 0]
    pair.link.offer(offer_of(0, 5, ranks=ranks))
    await pair.source.until(lambda: 0 in pair.source.wants)
    assert sorted(pair.source.wants[0]) == [0, 3]
    pair.link.send([block_of(0, position, ranks=ranks) for position in (0, 3)])
    await pair.target.until(lambda: len(pair.target.blocks) == 2)
    await pair.source.until(lambda: len(pair.source.done) == 2)
    assert {block.position for block in pair.target.blocks} == {0, 3}
    assert all(len(block.checksums) == ranks for block in pair.target.blocks)
    assert all(bytes(memory) == content_of(*where) for where, memory in pair.target.memory.items())
    pair.target.links[0].end(0, "")
    await pair.source.until(lambda: pair.source.ends == {0: ""})


async def test_what_is_not_what_was_sent_is_told_and_does_not_arrive(pair: Pair) -> None:
    pair.link.offer(offer_of(0, 2))
    await pair.source.until(lambda: 0 in pair.source.wants)
    right = block_of(0, 1)
    pair.link.send([right._replace(position=0), block_of(0, 0)._replace(position=1, checksum=7)])
    await pair.target.until(lambda: bool(pair.target.spoils) and bool(pair.target.blocks))
    assert pair.target.spoils == [(0, CHECKSUM)]
    assert [block.position for block in pair.target.blocks] == [0]  # its bytes are what its checksum says


async def test_transfers_go_in_turns(pair: Pair) -> None:
    for transfer in range(3):
        pair.link.offer(offer_of(transfer, 40))
    await pair.source.until(lambda: len(pair.source.wants) == 3)
    pair.link.send([block_of(transfer, position) for transfer in range(3) for position in range(40)])
    await pair.target.until(lambda: len(pair.target.blocks) == 120)
    half = Counter(block.transfer for block in pair.target.blocks[:60])
    assert all(10 <= half[transfer] <= 30 for transfer in range(3)), half


async def test_nothing_lands_after_a_withdrawal(pair: Pair) -> None:
    for transfer in range(2):
        pair.link.offer(offer_of(transfer, 4))
    await pair.source.until(lambda: len(pair.source.wants) == 2)
    assert pair.target.links[0].withdraw(0)
    pair.link.send([block_of(0, position) for position in range(4)])
    pair.link.send([block_of(1, position) for position in range(4)])
    await pair.target.until(lambda: len(pair.target.blocks) == 4)
    assert {block.transfer for block in pair.target.blocks} == {1}
    assert not any(any(memory) for (transfer, _), memory in pair.target.memory.items() if transfer == 0)


async def test_nothing_lands_in_memory_that_has_another_owner(pair: Pair) -> None:
    pair.link.offer(offer_of(0, 1))
    await pair.source.until(lambda: 0 in pair.source.wants)
    pair.target.is_held = False
    pair.link.send([block_of(0, 0)])
    await pair.source.until(lambda: len(pair.source.done) == 1)
    pair.link.offer(offer_of(1, 1))  # behind it on the same way
    await pair.target.until(lambda: len(pair.target.offers) == 2)
    assert not pair.target.blocks
    assert not any(pair.target.memory[0, 0])


async def test_a_stopped_transfer_gives_its_memory_back(pair: Pair) -> None:
    pair.link.offer(offer_of(0, 30))
    await pair.source.until(lambda: 0 in pair.source.wants)
    blocks = [block_of(0, position) for position in range(30)]
    pair.link.send(blocks)
    pair.link.stop(0, lost=True)
    await pair.target.until(lambda: bool(pair.target.stops))
    await pair.source.until(lambda: len(pair.source.done) == 30)
    assert pair.target.stops == [(0, True)]
    assert {block.position for block in pair.source.done} == set(range(30))


@pytest.mark.parametrize("who", ["source", "target"])
async def test_a_closed_link_is_told_once_at_both_ends(pair: Pair, who: str) -> None:
    pair.link.offer(offer_of(0, 1))
    await pair.source.until(lambda: 0 in pair.source.wants)
    if who == "source":
        pair.link.close()
    else:
        pair.target.links[0].close()
    await pair.source.until(lambda: bool(pair.source.losses))
    await pair.target.until(lambda: bool(pair.target.losses))
    pair.link.send([block_of(0, 0)])
    assert len(pair.source.losses) == len(pair.target.losses) == 1
    assert not pair.target.blocks


async def test_where_nobody_is_there_is_no_link(pair: Pair) -> None:
    ear = Source()
    gone = pair.receiver.address
    await pair.receiver.close()
    link = pair.sender.connect("d", gone, ear)
    link.offer(offer_of(0, 1))
    await ear.until(lambda: bool(ear.losses))
    assert not ear.wants


async def test_a_peer_of_another_authority_is_not_heard(tls: Tls, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "stranger")
    own = stranger.sign("any.store")
    target = Target_()
    receiver = tcp("d", target, mutual(tls, LIMIT_S))
    for secure in (
        plain,
        mutual(Tls(ca=tls.ca, cert=own.cert, key=own.key), LIMIT_S),
        mutual(Tls(ca=stranger.ca, cert=tls.cert, key=tls.key), LIMIT_S),
    ):
        source, sender = Source(), tcp("p", Target_(), secure)
        sender.connect("d", receiver.address, source)
        await source.until(lambda source=source: bool(source.losses))
        await sender.close()
    await receiver.close()
    assert target.links == []
