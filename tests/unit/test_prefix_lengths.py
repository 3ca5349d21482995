"""How bitmaps become prefix lengths."""

import pytest

from shared.prefix_index import bits_of, has_bit, prefix_lengths

NODES = {"a": 0, "b": 9, "c": 7}


def bitmap(*numbers: int) -> bytes:
    value = bytearray(max(numbers) // 8 + 1)
    for number in numbers:
        value[number // 8] |= 0x80 >> number % 8
    return bytes(value)


def test_bits_are_counted_as_redis_does() -> None:
    assert has_bit(b"\x80", 0)
    assert has_bit(b"\x00\x40", 9)
    assert not has_bit(b"\x80", 1)
    assert not has_bit(b"\x80", 100)
    assert bits_of(bitmap(0, 7, 9)) == [0, 7, 9]


@pytest.mark.parametrize(
    ("bitmaps", "expected"),
    [
        ([], {}),
        ([None], {}),
        ([b""], {}),
        ([bitmap(0), bitmap(0, 9)], {"a": 2}),
        ([bitmap(0, 9, 7), bitmap(0, 7), bitmap(7)], {"a": 2, "b": 1, "c": 3}),
        ([bitmap(0), None, bitmap(0)], {"a": 1}),
        ([bitmap(500)], {}),
    ],
)
def test_a_prefix_ends_at_the_first_block_that_is_missing(
    bitmaps: list[bytes | None], expected: dict[str, int]
) -> None:
    assert prefix_lengths(bitmaps, NODES) == expected
