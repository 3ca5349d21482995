"""Which workers take a request: pure, from a snapshot of the fleet.

`split` sends every request through prefill while a prefill worker lives, `unsplit` never, `auto` keeps short prompts
on one worker. A worker without room (running and waiting at their limits) is not chosen: requests wait at the gateway.
Invariant: prefill and decode of one request have the same fingerprint, or one of them has not said.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A worker as placement sees it: its own figures plus what this gateway has just sent it."""

    id: str
    takes: frozenset[str]  # prefill, decode
    node: str = ""
    fingerprint: str = ""
    jobs: int = 0
    queued_tokens: int = 0
    max_running: int = 0  # 0: it has not said, so any number
    max_waiting: int = 0
    kv_usage: float = 0.0
    prefill_tokens_per_s: float = 0.0  # 0: not known yet
    decode_step_s: float = 0.0

    @property
    def has_room(self) -> bool:
        return self.max_running == 0 or self.jobs < self.max_running + self.max_waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What placement must know of a request."""

    tokens: int  # of its prompt
    whole: str = ""  # why one worker must do it all: prompt_logprobs, or prefill_failed after an attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    decode: str
    prefill: str | None
    reason: str  # for the receipt
    predicted_ttft_s: float | None = None  # None: a rate is not known yet

    @property
    def path(self) -> str:
        return "whole" if self.prefill is None else "split"


def place(
    candidates: Sequence[Candidate],
    wish: Wish,
    *,
    arrangement: str,
    local_prefill_tokens: int,
    avoid: Collection[str],
    random: Random,
) -> Placement | None:
    """None: nobody has room now."""
    decoders = [one for one in candidates if "decode" in one.takes and one.id not in avoid and one.has_room]
    reason = _why_whole(candidates, wish, arrangement, local_prefill_tokens)
    if reason:
        best = _least_loaded(decoders, random)
        if best is None:
            return None
        predicted = _predicted(best, best, wish)
        return Placement(decode=best.id, prefill=None, reason=reason, predicted_ttft_s=predicted)
    for prefill in prefillers(candidates, avoid, random):
        decode = _least_loaded([one for one in decoders if _fit(prefill, one)], random)
        if decode is not None:
            predicted = _predicted(prefill, decode, wish)
            return Placement(decode=decode.id, prefill=prefill.id, reason=arrangement, predicted_ttft_s=predicted)
    return None


def prefillers(candidates: Sequence[Candidate], avoid: Collection[str], random: Random) -> list[Candidate]:
    """Those with room for a prefill job, best first."""
    able = [one for one in candidates if "prefill" in one.takes and one.id not in avoid and one.has_room]
    return sorted(able, key=lambda one: (_prefill_load(one), random.random()))


def _why_whole(candidates: Sequence[Candidate], wish: Wish, arrangement: str, local_prefill_tokens: int) -> str:
    """Why one worker does it all; empty: the request is split."""
    if wish.whole:
        return wish.whole
    if arrangement == "unsplit":
        return "unsplit"
    # One that is full, or has just failed this request, still lives: wait for it rather than change the path.
    takers = [one for one in candidates if "prefill" in one.takes]
    decoders = [one for one in candidates if "decode" in one.takes]
    if decoders and not any(_fit(prefill, decode) for prefill in takers for decode in decoders):
        return "no_prefill_worker"
    if arrangement == "auto" and wish.tokens < local_prefill_tokens:
        return "short_prompt"
    return ""


def _fit(prefill: Candidate, decode: Candidate) -> bool:
    """A worker that takes both does not hand over to itself: that is the whole path with a detour."""
    same = not (prefill.fingerprint and decode.fingerprint) or prefill.fingerprint == decode.fingerprint
    return same and prefill.id != decode.id


def _least_loaded(candidates: list[Candidate], random: Random) -> Candidate | None:
    able = [one for one in candidates if one.has_room]
    return min(able, key=lambda one: (_decode_load(one), random.random()), default=None)


def _prefill_load(one: Candidate) -> tuple[float, float]:
    """Seconds of work ahead; in tokens where no rate is known."""
    return (one.queued_tokens / (one.prefill_tokens_per_s or 1.0), one.jobs)


def _decode_load(one: Candidate) -> tuple[float, float]:
    return (one.jobs / (one.max_running or 1), one.kv_usage)


def _predicted(prefill: Candidate, decode: Candidate, wish: Wish) -> float | None:
    if not prefill.prefill_tokens_per_s:
        return None
    return (prefill.queued_tokens + wish.tokens) / prefill.prefill_tokens_per_s + decode.decode_step_s
