"""KV bytes as a function of tokens: what may depend on what, and that no wrong byte goes unseen."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.worker.sim.blocks import BlockPool
from shared.worker.sim.contents import Contents, History, token_hash
from shared.worker.sim.pages import DigestPages, SimPages, SlicePages

BLOCK = 8
TOKEN_BYTES = 32
CONTENTS = Contents("test", BLOCK)

tokens = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40)


def make(kind: str, blocks: int = 8) -> SimPages:
    pool = BlockPool(blocks)
    return SlicePages(pool.fills, BLOCK, TOKEN_BYTES) if kind == "slices" else DigestPages(pool.fills, BLOCK)


def fill(pages: SimPages, prompt: list[int], chunks: list[int]) -> None:
    """Computed in chunks that end at these tokens; page b holds block b."""
    states, start = CONTENTS.read(prompt).states, 0
    for end in chunks:
        for block in range(start // BLOCK, -(-end // BLOCK)):
            first = block * BLOCK
            pages.compute(block, states[first : first + BLOCK], max(0, start - first), min(BLOCK, end - first))
        start = end


def page_bytes(pages: SimPages, block: int) -> bytes:
    slot = bytearray(pages.slot_bytes)
    pages.read([block], [memoryview(slot)])
    return bytes(slot)


@given(tokens, st.integers(1, 40))
def test_one_by_one_or_all_at_once_is_the_same(prompt: list[int], cut: int) -> None:
    cut = min(cut, len(prompt))
    reading = CONTENTS.read(prompt)
    history = History(CONTENTS, CONTENTS.read(prompt[:cut]), prompt[:cut])
    assert history.state == int(reading.states[cut - 1])
    for place in range(cut, len(prompt)):
        history.push(prompt[place], token_hash(prompt[place]))
        assert history.state == int(reading.states[place])


@given(tokens, st.integers(0, 39), st.integers(1, 2**32 - 1))
def test_a_state_depends_on_all_tokens_up_to_its_own_and_on_none_behind(
    prompt: list[int], place: int, change: int
) -> None:
    place %= len(prompt)
    other = list(prompt)
    other[place] ^= change
    mine, theirs = CONTENTS.read(prompt).states, CONTENTS.read(other).states
    assert (mine[:place] == theirs[:place]).all()
    assert (mine[place:] != theirs[place:]).all()


def test_order_and_fingerprint_matter() -> None:
    assert CONTENTS.read([1, 2]).states[-1] != CONTENTS.read([2, 1]).states[-1]
    assert Contents("other", BLOCK).read([1]).states[0] != CONTENTS.read([1]).states[0]


def test_contents_stay_what_they_were() -> None:
    """Golden: engines of different releases on one store must agree, or FORMAT must change."""
    pages = make("slices")
    fill(pages, [1, 2, 3], [3])
    assert CONTENTS.read([1, 2, 3]).states.tolist() == [9416212769072012890, 7533109729458340270, 9158003265023004682]
    assert page_bytes(pages, 0)[:8].hex() == "59c326fa7df9999a"


@pytest.mark.parametrize("kind", ["slices", "digests"])
@given(prompt=tokens, cuts=st.sets(st.integers(1, 39)))
def test_chunks_leave_the_same_bytes(kind: str, prompt: list[int], cuts: set[int]) -> None:
    whole, chunked = make(kind), make(kind)
    fill(whole, prompt, [len(prompt)])
    fill(chunked, prompt, [*sorted(cut for cut in cuts if cut < len(prompt)), len(prompt)])
    states = CONTENTS.read(prompt).states
    for block in range(-(-len(prompt) // BLOCK)):
        assert page_bytes(whole, block) == page_bytes(chunked, block)
        assert chunked.excess(block, states[block * BLOCK : (block + 1) * BLOCK]) == 0


@pytest.mark.parametrize("kind", ["slices", "digests"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK])
def test_every_flipped_bit_of_what_is_filled_shows(kind: str, length: int) -> None:
    pages = make(kind)
    prompt = random.Random(1).sample(range(1000), length)
    fill(pages, prompt, [length])
    states = CONTENTS.read(prompt).states
    good = page_bytes(pages, 0)
    filled = length * TOKEN_BYTES if kind == "slices" else pages.slot_bytes
    for bit in range(filled * 8):
        wrong = bytearray(good)
        wrong[bit // 8] ^= 1 << bit % 8
        pages.write([0], [memoryview(wrong)])
        assert pages.excess(0, states) != 0, f"bit {bit}"
    pages.write([0], [memoryview(bytearray(good))])
    assert pages.excess(0, states) == 0


@pytest.mark.parametrize("kind", ["slices", "digests"])
def test_what_was_loaded_wrong_stays_wrong_when_more_is_computed(kind: str) -> None:
    prompt = list(range(BLOCK))
    source, pages = make(kind), make(kind)
    fill(source, prompt[:5], [5])
    wrong = bytearray(page_bytes(source, 0))
    wrong[3] ^= 4
    pages.write([0], [memoryview(wrong)])
    pages.fills[0] = 5
    states = CONTENTS.read(prompt).states
    before = pages.excess(0, states)
    pages.compute(0, states, 4, 5)  # the last loaded token, computed once more
    assert pages.excess(0, states) == before != 0
    pages.compute(0, states, 5, BLOCK)
    assert pages.excess(0, states) == before


@pytest.mark.parametrize("kind", ["slices", "digests"])
def test_a_block_in_anothers_place_shows(kind: str) -> None:
    pages = make(kind)
    prompt = [7] * (2 * BLOCK)  # equal tokens, yet not equal blocks
    fill(pages, prompt, [2 * BLOCK])
    states = CONTENTS.read(prompt).states
    assert pages.excess(0, states[:BLOCK]) == 0
    assert pages.excess(1, states[:BLOCK]) != 0


def test_an_empty_page_says_nothing() -> None:
    pages = make("slices")
    assert pages.excess(0, CONTENTS.read([1]).states) == 0
    pages.close()
