"""When a prompt's prefix is asked of another node, and what becomes of it: over fakes of the bus and of the store."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from shared import wire
from shared.errors import KvLost, KvMemory, WorkerLost
from shared.kv.messages import Ready, Reserved
from shared.worker.metrics import WorkerMetrics
from shared.worker.pulling import Pulling
from shared.worker.rates import Prompts

BLOCK = 16
KEYS = [bytes([number]) * 16 for number in range(10)]


@dataclass
class FakeBus:
    """The other nodes' stores."""

    held: int = 8  # blocks
    asked: list[tuple[str, Any]] = field(default_factory=list)
    gone: bool = False

    async def request(self, subject: str, message: Any, expect: type, *, timeout_s: float) -> Any:
        assert timeout_s > 0
        self.asked.append((subject, message))
        if self.gone:
            raise WorkerLost("nobody listens")
        return expect(node="n", blocks=min(self.held, len(message.keys)))


@dataclass
class FakeStore:
    """This node's."""

    own: int = 2
    comes: int = 8  # blocks that are there at the end of a wait
    full: bool = False
    lost: bool = False
    leases: list[str] = field(default_factory=list)

    async def reserve(self, *, lease: str, keys: list[bytes], write: bool, **_: Any) -> Reserved:
        assert not write
        if self.full:
            raise KvMemory("no room")
        self.leases.append(lease)
        committed = [place < self.own for place in range(len(keys))]
        return Reserved(slots=[0] * len(keys), words=[0] * len(keys), committed=committed)

    async def wait(self, lease: str, timeout_s: float) -> Ready:
        assert lease in self.leases
        assert timeout_s > 0
        if self.lost:
            raise KvLost("the lease is over")
        committed = [place < self.comes for place in range(8)]
        return Ready(slots=[0] * 8, words=[0] * 8, committed=committed, complete=all(committed))

    def release_soon(self, lease: str) -> None:
        if lease in self.leases:
            self.leases.remove(lease)


class Bench:
    def __init__(self, mode: str = "auto", **store: Any) -> None:
        self.bus, self.store, self.metrics = FakeBus(), FakeStore(**store), WorkerMetrics()
        self.prompts = Prompts()
        fakes: Any = (self.bus, "c", "here", self.store)
        self.pulling = Pulling(*fakes, self.metrics, mode)

    async def pull(self, **holders: int) -> Any:
        return await self.pulling.pull("r", KEYS, BLOCK, holders, self.prompts)

    def outcomes(self) -> dict[str, float]:
        samples = next(iter(self.metrics.pulls.collect())).samples
        return {sample.labels["outcome"]: sample.value for sample in samples if sample.name.endswith("_total")}

    def computes(self, tokens_per_s: float) -> None:
        for tokens in (100, 200, 300):
            self.prompts.line.see(tokens, tokens / tokens_per_s)


async def test_what_is_missing_comes_from_who_has_most_and_is_held_until_released() -> None:
    bench = Bench()
    pulled = await bench.pull(here=2 * BLOCK, there=8 * BLOCK, elsewhere=5 * BLOCK)
    assert pulled.tokens == 6 * BLOCK
    (subject, looked), (_, fetched) = bench.bus.asked
    assert subject == "c.kv.there"
    assert looked == wire.KvLookup(keys=KEYS)
    assert fetched == wire.KvFetch(node="here", lease=pulled.lease, keys=KEYS[2:8], traceparent=fetched.traceparent)
    assert bench.store.leases == [pulled.lease]
    pulled.release()
    pulled.release()
    assert not bench.store.leases
    assert bench.outcomes() == {"ok": 1}


@pytest.mark.parametrize(
    "holders", [{}, {"here": 8 * BLOCK}, {"here": 5 * BLOCK, "there": 5 * BLOCK + 3}, {"there": BLOCK - 1}]
)
async def test_where_nobody_has_a_block_more_nobody_is_asked(holders: dict[str, int]) -> None:
    bench = Bench()
    assert (await bench.pull(**holders)).tokens == 0
    assert not bench.bus.asked


async def test_a_stale_entry_costs_one_question() -> None:
    bench = Bench()
    bench.bus.held = 0
    assert (await bench.pull(there=8 * BLOCK)).tokens == 0
    assert len(bench.bus.asked) == 1
    assert bench.outcomes() == {"stale": 1}


async def test_what_came_in_time_is_used() -> None:
    bench = Bench(comes=5)
    assert (await bench.pull(there=8 * BLOCK)).tokens == 3 * BLOCK
    assert bench.outcomes() == {"late": 1}


@pytest.mark.parametrize(
    ("spoil", "outcome"),
    [
        (lambda bench: setattr(bench.bus, "gone", True), WorkerLost.code),
        (lambda bench: setattr(bench.store, "full", True), KvMemory.code),
        (lambda bench: setattr(bench.store, "lost", True), KvLost.code),
        (lambda bench: setattr(bench.store, "comes", 2), KvLost.code),
    ],
)
async def test_whatever_goes_wrong_the_prompt_is_computed_and_nothing_held(
    spoil: Callable[[Bench], None], outcome: str
) -> None:
    bench = Bench()
    spoil(bench)
    assert (await bench.pull(there=8 * BLOCK)).tokens == 0
    assert not bench.store.leases
    assert bench.outcomes() == {outcome: 1}


async def test_nobody_is_asked_where_computing_has_been_faster() -> None:
    bench = Bench()
    for tokens in (100, 200, 300):
        bench.pulling.line.see(tokens, tokens / 10_000)
    bench.computes(1_000)
    assert (await bench.pull(there=8 * BLOCK)).tokens
    bench.computes(1_000_000)
    for _ in range(200):
        bench.computes(1_000_000)
    assert not (await bench.pull(there=8 * BLOCK)).tokens
    assert bench.outcomes() == {"ok": 1, "slower": 1}


async def test_a_slow_link_is_tried_again_after_a_while() -> None:
    bench = Bench()
    bench.computes(1_000_000)
    for tokens in (100, 200, 300):
        bench.pulling.line.see(tokens, tokens / 10_000)
    assert (await bench.pull(there=8 * BLOCK)).tokens, "it was never tried"
    assert not (await bench.pull(there=8 * BLOCK)).tokens
    bench.pulling.again_s = 0.0
    assert (await bench.pull(there=8 * BLOCK)).tokens


@pytest.mark.parametrize(("mode", "asked"), [("always", True), ("never", False)])
async def test_the_measure_can_be_switched_off(mode: str, asked: bool) -> None:
    bench = Bench(mode)
    bench.computes(1_000_000_000 if asked else 1)
    assert bool((await bench.pull(there=8 * BLOCK)).tokens) is asked
