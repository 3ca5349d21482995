"""Two real stores: blocks go from node to node while they are computed, and whatever breaks, nothing wrong is read."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.kv_transfer.peers import frames
from shared import telemetry
from shared.errors import KvLost
from tests.support.peer_node import PeerNode, content, keys_of, node, two_nodes
from tests.support.tracing import watch_spans

WAIT_S = 30.0

Nodes = tuple[PeerNode, PeerNode]


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
async def ranked(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Nodes]:
    async with two_nodes(tmp_path, ranks=request.param) as nodes:
        yield nodes


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    async with two_nodes(tmp_path) as both:
        yield both


async def hand_over(p: PeerNode, d: PeerNode, keys: list[bytes], name: str) -> None:
    """A whole hand-off; what arrives is what was written."""
    await d.want(f"{name}-d", keys)
    slots = await p.produce(f"{name}-p", keys, d, f"{name}-d")
    await p.write(f"{name}-p", slots, keys, *(n for n, done in enumerate(slots.committed) if not done))
    assert (await p.host.wait(f"{name}-p", WAIT_S)).complete
    await p.host.release(f"{name}-p")
    ready = await d.host.wait(f"{name}-d", WAIT_S)
    assert ready.complete
    for key, slot in zip(keys, ready.slots, strict=True):
        assert d.reads(slot) == [content(key, rank) for rank in range(d.geometry.ranks)]
    await d.host.release(f"{name}-d")


async def test_blocks_go_as_they_are_committed(ranked: Nodes) -> None:
    p, d = ranked
    keys = keys_of("a", 5)
    await d.want("d", keys)
    slots = await p.produce("p", keys, d, "d")
    await p.write("p", slots, keys, 0, 1)
    await d.until(lambda: d.store.held_prefix(keys) == 2, "the first chunk did not come while the next is computed")
    assert not (await d.host.wait("d", 0)).complete
    await p.write("p", slots, keys, 2, 3, 4)
    ready = await d.host.wait("d", WAIT_S)
    assert ready.complete
    assert [d.reads(slot) for slot in ready.slots] == [
        [content(key, rank) for rank in range(d.geometry.ranks)] for key in keys
    ]
    assert (await p.host.wait("p", WAIT_S)).complete
    assert d.moved_blocks == 5
    await p.host.release("p")
    await d.host.release("d")


async def test_what_is_there_already_is_not_sent_and_what_prefill_holds_is_sent_at_once(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 6)
    await d.fill(keys[:2])
    await p.fill(keys[:4])
    await d.want("d", keys)
    slots = await p.produce("p", keys, d, "d")
    assert slots.committed == [True] * 4 + [False] * 2
    await d.until(lambda: d.store.held_prefix(keys) == 4, "prefill's own hits were not pushed")
    await p.write("p", slots, keys, 4, 5)
    assert (await d.host.wait("d", WAIT_S)).complete
    assert d.moved_blocks == 4
    await p.host.release("p")
    await d.host.release("d")
    await hand_over(p, d, keys, "again")
    assert d.moved_blocks == 4


async def test_a_lease_that_ends_after_its_last_commit_is_sent_all_the_same(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 8)
    await d.want("d", keys)
    slots = await p.produce("p", keys, d, "d")
    assert not (await p.host.wait("p", 0.01)).complete
    await d.until(lambda: len(d.peers.arrivals) == 1, "the offer did not come")
    await p.write("p", slots, keys, *range(8))
    await p.host.release("p")
    assert (await d.host.wait("d", WAIT_S)).complete
    await d.host.release("d")


async def test_another_worker_brings_the_rest_when_the_first_one_dies(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 4)
    await d.want("d", keys)
    waiting = asyncio.create_task(d.host.wait("d", WAIT_S))
    slots = await p.produce("first", keys, d, "d")
    await p.write("first", slots, keys, 0)
    await d.until(lambda: d.store.held_prefix(keys) == 1, "the first block did not come")
    await p.host.release("first")
    await d.until(lambda: not len(d.peers.arrivals), "the target was not told")
    assert not waiting.done()
    await hand_over(p, d, keys[:1] + keys_of("b", 1), "other")
    slots = await p.produce("second", keys, d, "d")
    await p.write("second", slots, keys, 1, 2, 3)
    assert (await waiting).complete
    await p.host.release("second")
    await d.host.release("d")


async def test_changed_bytes_are_noticed_and_nobody_waits_for_them(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 4)
    await p.fill(keys)
    held = await p.want("look", keys)
    p.ranks[0].slot_view(held.slots[2])[17] ^= 1
    await p.host.release("look")
    await d.want("d", keys)
    waiting = asyncio.create_task(d.host.wait("d", WAIT_S))
    await p.produce("p", keys, d, "d")
    ready = await waiting
    assert not ready.complete
    assert not ready.committed[2]
    assert ready.committed[:2] == [True, True]
    assert d.refused(frames.CHECKSUM) == d.failed(frames.CHECKSUM) == 1
    assert not d.store.holds(keys[2])
    await p.host.release("p")
    await d.host.release("d")
    await hand_over(p, d, keys_of("b", 3), "next")  # over the same link
    assert d.peers.links == 1


async def test_a_link_that_breaks_ends_the_wait_and_the_next_push_has_a_new_one(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 4)
    await d.want("d", keys)
    waiting = asyncio.create_task(d.host.wait("d", WAIT_S))
    slots = await p.produce("p", keys, d, "d")
    await p.write("p", slots, keys, 0)
    await d.until(lambda: d.store.held_prefix(keys) == 1, "the first block did not come")
    for link in list(d.peers.arrivals._links):
        link.close()
    ready = await waiting
    assert ready.committed == [True, False, False, False]
    await p.until(lambda: not len(p.peers.pushes), "the source did not notice")
    await p.write("p", slots, keys, 1, 2, 3)
    assert (await p.host.wait("p", WAIT_S)).complete, "the job has done its part; decode computes the rest"
    await p.host.release("p")
    await d.host.release("d")
    with pytest.raises(KvLost, match="could not be reached"):
        await p.produce("soon", keys, d, "d")
    await p.until(lambda: _reachable(p, d), "the source rests for ever")
    await hand_over(p, d, keys_of("b", 3), "next")


def _reachable(p: PeerNode, d: PeerNode) -> bool:
    try:
        p.peers.pushes.check(d.node)
    except KvLost:
        return False
    return True


async def test_a_request_that_ends_stops_its_transfer(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 4)
    await d.want("d", keys)
    slots = await p.produce("p", keys, d, "d")
    await p.write("p", slots, keys, 0)
    await d.until(lambda: d.store.held_prefix(keys) == 1, "the first block did not come")
    await d.host.release("d")
    await d.until(lambda: not d.held, "slots are kept for nobody")
    await p.until(lambda: not len(p.peers.pushes), "the source goes on")
    await p.write("p", slots, keys, 1, 2, 3)
    await p.host.release("p")
    assert d.store.held_prefix(keys) == 1


async def test_an_offer_for_nobody_moves_the_job(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 2)
    slots = await p.produce("p", keys, d, "no such lease")
    await p.write("p", slots, keys, 0, 1)
    assert not (await p.host.wait("p", WAIT_S)).complete
    assert d.refused(frames.LEASE) == 1
    await p.host.release("p")
    await d.want("d", keys)
    slots = await p.produce("other", [*keys, *keys_of("b", 1)], d, "d")
    assert not (await p.host.wait("other", WAIT_S)).complete
    assert d.refused(frames.KEY) == 1
    await p.host.release("other")
    await d.host.release("d")
    assert d.moved_blocks == 0


async def test_a_full_arena_refuses_what_it_has_no_room_for(tmp_path: Path) -> None:
    async with two_nodes(tmp_path, blocks=8) as (p, d):
        keys = keys_of("a", 4)
        await d.want("d", keys)
        first = await p.produce("first", keys, d, "d")
        await d.until(lambda: len(d.peers.arrivals) == 1, "the first offer did not come")
        await d.want("rest", keys_of("b", 4))
        await p.produce("second", keys[:3], d, "d")  # the slots set aside are the first one's
        assert not (await p.host.wait("second", WAIT_S)).complete
        assert d.refused(frames.MEMORY) == 1
        await p.write("first", first, keys, *range(4))
        assert (await d.host.wait("d", WAIT_S)).complete
        for one, lease in ((p, "first"), (p, "second"), (d, "d"), (d, "rest")):
            await one.host.release(lease)


async def test_unlike_engines_exchange_nothing(tmp_path: Path) -> None:
    async with node(tmp_path, "p") as p, node(tmp_path, "d", fingerprint="0" * 64) as d:
        p.knows(d)
        keys = keys_of("a", 2)
        await d.want("d", keys)
        await p.produce("p", keys, d, "d")
        assert not (await p.host.wait("p", WAIT_S)).complete
        assert d.refused(frames.FINGERPRINT) == 1
        assert d.moved_blocks == 0
        await p.host.release("p")
        await d.host.release("d")


async def test_a_node_that_nobody_knows_or_reaches(tmp_path: Path) -> None:
    async with two_nodes(tmp_path) as (p, d):
        keys = keys_of("a", 2)
        await d.want("d", keys)
        with pytest.raises(KvLost, match="no store of nowhere"):
            await p.host.reserve(
                lease="x", request="r", keys=keys, write=True, ttl_s=9, push_node="nowhere", push_lease="d"
            )
        p.knows(d, "127.0.0.1:1")
        await p.produce("p", keys, d, "d")
        assert not (await p.host.wait("p", WAIT_S)).complete
        p.knows(d)  # at another address: no rest for that one
        await p.host.release("p")
        await hand_over(p, d, keys_of("b", 2), "next")
        await d.host.release("d")


async def test_blocks_are_fetched_by_whoever_lacks_them(nodes: Nodes) -> None:
    p, d = nodes
    keys = keys_of("a", 5)
    await p.fill(keys[:3])
    await d.want("d", keys)
    assert p.peers.pushes.fetch("d", "d", keys) == 3
    await d.until(lambda: d.store.held_prefix(keys) == 3, "they did not come")
    assert p.peers.pushes.fetch("d", "d", keys_of("b", 1)) == 0
    await d.host.release("d")


async def test_a_push_is_one_span_of_its_request(nodes: Nodes) -> None:
    p, d = nodes
    seen = watch_spans()
    with telemetry.tracer().start_as_current_span("parent") as parent:
        traceparent = telemetry.traceparent()
    keys = keys_of("a", 3)
    await d.want("d", keys)
    slots = await p.host.reserve(
        lease="p",
        request="r",
        keys=keys,
        write=True,
        ttl_s=9,
        push_node="d",
        push_lease="d",
        traceparent=traceparent,
    )
    await p.write("p", slots, keys, 0, 1, 2)
    assert (await d.host.wait("d", WAIT_S)).complete
    await p.host.release("p")
    await p.until(lambda: not len(p.peers.pushes), "the push has no end")
    await d.host.release("d")
    (push,) = [span for span in seen.get_finished_spans() if span.name == telemetry.KV_PUSH]
    size_bytes = 3 * p.geometry.slot_bytes
    assert dict(push.attributes) == {"blocks": 3, "bytes": size_bytes, "path": "peer", "node": "d"}
    assert push.context.trace_id == parent.get_span_context().trace_id


async def test_many_hand_offs_at_once(tmp_path: Path) -> None:
    async with two_nodes(tmp_path, blocks=200) as (p, d):
        await asyncio.gather(*(hand_over(p, d, keys_of(f"prompt{n}", 5 + n % 3), f"n{n}") for n in range(20)))
        assert d.moved_blocks == sum(5 + n % 3 for n in range(20))
        assert p.metric("baton_kv_failed_transfers_total") == 0
        assert p.peers.links == d.peers.links == 1
