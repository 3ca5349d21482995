"""What the KV of tokens looks like: a number for each token that depends on it and on all tokens before it.

That number is the token's *state*, and its KV bytes are spread out of it (pages.py). A block's tokens begin from a
*seed*, xxh3 chained over the blocks before; within the block the states are mixed sums, so that a prompt's are found
with a few numpy calls, and a partly filled block can be extended. Nothing here knows of tenants: salts keep keys
apart, not bytes. Invariant: `Reading.of` and `History` agree, token by token.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from shared import wire

MASK = (1 << 64) - 1
FORMAT = 1  # changes with every change of what this module computes
# Odd 64-bit constants, of splitmix64 and xxh64.
SPREAD = 0x9E3779B97F4A7C15
STIR = 0xBF58476D1CE4E5B9
SETTLE = 0x94D049BB133111EB

_SPREAD, _SETTLE, _HALF, _LESS = np.uint64(SPREAD), np.uint64(SETTLE), np.uint64(32), np.uint64(29)

Words = npt.NDArray[np.uint64]


def odd_words(count: int, name: str) -> Words:
    """Constants: the same ones wherever and whenever they are made."""
    words = np.arange(count, dtype=np.uint64) * np.uint64(SPREAD) + np.uint64(xxhash.xxh3_64_intdigest(name.encode()))
    words ^= words >> np.uint64(30)
    words *= np.uint64(STIR)
    words ^= words >> np.uint64(27)
    words *= np.uint64(SETTLE)
    words |= np.uint64(1)
    return words


def token_hash(token: int) -> int:
    mixed = token * SPREAD & MASK
    mixed ^= mixed >> 32
    return mixed * STIR & MASK


class Contents:
    """Of the blocks of one kind of engine: the same fingerprint and block size give the same states everywhere."""

    def __init__(self, fingerprint: str, block_size: int) -> None:
        self.fingerprint = fingerprint
        self.block_size = block_size
        self.first_seed: int = xxhash.xxh3_64_intdigest(fingerprint.encode())
        self._places = odd_words(block_size, "baton-sim-place")
        self._stirred_places = self._places * np.uint64(STIR)
        self.places: list[int] = self._places.tolist()

    def next_seed(self, seed: int, block: bytes) -> int:
        """The seed of the block behind this one; `block` are a full block's tokens, packed."""
        found: int = xxhash.xxh3_64_intdigest(block, seed=seed)
        return found

    def read(self, tokens: Sequence[int]) -> "Reading":
        """A prompt, or anything else whose tokens are known."""
        size = self.block_size
        packed = wire.pack_tokens(tokens)
        seeds, width = [self.first_seed], 4 * size
        for end in range(width, len(packed) + 1, width):
            seeds.append(xxhash.xxh3_64_intdigest(packed[end - width : end], seed=seeds[-1]))
        blocks = -(-len(tokens) // size)
        mixed = np.zeros((blocks, size), dtype=np.uint64)
        flat = mixed.reshape(-1)
        flat[: len(tokens)] = np.frombuffer(packed, dtype="<u4")
        mixed *= _SPREAD
        mixed ^= mixed >> _HALF
        mixed *= self._stirred_places
        np.add.accumulate(mixed, axis=1, out=mixed)
        mixed += np.array(seeds[:blocks], dtype=np.uint64)[:, None]
        mixed ^= mixed >> _HALF
        mixed *= _SETTLE
        mixed ^= mixed >> _LESS
        return Reading(flat[: len(tokens)], seeds)


class Reading:
    """`states[p]` belongs to token p; `seeds[b]` is what block b begins from, one more than there are full blocks."""

    __slots__ = ("seeds", "states")

    def __init__(self, states: Words, seeds: list[int]) -> None:
        self.states = states
        self.seeds = seeds

    def of_block(self, block: int, size: int) -> Words:
        found: Words = self.states[block * size : (block + 1) * size]
        return found


class History:
    """The state of the last token, as tokens come one at a time; cheap enough for each token of a stream."""

    __slots__ = ("_at", "_contents", "_seed", "_sum", "_tail", "state")

    def __init__(self, contents: Contents, reading: Reading, tokens: Sequence[int]) -> None:
        """Behind `tokens`, at least one, of which `reading` is."""
        full = len(tokens) // contents.block_size
        self._contents = contents
        self._seed = reading.seeds[full]
        self._tail = list(tokens[full * contents.block_size :])
        self._at = len(self._tail)
        self._sum = sum(token_hash(token) * contents.places[at] for at, token in enumerate(self._tail)) & MASK
        self.state = int(reading.states[len(tokens) - 1])

    def push(self, token: int, hashed: int) -> None:
        """One more token, and its `token_hash`."""
        contents, at = self._contents, self._at
        self._sum = total = self._sum + hashed * contents.places[at] & MASK
        mixed = self._seed + total & MASK
        mixed = (mixed ^ mixed >> 32) * SETTLE & MASK
        self.state = mixed ^ mixed >> 29
        self._tail.append(token)
        self._at = at = at + 1
        if at == contents.block_size:
            self._seed = contents.next_seed(self._seed, wire.pack_tokens(self._tail))
            self._tail = []
            self._at = self._sum = 0

    def go_on(self, hashes: list[int], ids: list[int], key: int, excess: int, count: int) -> list[int]:
        """What Sampler.next and `push` do in turns, in one loop: half the time. Returns indices into the table."""
        contents, size = self._contents, len(ids)
        places, block_size = contents.places, contents.block_size
        seed, total, tail, state, found = self._seed, self._sum, self._tail, self.state, []
        for _ in range(count):
            mixed = (state ^ key) + excess & MASK
            mixed = (mixed ^ mixed >> 31) * SETTLE & MASK
            index = (mixed >> 32) * size >> 32
            found.append(index)
            total = total + hashes[index] * places[len(tail)] & MASK
            mixed = seed + total & MASK
            mixed = (mixed ^ mixed >> 32) * SETTLE & MASK
            state = mixed ^ mixed >> 29
            tail.append(ids[index])
            if len(tail) == block_size:
                seed, total, tail = contents.next_seed(seed, wire.pack_tokens(tail)), 0, []
        self._seed, self._sum, self._tail, self._at, self.state = seed, total, tail, len(tail), state
        return found
