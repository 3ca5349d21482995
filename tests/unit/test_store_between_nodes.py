"""What the store promises to links with other nodes: what is sent stays, what is hopeless is not waited for."""

import pytest

from services.kv_transfer.leases import PushBegun, PushReady
from shared.errors import KvMemory, KvMismatch
from shared.kv.messages import Ready, Wait
from tests.unit.test_store import answers, commit, fill, geometry, join, keys, leave, make_store, reserve, states


def wait(store, worker: str, lease: str, ticket: str = "t") -> Ready | None:
    return store.wait(worker, Wait(lease=lease, timeout_s=50.0), ticket, 0.0)


def test_a_block_that_is_being_sent_is_not_evicted() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "a", keys("a1", "a2", "a3", "a4"))
    block = store.lend(keys("a1")[0])
    assert block is not None
    assert store.lend(keys("nobody's")[0]) is None
    with pytest.raises(KvMemory):
        reserve(store, "p", "b", keys("b1", "b2", "b3", "b4"))
    reserve(store, "p", "b", keys("b1", "b2", "b3"))
    assert store.holds(keys("a1")[0])
    assert states(store) == {"reserved": 3, "pinned": 1}
    store.give_back(block, 0.0)
    assert states(store) == {"reserved": 3, "cached": 1}


def test_who_waits_for_room_gets_what_was_being_sent() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "a", keys("a1", "a2", "a3", "a4"))
    block = store.lend(keys("a1")[0])
    assert reserve(store, "p", "b", keys("b1", "b2", "b3", "b4"), wait_s=9.0) is None
    store.give_back(block, 1.0)
    assert "ticket-b" in answers(store)


def test_another_geometry_waits_until_nothing_is_sent() -> None:
    store = make_store(workers=("p",))
    fill(store, "p", "a", keys("a1"))
    block = store.lend(keys("a1")[0])
    leave(store, "p")
    with pytest.raises(KvMismatch):
        join(store, "q", shape=geometry(fingerprint="0" * 64))
    store.give_back(block, 0.0)
    join(store, "q", shape=geometry(fingerprint="0" * 64))


def test_another_geometry_waits_until_a_guest_writes_nothing() -> None:
    store = make_store(workers=("d",))
    store.sessions.admit("guest")
    reserve(store, "guest", "g", keys("a1"))
    leave(store, "d")
    with pytest.raises(KvMismatch):
        join(store, "q", shape=geometry(fingerprint="0" * 64))
    store.release("g", 0.0)
    with pytest.raises(KvMismatch):  # asked back, and not given back yet
        join(store, "q", shape=geometry(fingerprint="0" * 64))
    store.revoked("guest", 0, "g", 0.0)
    join(store, "q", shape=geometry(fingerprint="0" * 64))
    store.sessions.dismiss("guest")


def test_a_push_is_told_of_and_complete_when_it_was_taken() -> None:
    store = make_store()
    fill(store, "p", "before", keys("a1"))
    store.take_events()
    reserve(store, "p", "a", keys("a1", "a2"), push_node="n", push_lease="d")
    assert PushBegun("a") in store.take_events()
    commit(store, "p", "a", 1)
    assert PushReady("a", 1) in store.take_events()
    assert wait(store, "p", "a") is None
    store.offered("a")
    assert answers(store)["t"].complete


def test_a_push_that_nobody_took_is_not_complete() -> None:
    store = make_store()
    reserve(store, "p", "a", keys("a1"), push_node="n", push_lease="d")
    commit(store, "p", "a", 0)
    assert wait(store, "p", "a") is None
    store.give_up("a")
    assert not answers(store)["t"].complete


def test_a_hopeless_wait_ends_with_what_there_is_also_when_it_begins_later() -> None:
    store = make_store()
    fill(store, "p", "a", keys("a1"))
    reserve(store, "d", "w", keys("a1", "a2"), write=False)
    assert wait(store, "d", "w") is None
    store.give_up("w")
    assert answers(store)["t"].committed == [True, False]
    late = wait(store, "d", "w", "later")
    assert late is not None
    assert not late.complete
    store.hope("w")
    assert wait(store, "d", "w", "again") is None
    for nobody in (store.give_up, store.hope, store.offered):
        nobody("no such lease")
