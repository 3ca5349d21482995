"""Which workers take a request: pure, from a snapshot of the fleet, by the predicted time to its first token.

`split` sends every request through prefill while a prefill worker lives, `unsplit` never, `auto` takes what is sooner
and keeps a prompt off a decode worker whose streams it would hold up beyond their target.

Requests wait at the gateway and are bound late. A worker gets its next prompt when the tokens that it has take less
than AHEAD_S and what a step costs by itself, so that its steps are as full as pays and no fuller; of a line beside a
tenant without one, when it should be done with what it has. It gets its next sequence when there is room for it.

Of many workers a few are looked at, of near-ties two at random ("the power of two choices", Mitzenmacher 2001):
gateways that know the same do not all choose the same. Invariant: prefill and decode of one request have the same
fingerprint, or one of them has not said.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from random import Random

import msgspec

AHEAD_S = 0.015  # above the way from "done" here to the next prompt there
END_S = 0.004  # before the end of what it has a worker gets what should have no head start;
GROUP_S = 0.002  # and, so soon after that, more of it: for the same step
AT_FIRST = 8  # prompts for a worker whose speed is not known
LAST_SHARE = 0.25  # of a prompt, at least, is sent when all of it is computed: its last chunk
LOOK_AT = 4  # workers with room that are compared, of as many as there are
LOOK_FOR = 8  # asked whether they may, where another way is open
TIE = 0.1  # predictions this close, as a share, say the same;
TIE_S = 0.02  # and so do those that no reader could tell apart: then load decides, or one worker would have it all


@dataclass(slots=True, kw_only=True, eq=False)
class Candidate:
    """A worker as placement sees it: predictions from its own figures and from what this gateway has just sent it.

    The fleet keeps one for each worker and brings it up to date in place (predict.py). Every time is 0 as long as it is
    not known; `token_s` says whether `prompt_s` and `begins_at` are.
    """

    id: str
    takes: frozenset[str]  # prefill, decode
    node: str = ""
    fingerprint: str = ""
    has_room: bool = True  # for another job
    load: float = 0.0  # share of its sequences that have a job
    prompts: int = 0  # that it has and not computed yet
    tokens_until: float = 0.0  # when it should have computed the tokens that it has,
    begins_at: float = 0.0  # with what its steps cost by themselves
    bound_at: float = 0.0  # when it was given its last prompt,
    done_at: float = 0.0  # and when it should be done with all of them
    prompt_s: float = 0.0  # what a step takes by itself,
    token_s: float = 0.0  # and each token in it more
    sequence_s: float = 0.0  # until a sequence is free
    step_s: float = 0.0  # of a decode step with one sequence more; 0: nothing else runs
    load_s: float = 0.0  # from a hand-off to the first token,
    load_token_s: float = 0.0  # and for each token of the prompt
    kv_free: float = inf  # tokens that the engine's KV cache has room for


class Wish(msgspec.Struct, eq=False, kw_only=True):
    """What placement must know of a prompt."""

    tokens: int
    output: int = 0  # tokens that it may be expected to be answered with, over all choices
    whole: str = ""  # why one worker must do it all: prompt_logprobs, or prefill_failed after an attempt
    hits: Mapping[str, int] = {}  # node -> leading tokens whose KV it holds

    @property
    def uncached(self) -> int:
        """Tokens to compute where most of it is held; the last one always is."""
        return max(1, self.tokens - max(self.hits.values(), default=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    arrangement: str  # split | unsplit | auto
    strategy: str = "predicted"  # or least_loaded: by load alone, for comparison
    local_prefill_tokens: int = 256  # auto, before speeds are known: shorter prompts are not split
    itl_s: float = inf  # target of the gap between tokens, on the decode side
    crowded: bool = False  # no head start: a worker gets its next prompts when it should be done with all others


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    decode: str
    prefill: str | None
    reason: str  # for the receipt
    predicted_ttft_s: float | None = None  # from now; None: a speed is not known yet

    @property
    def path(self) -> str:
        return "whole" if self.prefill is None else "split"


class Pools:
    """The candidates by the work that they take. Replaced one by one; looked up without walking over all."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._all: dict[str, Candidate] = {}
        self._shapes: dict[str, tuple[frozenset[str], str]] = {}  # what they take and their fingerprint
        self._open: dict[str, _Pool] = {"prefill": _Pool(), "decode": _Pool()}
        self._can_split: bool | None = None  # not known since the last change
        self.link_token_s = 0.0  # for a token's KV from node to node; 0: not known
        for candidate in candidates:
            self.put(candidate)

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self._all.values())

    def put(self, candidate: Candidate) -> None:
        """Also one that is here and has changed in place."""
        shape = candidate.takes, candidate.fingerprint
        if self._shapes.get(candidate.id) != shape:
            self._shapes[candidate.id] = shape
            self._can_split = None
        self._all[candidate.id] = candidate
        for work, pool in self._open.items():
            if candidate.has_room and work in candidate.takes:
                pool.put(candidate)
            else:
                pool.remove(candidate.id)

    def remove(self, worker: str) -> None:
        if self._all.pop(worker, None) is not None:
            del self._shapes[worker]
            self._can_split = None
            for pool in self._open.values():
                pool.remove(worker)

    def with_room(self, work: str) -> Sequence[Candidate]:
        return self._open[work].members

    def get(self, worker: str) -> Candidate | None:
        return self._all.get(worker)

    def takers(self, work: str) -> list[Candidate]:
        """Full or not."""
        return [one for one in self._all.values() if work in one.takes]

    @property
    def can_split(self) -> bool:
        """Whether any two fit. One that is full, or has just failed a request, still lives and is waited for."""
        if self._can_split is None:
            decoders = self.takers("decode")
            self._can_split = any(_fit(one, other) for one in self.takers("prefill") for other in decoders)
        return self._can_split


class _Pool:
    """A list without order from which one is taken out in constant time."""

    def __init__(self) -> None:
        self.members: list[Candidate] = []
        self._places: dict[str, int] = {}

    def put(self, candidate: Candidate) -> None:
        place_ = self._places.get(candidate.id)
        if place_ is None:
            self._places[candidate.id] = len(self.members)
            self.members.append(candidate)
        else:
            self.members[place_] = candidate

    def remove(self, worker: str) -> None:
        place_ = self._places.pop(worker, None)
        if place_ is None:
            return
        last = self.members.pop()
        if place_ < len(self.members):
            self.members[place_] = last
            self._places[last.id] = place_


def place(
    pools: Pools, wish: Wish, rules: Rules, *, avoid: Collection[str], random: Random, now: float
) -> Placement | None:
    """None: nobody has room now."""
    search = _Search(pools, wish, rules, avoid, random, now)
    if reason := _why_whole(pools, wish, rules):
        return search.whole(reason, gently=False)
    split = search.split(rules.arrangement)
    if rules.arrangement != "auto":
        return split
    return _sooner(split, search.whole("sooner", gently=True), wish, rules)


def takes_at(one: Candidate, rules: Rules, now: float) -> float:
    """From when on a worker that has prompts gets its next one."""
    if rules.crowded and now - one.bound_at > GROUP_S:
        return one.done_at - END_S
    return one.tokens_until - one.prompt_s - (0.0 if rules.crowded else AHEAD_S)


def other_prefiller(pools: Pools, decode: str, *, avoid: Collection[str], random: Random, now: float) -> str | None:
    """Who could take over a prefill job for this decode worker now; late binding is not for one that is late."""
    partner = pools.get(decode)
    able = [
        (max(0.0, one.begins_at - now), one)
        for one in pools.with_room("prefill")
        if one.id not in avoid and (partner is None or _fit(one, partner))
    ]
    best = _best(able, random)
    return best.id if best else None


@dataclass(slots=True)
class _Search:
    """One placement in the making. What it calls for every worker is kept flat: it is most of a placement's cost.

    Times to first token are inf for a worker that may not have the request.
    """

    pools: Pools
    wish: Wish
    rules: Rules
    avoid: Collection[str]
    random: Random
    now: float

    def split(self, reason: str) -> Placement | None:
        """The soonest pair of workers."""
        open_ = self.pools.with_room("prefill")
        prefill = _best(self._look(open_, self._prefill_s), self.random)
        if prefill is None:
            return None
        if (pair := self._pair(prefill, reason)) is not None:
            return pair
        # Its decode partners are full or of another shape; rare, so all others are tried.
        others = sorted((self._prefill_s(one), one.id, one) for one in open_ if one.id != prefill.id)
        pairs = (self._pair(one, reason) for prefill_s, _, one in others if prefill_s < inf)
        return next(filter(None, pairs), None)

    def whole(self, reason: str, *, gently: bool) -> Placement | None:
        """The soonest worker for everything. `gently`: only where it holds up no stream beyond its target."""
        gently = gently and self.rules.strategy == "predicted"
        itl_s = self.rules.itl_s

        def ttft_s(one: Candidate) -> float:
            if not self._can_decode(one):
                return inf
            if gently and one.load and one.step_s + self._prompt_s(one) > itl_s:
                return inf
            return max(self._prefill_s(one), one.sequence_s)

        found = self._look(self.pools.with_room("decode"), ttft_s, LOOK_FOR if gently else None)
        decode = _best(found, self.random)
        if decode is None:
            return None
        return Placement(
            decode=decode.id,
            prefill=None,
            reason=reason,
            predicted_ttft_s=ttft_s(decode) if decode.token_s else None,
        )

    def _pair(self, prefill: Candidate, reason: str) -> Placement | None:
        prefill_s = self._prefill_s(prefill)

        def begins_s(one: Candidate) -> float:
            """Without the hand-off: one that was measured in a bad moment would never be asked, nor measured, again."""
            if not self._can_decode(one) or not _fit(prefill, one):
                return inf
            return max(prefill_s, one.sequence_s) + self._way_s(prefill, one)

        decode = _best(self._look(self.pools.with_room("decode"), begins_s), self.random)
        if decode is None:
            return None
        ttft_s = begins_s(decode) + decode.load_s + decode.load_token_s * self.wish.tokens
        return Placement(
            decode=decode.id,
            prefill=prefill.id,
            reason=reason,
            predicted_ttft_s=ttft_s if prefill.token_s else None,
        )

    def _way_s(self, prefill: Candidate, decode: Candidate) -> float:
        """What is left of the way between two nodes when the prompt is computed: blocks go while it is."""
        token_s = self.pools.link_token_s
        if not token_s or prefill.node == decode.node:
            return 0.0
        way_s = token_s * (self.wish.tokens - self.wish.hits.get(decode.node, 0))
        return max(way_s * LAST_SHARE, way_s - self._prompt_s(prefill))

    def _look(
        self, pool: Sequence[Candidate], ttft_s: Callable[[Candidate], float], most: int | None = None
    ) -> list[tuple[float, Candidate]]:
        """A few who are able, from a random one on: all of them where they are few. `most`: not asked more."""
        found: list[tuple[float, Candidate]] = []
        by_load = self.rules.strategy == "least_loaded"
        first = int(self.random.random() * len(pool))
        start = first - len(pool)
        for index in range(start, first if most is None else min(first, start + most)):
            one = pool[index]
            score = ttft_s(one)
            if score < inf and one.id not in self.avoid:
                found.append((one.load if by_load else score, one))
                if len(found) == LOOK_AT:
                    break
        return found

    def _prefill_s(self, one: Candidate) -> float:
        if not one.token_s and one.prompts >= AT_FIRST and self.rules.strategy == "predicted":
            return inf
        ahead_s = one.begins_at - self.now
        if ahead_s <= 0:
            return self._prompt_s(one)
        if self.now < takes_at(one, self.rules, self.now) and self.rules.strategy == "predicted":
            return inf
        return ahead_s + self._prompt_s(one)

    def _prompt_s(self, one: Candidate) -> float:
        wish = self.wish
        return one.prompt_s + one.token_s * (wish.tokens - wish.hits.get(one.node, 0) if wish.hits else wish.tokens)

    def _can_decode(self, one: Candidate) -> bool:
        """Within the others' target, and with memory for this one's output. One that does nothing else always can."""
        if one.load == 0 or self.rules.strategy == "least_loaded":
            return True
        return one.step_s <= self.rules.itl_s and self.wish.tokens + self.wish.output <= one.kv_free


def _why_whole(pools: Pools, wish: Wish, rules: Rules) -> str:
    """Why one worker does it all; empty: the request may be split."""
    if wish.whole:
        return wish.whole
    if rules.arrangement == "unsplit":
        return "unsplit"
    return "" if pools.can_split else "no_prefill_worker"


def _sooner(split: Placement | None, whole: Placement | None, wish: Wish, rules: Rules) -> Placement | None:
    if split is None or whole is None:
        return split or whole
    if split.predicted_ttft_s is None or whole.predicted_ttft_s is None or rules.strategy == "least_loaded":
        if wish.tokens >= rules.local_prefill_tokens:
            return split
        return Placement(decode=whole.decode, prefill=None, reason="short_prompt")
    return whole if whole.predicted_ttft_s <= split.predicted_ttft_s else split


def _fit(prefill: Candidate, decode: Candidate) -> bool:
    """A worker that takes both does not hand over to itself: that is the whole path with a detour."""
    same = prefill.fingerprint == decode.fingerprint or not (prefill.fingerprint and decode.fingerprint)
    return same and prefill.id != decode.id


def _best(found: Sequence[tuple[float, Candidate]], random: Random) -> Candidate | None:
    """The one with the least; of those that are as good as alike, the less loaded of two."""
    if len(found) <= 1:
        return found[0][1] if found else None
    enough = min([score for score, _ in found]) * (1 + TIE) + TIE_S
    near = [one for score, one in found if score <= enough]
    if len(near) == 1:
        return near[0]
    first = int(random.random() * len(near))
    second = (first + 1 + int(random.random() * (len(near) - 1))) % len(near)
    one, other = near[first], near[second]
    return one if one.load <= other.load else other
