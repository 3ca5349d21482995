"""The store's rules one by one: what each call gives, and who has the blocks afterwards."""

from typing import Any

import pytest

from services.kv_transfer.leases import Answered, ArenaCut, Bound, Evicted, HostClosed, RevokeAsked, SessionUnhealthy
from services.kv_transfer.slots import PAGE_BYTES, WORD_BYTES
from services.kv_transfer.store import KEEP_TTL_S, MAX_QUEUED, Store
from shared.errors import InvalidRequest, KvLost, KvMemory, KvMismatch
from shared.kv.messages import Attach, Commit, Geometry, Keep, Ready, Reserve, Reserved, Wait

SLOT_BYTES = 4096


def geometry(ranks: int = 1, **changes: Any) -> Geometry:
    values = {
        "fingerprint": "f" * 64,
        "block_size": 16,
        "slot_bytes": SLOT_BYTES,
        "ranks": ranks,
        "max_model_len": 32,
        **changes,
    }
    return Geometry(**values)


def make_store(blocks: int = 4, ranks: int = 1, workers: tuple[str, ...] = ("p", "d")) -> Store:
    """A store with these workers attached completely; session and worker have the same name."""
    store = Store("node-0", PAGE_BYTES + blocks * ranks * (SLOT_BYTES + WORD_BYTES), lambda layout: [0] * layout.slots)
    for worker in workers:
        join(store, worker, ranks)
    store.take_events()
    return store


def join(store: Store, worker: str, ranks: int = 1, shape: Geometry | None = None) -> None:
    for rank in range(ranks):
        for kind in ("rank", "watch"):
            store.attach(Attach(session=worker, kind=kind, worker=worker, rank=rank, geometry=shape or geometry(ranks)))
    store.attach(Attach(session=worker, kind="host", worker=worker))


def leave(store: Store, worker: str, kinds: tuple[str, ...] = ("host", "rank", "watch"), now: float = 0.0) -> None:
    for kind in kinds:
        store.detach(worker, kind, 0, now)


def keys(*names: str) -> list[bytes]:
    return [name.encode().ljust(16, b".") for name in names]


def reserve(
    store: Store, worker: str, lease: str, names: list[bytes], now: float = 0.0, *, write: bool = True, **extra: Any
) -> Reserved | None:
    values = {"ttl_s": 100.0, **extra}
    return store.reserve(
        worker, Reserve(lease=lease, request="r", keys=names, write=write, **values), f"ticket-{lease}", now
    )


def commit(store: Store, worker: str, lease: str, *positions: int, rank: int = 0) -> int:
    return store.commit(
        worker, rank, Commit(lease=lease, blocks=list(positions), checksums=[7] * len(positions)), now=0.0
    )


def fill(store: Store, worker: str, lease: str, names: list[bytes]) -> None:
    """Leave these keys cached."""
    reserve(store, worker, lease, names)
    commit(store, worker, lease, *range(len(names)))
    store.release(lease, 0.0)


def fill_ranks(store: Store, worker: str, lease: str, names: list[bytes]) -> None:
    reserve(store, worker, lease, names)
    for rank in range(2):
        commit(store, worker, lease, *range(len(names)), rank=rank)
    store.release(lease, 0.0)


def states(store: Store) -> dict[str, int]:
    return {state: count for state, count in store.counts().items() if count}


def answers(store: Store) -> dict[Any, Any]:
    return {event.ticket: event.answer for event in store.take_events() if isinstance(event, Answered)}


def keep(store: Store, worker: str, lease: str, names: list[bytes], now: float = 0.0) -> Reserved:
    return store.keep(worker, Keep(lease=lease, request="r", keys=names), now)


# ---- reserving ------------------------------------------------------------------------------------------------


def test_reserve_is_all_or_none() -> None:
    store = make_store(blocks=4)
    assert reserve(store, "p", "a", keys("1", "2", "3")) is not None
    with pytest.raises(KvMemory):
        reserve(store, "p", "b", keys("4", "5"))
    assert states(store) == {"reserved": 3, "free": 1}


def test_more_keys_than_the_arena_has_blocks_are_refused_at_once_although_waiting_was_offered() -> None:
    store = make_store(blocks=4)
    with pytest.raises(KvMemory, match="never fit"):
        reserve(store, "p", "a", keys("1", "2", "3", "4", "5"), wait_s=10)


def test_hits_are_pinned_and_not_evicted_to_make_room_for_the_rest_of_the_same_call() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "a", keys("1", "2", "3", "4"))
    answer = reserve(store, "p", "b", keys("1", "x", "y", "z"))
    assert answer is not None
    assert answer.committed == [True, False, False, False]
    assert states(store) == {"pinned": 1, "reserved": 3}
    assert store.held_prefix(keys("1", "2")) == 1
    assert store.evicted_blocks == 3


def test_eviction_takes_the_least_recently_used_and_of_one_prompt_its_end_first() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "a", keys("1", "2"))
    fill(store, "p", "b", keys("3", "4"))
    fill(store, "p", "c", keys("1", "2"))  # used again
    store.take_events()
    reserve(store, "p", "d", keys("x", "y", "z"))
    assert [event.key for event in store.take_events() if isinstance(event, Evicted)] == keys("4", "3", "2")


def test_a_set_aside_slot_is_not_shown_and_a_private_one_is() -> None:
    store = make_store(blocks=4)
    waiting = reserve(store, "d", "w", keys("1"), write=False)
    writing = reserve(store, "p", "x", keys("2"))
    assert waiting == Reserved(slots=[-1], words=[0], committed=[False])
    assert writing is not None
    assert writing.slots[0] >= 0
    assert writing.words[0] & 1 == 0


def test_a_reservation_waits_in_line_for_room_and_holds_nothing_meanwhile() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "old", keys("1"))
    reserve(store, "p", "a", keys("2", "3", "4"))
    assert reserve(store, "d", "first", keys("1", "5", "6"), wait_s=10) is None
    assert reserve(store, "d", "second", keys("7"), wait_s=10) is None  # would fit, but is behind
    assert states(store) == {"reserved": 3, "cached": 1}
    commit(store, "p", "a", 0, 1, 2)
    store.release("a", 0.0)
    granted = answers(store)
    assert granted["ticket-first"].committed == [True, False, False]
    assert granted["ticket-second"].committed == [False]


def test_without_new_slots_a_reservation_is_granted_past_the_line() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "old", keys("1"))
    reserve(store, "p", "a", keys("2", "3", "4"))
    assert reserve(store, "d", "first", keys("5", "6"), wait_s=10) is None
    assert reserve(store, "d", "hit", keys("1")) is not None


def test_no_room_until_the_deadline_is_kv_memory() -> None:
    store = make_store(blocks=4)
    reserve(store, "p", "a", keys("1", "2", "3", "4"))
    reserve(store, "d", "b", keys("5"), wait_s=2, now=10.0)
    assert store.next_deadline() == 12.0
    store.advance(11.9)
    assert answers(store) == {}
    store.advance(12.0)
    assert isinstance(answers(store)["ticket-b"], KvMemory)


def test_the_line_has_a_limit() -> None:
    store = make_store(blocks=4)
    reserve(store, "p", "a", keys("1", "2", "3", "4"))
    for number in range(MAX_QUEUED):
        reserve(store, "d", f"q{number}", keys("5"), wait_s=10)
    with pytest.raises(KvMemory):
        reserve(store, "d", "one too many", keys("5"), wait_s=10)


def test_releasing_a_waiting_reservation_answers_it() -> None:
    store = make_store(blocks=4)
    reserve(store, "p", "a", keys("1", "2", "3", "4"))
    reserve(store, "d", "b", keys("5"), wait_s=10)
    store.release("b", 0.0, "d")
    assert isinstance(answers(store)["ticket-b"], KvLost)
    assert store.gauges()["queued"] == 0


@pytest.mark.parametrize(
    "bad",
    [
        {"names": []},
        {"names": keys("1", "1")},
        {"ttl_s": 0.0},
        {"ttl_s": float("nan")},
        {"ttl_s": float("inf")},
        {"wait_s": float("nan")},
        {"wait_s": -1.0},
        {"lease": ""},
        {"lease": "x" * 1000},
        {"lease": "taken"},
    ],
)
def test_bad_reservations_are_refused_and_change_nothing(bad: dict[str, Any]) -> None:
    store = make_store()
    reserve(store, "p", "taken", keys("0"))
    before = store.counts(), store.gauges()
    call = {"lease": "a", "names": keys("1"), **bad}
    with pytest.raises(InvalidRequest):
        reserve(store, "p", call.pop("lease"), call.pop("names"), **call)
    assert (store.counts(), store.gauges()) == before


# ---- committing -----------------------------------------------------------------------------------------------


def test_a_block_is_committed_when_all_ranks_have_written() -> None:
    store = make_store(blocks=4, ranks=2, workers=("p",))
    answer = reserve(store, "p", "a", keys("1"))
    assert answer is not None
    assert commit(store, "p", "a", 0, rank=0) == 1
    assert commit(store, "p", "a", 0, rank=0) == 0  # twice by the same rank is once
    assert store.held_prefix(keys("1")) == 0
    assert commit(store, "p", "a", 0, rank=1) == 1
    assert store.held_prefix(keys("1")) == 1
    assert states(store) == {"pinned": 2, "free": 6}
    assert store.blocks is not None
    assert store.blocks.word(answer.slots[0] // 2) == answer.words[0] | 1
    assert store.written_bytes == 2 * SLOT_BYTES


def test_what_is_kept_is_written_by_every_rank_and_then_nobodys() -> None:
    store = make_store(blocks=4, ranks=2)
    fill_ranks(store, "p", "a", keys("1"))
    first, second = (keep(store, "d", "k", keys("1", "2", "3")) for _ in range(2))
    assert first == second
    assert first.committed == [True, False, False]
    assert commit(store, "d", "k", 1, 2, rank=0) == 2
    assert states(store) == {"pinned": 2, "reserved": 4, "free": 2}
    assert commit(store, "d", "k", 1, 2, rank=1) == 2
    assert states(store) == {"cached": 6, "free": 2}
    assert store.held_prefix(keys("1", "2", "3")) == 3
    assert (store.kept_blocks, store.unkept_blocks, store.gauges()["leases"]) == (2, 0, 0)


def test_what_is_there_already_is_kept_without_a_lease() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "a", keys("1", "2"))
    assert keep(store, "d", "k", keys("1", "2")).committed == [True, True]
    assert states(store) == {"cached": 2, "free": 2}


def test_keeping_takes_no_room_that_is_held_or_waited_for() -> None:
    store = make_store(blocks=4)
    reserve(store, "p", "a", keys("1", "2", "3"))
    with pytest.raises(KvMemory):
        keep(store, "d", "k", keys("x", "y"))
    assert reserve(store, "p", "b", keys("4", "5"), wait_s=10) is None
    with pytest.raises(KvMemory):
        keep(store, "d", "l", keys("x"))
    assert store.unkept_blocks == 3
    store.release("a", 0.0)
    store.revoked("p", 0, "a", 0.0)
    assert keep(store, "d", "m", keys("x")).committed == [False]


def test_what_a_rank_does_not_finish_to_keep_is_given_back() -> None:
    store = make_store(blocks=4)
    keep(store, "d", "k", keys("1", "2"))
    commit(store, "d", "k", 0)
    store.advance(KEEP_TTL_S)
    assert states(store) == {"revoked": 1, "cached": 1, "free": 2}
    store.revoked("d", 0, "k", KEEP_TTL_S)
    assert states(store) == {"cached": 1, "free": 3}


def test_a_lease_is_kept_by_its_own_worker_and_only_as_such() -> None:
    store = make_store(blocks=4)
    keep(store, "d", "k", keys("1"))
    reserve(store, "p", "r", keys("2"))
    for worker, lease in (("p", "k"), ("p", "r")):
        with pytest.raises(InvalidRequest):
            keep(store, worker, lease, keys("1"))
    leave(store, "d", kinds=("host",))
    with pytest.raises(KvLost):
        keep(store, "d", "l", keys("1"))


def test_the_second_writer_of_a_key_gets_the_first_ones_slot() -> None:
    store = make_store(blocks=4)
    first = reserve(store, "p", "a", keys("1"))
    second = reserve(store, "d", "b", keys("1"))
    assert first is not None
    assert second is not None
    assert first.slots != second.slots
    commit(store, "p", "a", 0)
    commit(store, "d", "b", 0)
    assert states(store) == {"pinned": 1, "free": 3}
    ready = store.wait("d", Wait(lease="b", timeout_s=0), "t", 0.0)
    assert ready is not None
    assert ready.slots == first.slots


def test_generations_never_repeat_for_a_slot() -> None:
    store = make_store(blocks=4)
    seen = set()
    for number in range(20):
        answer = reserve(store, "p", f"a{number}", keys(f"k{number}"))
        assert answer is not None
        assert (answer.slots[0], answer.words[0]) not in seen
        seen.add((answer.slots[0], answer.words[0]))
        commit(store, "p", f"a{number}", 0)
        store.release(f"a{number}", 0.0)


@pytest.mark.parametrize(
    ("lease", "worker", "error"), [("gone", "p", KvLost), ("a", "d", KvLost), ("waiting", "d", InvalidRequest)]
)
def test_commits_that_nobody_may_make(lease: str, worker: str, error: type[Exception]) -> None:
    store = make_store()
    reserve(store, "p", "a", keys("1"))
    reserve(store, "d", "waiting", keys("1"), write=False)
    with pytest.raises(error):
        commit(store, worker, lease, 0)


@pytest.mark.parametrize(
    ("positions", "checksums"), [([1], [0]), ([-1], [0]), ([0], []), ([0], [1 << 64]), ([0, 5], [1, 1])]
)
def test_a_bad_commit_commits_nothing(positions: list[int], checksums: list[int]) -> None:
    store = make_store()
    reserve(store, "p", "a", keys("1"))
    with pytest.raises(InvalidRequest):
        store.commit("p", 0, Commit(lease="a", blocks=positions, checksums=checksums), 0.0)
    assert store.held_prefix(keys("1")) == 0


# ---- waiting for another's blocks -----------------------------------------------------------------------------


def test_the_hand_off_needs_the_blocks_of_one_prompt_only() -> None:
    store = make_store(blocks=4)
    prompt = keys("1", "2", "3", "4")
    reserve(store, "d", "decode", prompt, write=False)
    assert store.wait("d", Wait(lease="decode", timeout_s=5), "wait", 0.0) is None
    taken = reserve(store, "p", "prefill", prompt, take_from="decode")
    assert taken is not None
    assert states(store) == {"reserved": 4}
    commit(store, "p", "prefill", 0, 1)
    assert answers(store) == {}
    commit(store, "p", "prefill", 2, 3)
    ready = answers(store)["wait"]
    assert ready == Ready(
        slots=taken.slots, words=[word | 1 for word in taken.words], committed=[True] * 4, complete=True
    )
    store.release("prefill", 0.0)
    assert states(store) == {"pinned": 4}
    store.release("decode", 0.0)
    assert states(store) == {"cached": 4}


def test_a_commit_by_a_stranger_frees_what_was_set_aside() -> None:
    store = make_store(blocks=4)
    reserve(store, "d", "decode", keys("1"), write=False)
    reserve(store, "p", "prefill", keys("1"))
    assert states(store) == {"reserved": 2, "free": 2}
    commit(store, "p", "prefill", 0)
    assert states(store) == {"pinned": 1, "free": 3}


def test_a_wait_ends_at_its_timeout_with_what_there_is() -> None:
    store = make_store(blocks=4)
    reserve(store, "d", "decode", keys("1", "2"), write=False)
    store.wait("d", Wait(lease="decode", timeout_s=3), "wait", 1.0)
    reserve(store, "p", "prefill", keys("1", "2"), take_from="decode")
    commit(store, "p", "prefill", 0)
    store.advance(4.0)
    ready = answers(store)["wait"]
    assert ready.committed == [True, False]
    assert ready.slots[1] == -1
    assert not ready.complete
    assert store.gauges()["waits"] == 0


def test_a_wait_fails_when_its_lease_ends_first() -> None:
    store = make_store()
    reserve(store, "d", "decode", keys("1"), write=False, ttl_s=2.0)
    store.wait("d", Wait(lease="decode", timeout_s=30), "wait", 0.0)
    store.advance(2.0)
    assert isinstance(answers(store)["wait"], KvLost)


def test_a_slot_that_was_taken_goes_back_after_the_revoke_so_that_another_worker_can_retry() -> None:
    store = make_store(blocks=4, workers=("p", "d", "p2"))
    prompt = keys("1", "2", "3", "4")
    reserve(store, "d", "decode", prompt, write=False)
    first = reserve(store, "p", "try-1", prompt, take_from="decode")
    commit(store, "p", "try-1", 0)
    store.release("try-1", 0.0)
    assert states(store) == {"pinned": 1, "revoked": 3}
    assert reserve(store, "p2", "try-2", prompt, take_from="decode", wait_s=5) is None
    store.revoked("p", 0, "try-1", 0.0)
    second = answers(store)["ticket-try-2"]
    assert second.committed == [True, False, False, False]
    assert first is not None
    assert sorted(second.slots) == sorted(first.slots)
    assert not set(second.words[1:]) & set(first.words)
    commit(store, "p2", "try-2", 1, 2, 3)
    assert states(store) == {"pinned": 4}


def test_a_slot_that_was_taken_is_freed_when_its_claimant_has_gone() -> None:
    store = make_store(blocks=4)
    reserve(store, "d", "decode", keys("1"), write=False)
    reserve(store, "p", "prefill", keys("1"), take_from="decode")
    store.release("decode", 0.0)
    assert states(store) == {"reserved": 1, "free": 3}
    store.release("prefill", 0.0)
    store.revoked("p", 0, "prefill", 0.0)
    assert states(store) == {"free": 4}


def test_a_slot_that_is_being_written_is_not_taken_by_a_second_writer() -> None:
    store = make_store(blocks=4, workers=("p", "d", "p2"))
    reserve(store, "d", "decode", keys("1"), write=False)
    one = reserve(store, "p", "one", keys("1"), take_from="decode")
    two = reserve(store, "p2", "two", keys("1"), take_from="decode")
    assert one is not None
    assert two is not None
    assert one.slots != two.slots


def test_what_was_taken_is_freed_when_somebody_else_commits_the_key_first() -> None:
    store = make_store(blocks=4, workers=("p", "d", "q"))
    reserve(store, "d", "decode", keys("1"), write=False)
    reserve(store, "p", "taker", keys("1"), take_from="decode")
    fill(store, "q", "stranger", keys("1"))
    store.release("taker", 0.0)
    store.revoked("p", 0, "taker", 0.0)
    assert states(store) == {"pinned": 1, "free": 3}
    store.release("decode", 0.0)
    assert states(store) == {"cached": 1, "free": 3}


def test_the_second_writers_pin_outlives_the_first_ones() -> None:
    store = make_store(blocks=4)
    reserve(store, "p", "a", keys("1"))
    reserve(store, "d", "b", keys("1"))
    commit(store, "p", "a", 0)
    commit(store, "d", "b", 0)
    store.release("a", 0.0)
    assert states(store) == {"pinned": 1, "free": 3}
    store.release("b", 0.0)
    assert states(store) == {"cached": 1, "free": 3}


def test_hits_in_the_cache_are_no_room_for_the_rest_of_the_same_call() -> None:
    store = make_store(blocks=4)
    fill(store, "p", "a", keys("1", "2"))
    reserve(store, "p", "b", keys("3"))
    with pytest.raises(KvMemory):
        reserve(store, "d", "c", keys("1", "2", "x", "y"))
    assert states(store) == {"cached": 2, "reserved": 1, "free": 1}


def test_a_dead_host_leaves_the_line() -> None:
    store = make_store(blocks=4)
    reserve(store, "p", "a", keys("1", "2", "3", "4"))
    reserve(store, "d", "b", keys("5"), wait_s=10)
    leave(store, "d", ("host",))
    assert store.gauges()["queued"] == 0


# ---- ending ---------------------------------------------------------------------------------------------------


def test_written_slots_come_back_only_when_every_rank_has_answered() -> None:
    store = make_store(blocks=4, ranks=2, workers=("p",))
    reserve(store, "p", "a", keys("1"))
    store.release("a", 0.0)
    assert RevokeAsked("p", "a", frozenset({0, 1})) in store.take_events()
    store.revoked("p", 0, "a", 0.0)
    assert states(store) == {"revoked": 2, "free": 6}
    store.revoked("p", 1, "a", 0.0)
    assert states(store) == {"free": 8}
    with pytest.raises(KvLost):
        commit(store, "p", "a", 0)


def test_releasing_committed_or_set_aside_blocks_asks_nobody() -> None:
    store = make_store()
    fill(store, "p", "a", keys("1"))
    reserve(store, "d", "b", keys("1", "2"), write=False)
    store.release("b", 0.0)
    store.release("b", 0.0)
    assert not [event for event in store.take_events() if isinstance(event, RevokeAsked)]
    assert states(store) == {"cached": 1, "free": 3}


def test_a_lease_is_revoked_at_its_deadline_and_a_silent_rank_makes_its_worker_unhealthy() -> None:
    store = make_store()
    fill(store, "p", "old", keys("1"))
    reserve(store, "p", "a", keys("1", "2"), ttl_s=10.0)
    store.take_events()
    store.advance(10.0)
    assert states(store) == {"cached": 1, "revoked": 1, "free": 2}
    assert store.next_deadline() == 15.0
    store.advance(15.0)
    events = store.take_events()
    assert [type(event) for event in events if isinstance(event, RevokeAsked | SessionUnhealthy)] == [
        RevokeAsked,
        SessionUnhealthy,
    ]
    assert states(store)["revoked"] == 1
    leave(store, "p")
    assert states(store) == {"cached": 1, "free": 3}


def test_only_the_owner_releases_on_the_local_socket() -> None:
    store = make_store()
    reserve(store, "p", "a", keys("1"))
    store.release("a", 0.0, "d")
    assert store.gauges()["leases"] == 1
    store.release("a", 0.0)  # from the bus, on behalf of the owner
    assert store.gauges()["leases"] == 0


def test_a_closed_host_gives_back_pins_at_once_and_written_slots_with_the_last_rank() -> None:
    store = make_store()
    fill(store, "p", "old", keys("1"))
    reserve(store, "p", "a", keys("1", "2"))
    reserve(store, "p", "b", keys("3"), write=False)
    store.take_events()
    leave(store, "p", ("host",))
    events = store.take_events()
    assert HostClosed("p") in events
    assert states(store) == {"cached": 1, "revoked": 1, "free": 2}
    leave(store, "p", ("watch",))
    assert states(store)["revoked"] == 1  # the rank's process still lives
    leave(store, "p", ("rank",))
    assert states(store) == {"cached": 1, "free": 3}
    assert store.gauges()["sessions"] == 1


def test_a_watch_that_comes_back_is_asked_again() -> None:
    store = make_store()
    reserve(store, "p", "a", keys("1"))
    leave(store, "p", ("watch",))
    store.release("a", 0.0)
    store.take_events()
    store.attach(Attach(session="p", kind="watch", worker="p"))
    assert RevokeAsked("p", "a", frozenset({0})) in store.take_events()
    store.revoked("p", 0, "a", 0.0)
    assert states(store) == {"free": 4}


def test_an_abandoned_ticket_leaves_no_queue_entry_and_no_wait() -> None:
    store = make_store(blocks=4)
    reserve(store, "d", "w", keys("0"), write=False)
    store.wait("d", Wait(lease="w", timeout_s=5), "wait", 0.0)
    reserve(store, "p", "a", keys("1", "2", "3"))
    reserve(store, "d", "q", keys("4"), wait_s=5)
    store.abandon("wait", 0.0)
    store.abandon("ticket-q", 0.0)
    assert (store.gauges()["waits"], store.gauges()["queued"]) == (0, 0)


# ---- sessions and geometry ------------------------------------------------------------------------------------


def test_a_host_waits_for_the_first_rank() -> None:
    store = make_store(workers=())
    host = Attach(session="p", kind="host", worker="p")
    assert store.attach(host) is None
    assert store.attach(Attach(session="p", kind="rank", worker="p", geometry=geometry())) is not None
    assert any(isinstance(event, ArenaCut) for event in store.take_events())
    assert store.attach(host) is not None


def test_another_geometry_is_refused_with_both_sides_named_while_anybody_is_attached() -> None:
    store = make_store(workers=("p",))
    other = geometry(fingerprint="0" * 64)
    with pytest.raises(KvMismatch, match=r"worker d has .*0000.* node-0 serves .*ffff.* to p"):
        store.attach(Attach(session="d", kind="rank", worker="d", geometry=other))
    assert store.gauges()["sessions"] == 1


def test_when_all_have_gone_the_arena_is_cut_anew_for_another_geometry_and_kept_for_the_same() -> None:
    store = make_store(blocks=4, workers=("p",))
    fill(store, "p", "a", keys("1"))
    leave(store, "p")
    join(store, "p")
    assert states(store) == {"cached": 1, "free": 3}
    assert store.blocks is not None
    last = store.blocks.generation
    leave(store, "p")
    store.take_events()
    join(store, "p", shape=geometry(slot_bytes=SLOT_BYTES // 2))
    assert Evicted(keys("1")[0]) in store.take_events()
    assert store.counts()["free"] > 4
    assert store.blocks.generation > last


def test_an_arena_too_small_for_two_prompts_is_refused_with_the_setting_to_change() -> None:
    store = make_store(blocks=3, workers=())
    with pytest.raises(KvMismatch, match=r"arena_gib to at least 0\.00"):
        store.attach(Attach(session="p", kind="rank", worker="p", geometry=geometry()))
    assert store.gauges()["sessions"] == 0


@pytest.mark.parametrize(
    "call",
    [
        Attach(session="", kind="host", worker="p"),
        Attach(session="s", kind="spy", worker="p"),
        Attach(session="s", kind="rank", worker="p"),
        Attach(session="s", kind="rank", worker="p", rank=1, geometry=geometry()),
        Attach(session="p", kind="host", worker="somebody else"),
    ],
)
def test_bad_attaches_are_refused(call: Attach) -> None:
    store = make_store(workers=("p",))
    with pytest.raises(InvalidRequest):
        store.attach(call)
    assert store.gauges()["sessions"] == 1


def test_keys_are_announced_once_when_bound() -> None:
    store = make_store()
    fill(store, "p", "a", keys("1", "2"))
    assert [event.key for event in store.take_events() if isinstance(event, Bound)] == keys("1", "2")
