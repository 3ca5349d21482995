"""Block keys: what they depend on, and that they never change by accident."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.kv.blocks import KEY_BYTES, block_keys, blocks_of
from shared.wire import pack_tokens

TOKENS = pack_tokens(list(range(40)))
GOLDEN = ["fd4fdeed698b82e9d4347048dec32b38", "184518cac567b93d0503ddf8d1b00bb1", "e9d946e20a2ba03f243bf49062f6c5d0"]


def test_golden_keys() -> None:
    """Two versions of Baton in one cluster must agree on these."""
    keys = block_keys(TOKENS, 16, fingerprint="abc", salt=b"tenant", extra=b"lora")
    assert [key.hex() for key in keys] == GOLDEN


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_every_block_has_a_key_the_partly_filled_one_included(tokens: int, blocks: int) -> None:
    keys = block_keys(pack_tokens([7] * tokens), 16, fingerprint="f")
    assert len(keys) == blocks_of(tokens, 16) == blocks
    assert all(len(key) == KEY_BYTES for key in keys)


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": "g"},
        {"salt": b"t"},
        {"extra": b"e"},
        {"block_size": 8},
        {"tokens": pack_tokens([1, *range(1, 40)])},
    ],
)
def test_whatever_differs_at_the_start_makes_every_key_differ(changed: dict[str, object]) -> None:
    base = {"tokens": TOKENS, "block_size": 16, "fingerprint": "f"}
    one = block_keys(**base)
    other = block_keys(**{**base, **changed})
    assert not set(one) & set(other)


def test_salt_and_extra_are_not_interchangeable() -> None:
    assert block_keys(TOKENS, 16, fingerprint="f", salt=b"a") != block_keys(TOKENS, 16, fingerprint="f", extra=b"a")
    assert block_keys(TOKENS, 16, fingerprint="f", salt=b"ab", extra=b"c") != block_keys(
        TOKENS, 16, fingerprint="f", salt=b"a", extra=b"bc"
    )


@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.lists(st.integers(0, 2**32 - 1), max_size=80))
def test_prompts_share_keys_exactly_as_far_as_their_blocks_agree(one: list[int], other: list[int]) -> None:
    size = 4
    left = block_keys(pack_tokens(one), size, fingerprint="f")
    right = block_keys(pack_tokens(other), size, fingerprint="f")
    for position in range(max(len(left), len(right))):
        agree = one[: (position + 1) * size] == other[: (position + 1) * size]
        if position < min(len(left), len(right)):
            assert (left[position] == right[position]) is agree
    assert len(set(left)) == len(left)
