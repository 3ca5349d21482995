"""The store against a model of its clients: engines that copy as late as they may, and readers that trust what is pinned.

The model knows only what clients are told. Whatever happens in whichever order: a slot that somebody may still write
is nobody else's, what a living lease was promised is what lies there, states add up, and when all have left nothing is
held.
"""

import os
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.kv_transfer.leases import Answered, HostClosed, LeaseEnded, RevokeAsked
from services.kv_transfer.slots import PAGE_BYTES, WORD_BYTES, SlotState
from services.kv_transfer.store import Store
from shared.errors import KvLost, KvMemory
from shared.kv.messages import Attach, Commit, Geometry, Keep, Ready, Reserve, Reserved, Wait

RANKS = 2
BLOCKS = 6
SLOT_BYTES = 4096
WORKERS = ("p", "q", "d")
SHAPE = Geometry(fingerprint="f", block_size=16, slot_bytes=SLOT_BYTES, ranks=RANKS, max_model_len=48)
CHAINS = [[bytes([chain, position]) * 8 for position in range(4)] for chain in range(3)]


@dataclass
class Held:
    """A lease as its client sees it."""

    worker: str
    keys: list[bytes]
    write: bool
    slots: list[int]
    words: list[int]
    committed: list[bool]
    is_over: bool = False
    is_kept: bool = False  # ends by itself when all ranks have written it
    done: set[tuple[int, int]] = field(default_factory=set)  # (position, rank) that were committed
    stopped: set[int] = field(default_factory=set)  # ranks that will never copy under it again

    def is_written(self) -> bool:
        return all(
            committed or all((position, rank) in self.done for rank in range(RANKS))
            for position, committed in enumerate(self.committed)
        )


class Clients(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        size = PAGE_BYTES + BLOCKS * RANKS * (SLOT_BYTES + WORD_BYTES)
        self.words: list[int] = []
        self.store = Store("n", size, self.take_words)
        self.now = 0.0
        self.serial = 0
        self.content: dict[int, bytes | None] = {}
        self.held: dict[str, Held] = {}
        self.asked: set[tuple[str, str, int]] = set()  # revokes to answer: worker, lease, rank
        self.queued: dict[str, tuple[str, Reserve]] = {}
        self.waits: dict[str, str] = {}
        self.alive: dict[str, set[int]] = {}  # worker -> its living ranks
        self.hosts: set[str] = set()
        for worker in WORKERS:
            self.join(worker)

    def take_words(self, layout) -> list[int]:
        self.words = [0] * layout.slots
        return self.words

    # ---- what clients do ---------------------------------------------------------------------------------------

    @rule(worker=st.sampled_from(WORKERS))
    def join(self, worker: str) -> None:
        if worker in self.alive:
            return
        for rank in range(RANKS):
            for kind in ("rank", "watch"):
                self.store.attach(Attach(session=worker, kind=kind, worker=worker, rank=rank, geometry=SHAPE))
        self.store.attach(Attach(session=worker, kind="host", worker=worker))
        self.alive[worker] = set(range(RANKS))
        self.hosts.add(worker)
        self.hear()

    @rule(
        worker=st.sampled_from(WORKERS),
        chain=st.sampled_from(CHAINS),
        length=st.integers(1, 4),
        write=st.booleans(),
        wait_s=st.sampled_from([0.0, 0.0, 2.0, 8.0]),
        ttl_s=st.sampled_from([10.0, 50.0, 500.0]),
        data=st.data(),
    )
    def reserve(self, worker, chain, length, write, wait_s, ttl_s, data) -> None:  # noqa: PLR0917 - drawn
        if worker not in self.hosts:
            return
        others = sorted(name for name, held in self.held.items() if not held.write)
        take_from = data.draw(st.sampled_from(["", *others])) if write else ""
        self.serial += 1
        call = Reserve(
            lease=f"lease-{self.serial}",
            request="r",
            keys=chain[:length],
            write=write,
            ttl_s=ttl_s,
            wait_s=wait_s,
            take_from=take_from,
        )
        try:
            answer = self.store.reserve(worker, call, call.lease, self.now)
        except KvMemory:
            pass
        else:
            if answer is None:
                self.queued[call.lease] = (worker, call)
            else:
                self.granted(worker, call, answer)
        self.hear()

    @rule(worker=st.sampled_from(WORKERS), chain=st.sampled_from(CHAINS), length=st.integers(1, 4))
    def keep(self, worker, chain, length) -> None:
        if worker not in self.hosts:
            return
        self.serial += 1
        call = Keep(lease=f"lease-{self.serial}", request="r", keys=chain[:length])
        try:
            answer = self.store.keep(worker, call, self.now)
        except KvMemory:
            pass
        else:
            as_reserve = Reserve(lease=call.lease, request="r", keys=call.keys, write=True, ttl_s=1.0)
            self.granted(worker, as_reserve, answer)
            self.held[call.lease].is_kept = True
        self.hear()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), rank=st.integers(0, RANKS - 1))
    def copy_and_commit(self, data, rank: int) -> None:
        name, held = self.some_lease(data)
        if not self.may_write(held, rank):
            return
        positions = [p for p in range(len(held.keys)) if not held.committed[p]]
        chosen = data.draw(st.lists(st.sampled_from(positions), unique=True)) if positions else []
        for position in chosen:
            if (position, rank) not in held.done:
                self.content[held.slots[position] + rank] = held.keys[position]
        call = Commit(lease=name, blocks=chosen, checksums=[1] * len(chosen))
        try:
            self.store.commit(held.worker, rank, call, self.now)
        except KvLost:
            assert held.is_over
        else:
            assert not held.is_over
            held.done |= {(position, rank) for position in chosen}
        self.hear()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def write_it_all(self, data) -> None:
        name, held = self.some_lease(data)
        positions = [p for p in range(len(held.keys)) if not held.committed[p]]
        if held.is_over or held.is_kept or not held.write or held.stopped or not positions:
            return
        for rank in range(RANKS):
            for slot, position in ((held.slots[p] + rank, p) for p in positions):
                if (position, rank) not in held.done:
                    self.content[slot] = held.keys[position]
                held.done.add((position, rank))
            call = Commit(lease=name, blocks=positions, checksums=[1] * len(positions))
            self.store.commit(held.worker, rank, call, self.now)
        answer = self.store.wait(held.worker, Wait(lease=name, timeout_s=0), "now", self.now)
        assert answer is not None
        assert answer.complete
        self.waits["now"] = name
        self.waited("now", answer)
        self.hear()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), rank=st.integers(0, RANKS - 1))
    def copy_without_commit(self, data, rank: int) -> None:
        """An engine that is slow, or dies half-way: what it leaves must never be read."""
        _, held = self.some_lease(data)
        for slot in self.writable_slots(held, rank):
            self.content[slot] = None

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data) -> None:
        name, held = self.some_lease(data)
        if held.worker in self.hosts:
            self.store.release(name, self.now, held.worker)
            self.hear()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), timeout_s=st.sampled_from([0.0, 5.0]))
    def wait(self, data, timeout_s: float) -> None:
        name, held = self.some_lease(data)
        if held.is_over:
            return
        self.serial += 1
        ticket = f"wait-{self.serial}"
        self.waits[ticket] = name
        answer = self.store.wait(held.worker, Wait(lease=name, timeout_s=timeout_s), ticket, self.now)
        if answer is not None:
            self.waited(ticket, answer)
        self.hear()

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answer_revoke(self, data) -> None:
        worker, lease, rank = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.remove((worker, lease, rank))
        if lease in self.held:
            self.held[lease].stopped.add(rank)
        if rank in self.alive.get(worker, set()):
            self.store.revoked(worker, rank, lease, self.now)
        self.hear()

    @rule(step_s=st.sampled_from([0.5, 2.0, 6.0]))
    def time_passes(self, step_s: float) -> None:
        self.now += step_s
        self.store.advance(self.now)
        self.hear()

    @rule(worker=st.sampled_from(WORKERS), chance=st.integers(0, 3))
    def host_dies(self, worker: str, chance: int = 0) -> None:
        if worker not in self.hosts or chance:
            return
        self.hosts.discard(worker)
        self.store.detach(worker, "host", 0, self.now)
        for name in [name for name, (owner, _) in self.queued.items() if owner == worker]:
            del self.queued[name]
        self.forget_if_gone(worker)
        self.hear()

    @rule(worker=st.sampled_from(WORKERS), rank=st.integers(0, RANKS - 1), chance=st.integers(0, 3))
    def rank_dies(self, worker: str, rank: int, chance: int = 0) -> None:
        if rank not in self.alive.get(worker, set()) or chance:
            return
        self.alive[worker].discard(rank)
        for held in self.held.values():
            if held.worker == worker:
                held.stopped.add(rank)
        for kind in ("rank", "watch"):
            self.store.detach(worker, kind, rank, self.now)
        self.forget_if_gone(worker)
        self.hear()

    # ---- what must hold ----------------------------------------------------------------------------------------

    @invariant()
    def states_add_up(self) -> None:
        counts = self.store.counts()
        assert sum(counts.values()) == BLOCKS * RANKS
        assert all(count >= 0 for count in counts.values())
        assert self.store.gauges()["leases"] == sum(not held.is_over for held in self.held.values())
        assert self.store.gauges()["queued"] == len(self.queued)

    @invariant()
    def what_may_be_written_is_nobody_elses(self) -> None:
        seen: set[int] = set()
        for held in self.held.values():
            for rank in range(RANKS):
                for slot in self.writable_slots(held, rank):
                    assert slot not in seen
                    assert self.words[slot] & 1 == 0
                    seen.add(slot)

    @invariant()
    def what_is_promised_is_there(self) -> None:
        for held in self.held.values():
            for position, key in enumerate(held.keys):
                if held.is_over or not held.committed[position]:
                    continue
                assert self.store.blocks.state(held.slots[position] // RANKS) is SlotState.PINNED
                for rank in range(RANKS):
                    slot = held.slots[position] + rank
                    assert self.content[slot] == key
                    assert self.words[slot] == held.words[position]
                    assert self.words[slot] & 1

    def teardown(self) -> None:
        for worker in WORKERS:
            self.host_dies(worker)
            for rank in range(RANKS):
                self.rank_dies(worker, rank)
        counts = self.store.counts()
        assert counts["free"] + counts["cached"] == BLOCKS * RANKS
        assert not any(self.store.gauges().values()), self.store.gauges()

    # ---- what clients hear -------------------------------------------------------------------------------------

    def hear(self) -> None:
        self._hear()
        # Nothing can happen any more to these, and drawing them would waste the run.
        over = [name for name, held in self.held.items() if held.is_over and len(held.stopped) == RANKS]
        self.held = {name: held for name, held in self.held.items() if name not in over}

    def _hear(self) -> None:
        for event in self.store.take_events():
            if isinstance(event, LeaseEnded):
                held = self.held[event.lease]
                held.is_over = True
                if not held.write or held.is_written():
                    held.stopped = set(range(RANKS))
            elif isinstance(event, RevokeAsked):
                self.asked |= {(event.session, event.lease, rank) for rank in event.ranks}
            elif isinstance(event, HostClosed):
                assert event.worker not in self.hosts
            elif isinstance(event, Answered) and event.ticket in self.waits:
                self.waited(str(event.ticket), event.answer)
            elif isinstance(event, Answered):
                worker, call = self.queued.pop(str(event.ticket))
                if isinstance(event.answer, Reserved):
                    self.granted(worker, call, event.answer)

    def granted(self, worker: str, call: Reserve, answer: Reserved) -> None:
        stopped = set(range(RANKS)) - self.alive.get(worker, set())
        self.held[call.lease] = Held(
            worker, call.keys, call.write, answer.slots, answer.words, answer.committed, stopped=stopped
        )

    def waited(self, ticket: str, answer: object) -> None:
        held = self.held[self.waits.pop(ticket)]
        if isinstance(answer, Ready):
            assert answer.complete == all(answer.committed)
            for position, is_committed in enumerate(answer.committed):
                if is_committed:
                    held.slots[position] = answer.slots[position]
                    held.words[position] = answer.words[position]
                    held.committed[position] = True

    def forget_if_gone(self, worker: str) -> None:
        if worker not in self.hosts and not self.alive[worker]:
            del self.alive[worker]

    def some_lease(self, data) -> tuple[str, Held]:
        name = data.draw(st.sampled_from(sorted(self.held)))
        return name, self.held[name]

    def may_write(self, held: Held, rank: int) -> bool:
        return held.write and rank not in held.stopped

    def writable_slots(self, held: Held, rank: int) -> list[int]:
        """Slots of this rank that its engine may be writing now, as far as it was told."""
        if not self.may_write(held, rank):
            return []
        return [
            held.slots[position] + rank
            for position in range(len(held.keys))
            if not held.committed[position] and (position, rank) not in held.done
        ]


# 100 take a second or two; TEST_STORE_EXAMPLES=6000 is the search of two minutes that a change of the protocol deserves.
EXAMPLES = int(os.environ.get("TEST_STORE_EXAMPLES", "100"))
Clients.TestCase.settings = settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None)
TestStoreModel = Clients.TestCase
