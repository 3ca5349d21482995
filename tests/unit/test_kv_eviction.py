"""The eviction order: what nobody asks for again does not push out what comes back."""

import pytest

from loadtest.micro.eviction import ORDERS, read_prompts, replay
from services.kv_transfer.eviction import ScanResistant


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


class Cache:
    """Blocks of an arena that are all cached, by key."""

    def __init__(self, blocks: int) -> None:
        self.order = ScanResistant(blocks)
        self.held: dict[bytes, int] = {}
        self._free = list(range(blocks))

    def use(self, *numbers: int) -> None:
        """Pin and unpin each, storing what is not there."""
        for number in numbers:
            if (block := self.held.get(key(number))) is not None:
                self.order.leave(block)
            elif self._free:
                block = self._free.pop()
            else:
                block = self.order.evict()
                self.held = {name: other for name, other in self.held.items() if other != block}
            self.held[key(number)] = block
            self.order.enter(block, key(number))


def test_without_returns_it_is_least_recently_used() -> None:
    cache = Cache(4)
    cache.use(1, 2, 3, 4, 1, 5, 6)
    assert set(cache.held) == {key(4), key(1), key(5), key(6)}


def test_what_has_come_back_outlives_a_flood() -> None:
    cache = Cache(8)
    cache.use(1, 2, *range(100, 108), 1, 2)  # evicted, and asked for again
    cache.use(*range(200, 300))
    assert {key(1), key(2)} <= set(cache.held)
    assert len(cache.order) == 8


def test_what_is_used_often_but_never_missed_is_no_better_than_new() -> None:
    """A hand-off pins a block several times."""
    cache = Cache(4)
    cache.use(1, 1, 1, 1)
    cache.use(*range(100, 104))
    assert key(1) not in cache.held


def test_what_has_come_back_goes_when_it_fills_half_and_is_oldest() -> None:
    cache = Cache(4)
    cache.use(*range(8), *range(8), *range(8))  # a loop larger than the arena: all come back
    cache.use(100)
    assert key(100) in cache.held
    assert len(cache.order) == 4


def test_as_many_evicted_keys_are_remembered_as_there_are_blocks() -> None:
    cache = Cache(4)
    cache.use(*range(100))
    assert len(cache.order._gone) == 4


def test_a_recorded_trace_hits_more_often() -> None:
    """The shipped ten minutes, in an arena of a twentieth of their blocks."""
    prompts = read_prompts("mooncake-conversation")[:800]
    rates = {order: replay(prompts, 1000, order, held=16).hit_rate for order in ORDERS}
    assert rates["2q"] > 1.05 * rates["lru"] > 0


@pytest.mark.parametrize("order", ORDERS)
def test_where_all_fits_nothing_is_evicted(order: str) -> None:
    prompts = read_prompts("mooncake-conversation")[:100]
    different = {name for prompt in prompts for name in prompt}
    replayed = replay(prompts, len(different), order, held=4)
    assert replayed.evicted_blocks == 0
    assert replayed.hit_rate == pytest.approx(1 - len(different) / sum(map(len, prompts)))
