"""Contents of prompts: a pure function of (seed, stream, position), so that equal streams are equal tokens.

A prompt is a row of segments; a segment is the beginning of a stream. Two prompts that begin with the same segments
share a real prefix, whichever process makes them and in whatever order.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

LOWEST_ID, IDS = 10, 190  # ids that any vocabulary has, above its special tokens
OWN_STREAM = 1 << 48  # + a request's number: tokens that nobody else has
GROUP_STREAM = 1 << 49  # + a group's number: a shared prefix
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64, https://prng.di.unimi.it/splitmix64.c
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body "
    "information back parent face others level office door health person art war history party result change morning "
    "reason research girl guy moment air teacher force education"
)
WORDS = _TEXT.split()


class Segment(msgspec.Struct, frozen=True):
    stream: int
    tokens: int


def token_ids(seed: int, segments: Sequence[Segment]) -> list[int]:
    ids: list[int] = (LOWEST_ID + _draws(seed, segments, IDS)).tolist()
    return ids


def text(seed: int, segments: Sequence[Segment]) -> str:
    """As many words as the segments have tokens."""
    return " ".join([WORDS[index] for index in _draws(seed, segments, len(WORDS)).tolist()])


def mixed(*numbers: int) -> int:
    """One 64-bit number that depends on all of these."""
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * _MIX_1) & _MASK
        state = ((state ^ (state >> 27)) * _MIX_2) & _MASK
        state ^= state >> 31
    return state


def _draws(seed: int, segments: Sequence[Segment], span: int) -> np.ndarray:
    """Of each token: a number below `span`."""
    parts = [
        np.arange(1, segment.tokens + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mixed(seed, segment.stream))
        for segment in segments
    ]
    state = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
    return (((state >> np.uint64(32)) * np.uint64(span)) >> np.uint64(32)).astype(np.int64)
