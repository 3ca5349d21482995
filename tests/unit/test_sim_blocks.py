import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.worker.sim.blocks import BlockPool


def test_blocks_come_in_order_and_nameless_ones_come_back_first() -> None:
    pool = BlockPool(6)
    first = pool.take(4)
    assert first == [0, 1, 2, 3]
    pool.name(0, 100)
    pool.name(1, 101)
    pool.release(reversed(first))
    assert pool.free == 6
    # 2 was freed last of those without a name; 1 before 0, so the end of a prompt goes before its beginning.
    assert pool.take(6) == [2, 3, 4, 5, 1, 0]


def test_a_free_block_is_found_by_its_name_until_it_is_given_out() -> None:
    pool = BlockPool(3)
    (block,) = pool.take(1)
    pool.name(block, 7)
    pool.fills[block] = 32
    pool.release([block])
    assert pool.find([7, 8]) == [block]
    assert pool.free_among([block]) == 1
    pool.hold([block])
    assert (pool.free, pool.free_among([block]), pool.fills[block]) == (2, 0, 32)
    pool.release([block])
    assert block in pool.take(3)
    assert pool.find([7]) == []
    assert pool.fills[block] == 0


def test_only_a_known_prefix_is_found() -> None:
    pool = BlockPool(3)
    for block, name in zip(pool.take(3), (1, 2, 3), strict=True):
        pool.name(block, name)
    assert pool.find([1, 9, 3]) == [0]
    assert pool.find([9, 2]) == []


def test_the_first_of_two_equal_blocks_keeps_the_name() -> None:
    pool = BlockPool(2)
    one, other = pool.take(2)
    pool.name(one, 5)
    pool.name(other, 5)
    assert pool.find([5]) == [one]
    pool.release([one])
    pool.release([other])
    assert pool.take(1) == [other]


def test_what_is_copied_stays_held() -> None:
    pool = BlockPool(2)
    (block,) = pool.take(1)
    pool.begin_copy([block])
    pool.begin_copy([block])
    pool.release([block])
    assert pool.is_copied(block)
    assert pool.free == 1
    pool.end_copy([block])
    assert pool.is_copied(block)
    pool.end_copy([block])
    assert not pool.is_copied(block)
    assert pool.free == 2
    assert pool.usage == pytest.approx(0)


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release", "name"]), st.integers(0, 7)), max_size=80))
def test_a_block_is_free_exactly_when_nobody_holds_it(calls: list[tuple[str, int]]) -> None:
    pool, held = BlockPool(8), [0] * 8
    for call, number in calls:
        if call == "take" and pool.free > number:
            for block in pool.take(number):
                assert not held[block]
                held[block] = 1
        elif call == "hold":
            pool.hold([number])
            held[number] += 1
        elif call == "release" and held[number]:
            pool.release([number])
            held[number] -= 1
        elif call == "name" and held[number]:
            pool.name(number, number % 3)
        assert pool.free == held.count(0)
        assert all(pool.find([name]) == [] or pool.find([name])[0] % 3 == name for name in range(3))
