"""What one run under overload says, by request and by attempt. Pure.

A request is offered once, however often its client tries. It was *admitted* when an attempt of it was not refused; its
TTFT counts from that attempt, and from its first send, and both are told. Rates count what ended inside the window, so
that neither the start nor the retries after the last arrival weigh; shares are of what was sent inside it.
"""

import bisect
from collections import Counter
from collections.abc import Sequence

import msgspec

from loadtest.load.answer import Outcome
from loadtest.load.drive import INTERRUPTED
from loadtest.result import Result, Tries
from loadtest.slo import Slo, Spread, spread
from shared.errors import Refused, all_errors

STATUS = {code: error.status for code, error in all_errors().items() if issubclass(error, Refused)}
AT_ARRIVAL_SHARE = 0.5  # of the TTFT target: a refusal that took longer had waited in line, unless the server says so


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from the run's start."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    def holds(self, at_s: float | None) -> bool:
        return at_s is not None and self.start_s <= at_s < self.end_s


class Refusals(msgspec.Struct, frozen=True, kw_only=True):
    """Attempts that were refused. `arrival_s`: from send to answer, of those refused at once.

    `lateness_s`: of those that had waited in line, the answer after the TTFT target, negative before it. `asked_s`:
    Retry-After; `needed_s`: until somebody who came later was admitted. `wrong`: without Retry-After, or with another
    status than their reason has, or told inside a stream.
    """

    count: int
    reasons: dict[str, int]
    at_arrival: int
    arrival_s: Spread
    queued: int
    lateness_s: Spread
    asked_s: Spread
    needed_s: Spread
    wrong: dict[str, int]


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one cluster.

    Of the requests that were sent inside the window: `offered`, `admitted`, `within` (the share of those whose first
    token came within the target, from the attempt that was admitted) and `within_request` (from the first send).
    `unanswered`: admitted or still in line, without a first token when the run was given up: misses. `retried`:
    requests that were refused and tried again; `helped`: the share of those that were answered then. `client_`: how
    late the generator itself was, and its share of a core.
    """

    offered_per_s: float
    attempts_per_s: float
    answered_per_s: float
    good_per_s: float
    good_request_per_s: float
    offered: int
    admitted: int
    within: float | None
    within_request: float | None
    steady: float | None
    unanswered: int
    failed: dict[str, int]
    ttft_s: Spread
    ttft_request_s: Spread
    retried: int
    helped: float | None
    refusals: Refusals
    client_late_p99_s: float | None
    client_cpu_share: float


class _Seen(msgspec.Struct, frozen=True):
    """One request that was not refused in the end. Times to the first token; None: none came."""

    sent_s: float
    end_s: float | None
    ttft_s: float | None
    ttft_request_s: float | None
    outcome: str
    steady: bool

    def good(self, bound_s: float, *, whole: bool = False) -> bool:
        took_s = self.ttft_request_s if whole else self.ttft_s
        return self.outcome == Outcome.OK and took_s is not None and took_s <= bound_s and self.steady


def judge(result: Result, window: Window) -> Point:
    requests, slo = result.requests, result.slo
    tries = result.tries or _none()
    seen = _admitted(result)
    inside = [one for one in seen if window.holds(one.sent_s)]
    ended = [one for one in seen if window.holds(one.end_s)]
    first = [one for one in inside if one.ttft_s is not None]
    retried = {request for request, number in zip(tries.request, tries.number, strict=True) if number > 0}
    retried |= {place for place, attempts in enumerate(requests.attempts) if attempts > 1}
    got_in = sum(requests.outcome[place] == Outcome.OK for place in retried)
    offered = sum(map(window.holds, requests.intended_s))
    attempts = sum(map(window.holds, tries.sent_s)) + sum(window.holds(one.sent_s) for one in seen)
    return Point(
        offered_per_s=offered / window.seconds,
        attempts_per_s=attempts / window.seconds,
        answered_per_s=sum(one.outcome == Outcome.OK for one in ended) / window.seconds,
        good_per_s=sum(one.good(slo.ttft_s) for one in ended) / window.seconds,
        good_request_per_s=sum(one.good(slo.ttft_s, whole=True) for one in ended) / window.seconds,
        offered=offered,
        admitted=len(inside),
        within=_share(sum(one.ttft_s <= slo.ttft_s for one in first if one.ttft_s is not None), len(inside)),
        within_request=_share(
            sum(one.ttft_request_s <= slo.ttft_s for one in first if one.ttft_request_s is not None), len(inside)
        ),
        steady=_share(sum(one.steady for one in first), len(first)),
        unanswered=sum(one.outcome == Outcome.LEFT for one in inside if one.ttft_s is None),
        failed=_failures(result, window),
        ttft_s=spread([one.ttft_s for one in first if one.ttft_s is not None]),
        ttft_request_s=spread([one.ttft_request_s for one in first if one.ttft_request_s is not None]),
        retried=len(retried),
        helped=_share(got_in, len(retried)),
        refusals=_refusals(tries, sorted(one.sent_s for one in first), window, slo),
        client_late_p99_s=result.client.lateness_s.p99,
        client_cpu_share=result.client.cpu_share,
    )


def _admitted(result: Result) -> list[_Seen]:
    """All whose last attempt was not refused and reached the server."""
    requests = result.requests
    sent = requests.last_sent_s or requests.sent_s
    steady = requests.steady or requests.good
    found = []
    for place, outcome in enumerate(requests.outcome):
        sent_s, ttft_s = sent[place], requests.ttft_s[place]
        if sent_s is None or outcome == Outcome.SHED or requests.code[place] in STATUS:
            continue
        token_s = None if ttft_s is None else requests.intended_s[place] + ttft_s
        found.append(
            _Seen(
                sent_s=sent_s,
                end_s=requests.end_s[place],
                ttft_s=None if token_s is None else token_s - sent_s,
                ttft_request_s=None if token_s is None else token_s - (requests.sent_s[place] or sent_s),
                outcome=outcome,
                steady=steady[place],
            )
        )
    return found


def _failures(result: Result, window: Window) -> dict[str, int]:
    """By code, of the requests that were neither answered nor refused, and that nobody gave up."""
    requests = result.requests
    codes = [
        requests.code[place] or outcome
        for place, outcome in enumerate(requests.outcome)
        if outcome not in (Outcome.OK, Outcome.SHED)
        and requests.code[place] not in STATUS
        and requests.code[place] != INTERRUPTED
        and window.holds(requests.intended_s[place])
    ]
    return dict(Counter(codes).most_common())


def _refusals(tries: Tries, admitted_s: Sequence[float], window: Window, slo: Slo) -> Refusals:
    """`admitted_s`: when the attempts that were let in were sent, ascending."""
    reasons: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    arrival: list[float] = []
    lateness: list[float] = []
    asked: list[float] = []
    needed: list[float] = []
    for place, code in enumerate(tries.code):
        if not window.holds(tries.sent_s[place]) or not (tries.outcome[place] == Outcome.SHED or code in STATUS):
            continue
        reasons[code] += 1
        took_s = tries.end_s[place] - tries.sent_s[place]
        if _waited(tries.queued_s[place], took_s, slo):
            lateness.append(took_s - slo.ttft_s)
        else:
            arrival.append(took_s)
        for fault in _faults(tries, place):
            wrong[fault] += 1
        if (wanted_s := tries.retry_after_s[place]) is not None:
            asked.append(wanted_s)
        next_in = bisect.bisect_left(admitted_s, tries.end_s[place])
        if next_in < len(admitted_s):
            needed.append(admitted_s[next_in] - tries.end_s[place])
    return Refusals(
        count=reasons.total(),
        reasons=dict(reasons.most_common()),
        at_arrival=len(arrival),
        arrival_s=spread(arrival),
        queued=len(lateness),
        lateness_s=spread(lateness),
        asked_s=spread(asked),
        needed_s=spread(needed),
        wrong=dict(wrong),
    )


def _waited(queued_s: float | None, took_s: float, slo: Slo) -> bool:
    """Whether it stood in line before it was refused."""
    return took_s >= AT_ARRIVAL_SHARE * slo.ttft_s if queued_s is None else queued_s > 0


def _faults(tries: Tries, place: int) -> list[str]:
    code, status = tries.code[place], tries.status[place]
    found = []
    if code not in STATUS:
        found.append("unknown reason")
    elif status == 200:
        found.append("told inside a stream")
    elif status != STATUS[code]:
        found.append("another status")
    if status != 200 and tries.retry_after_s[place] is None:
        found.append("no Retry-After")
    return found


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _none() -> Tries:
    return Tries(
        request=[],
        number=[],
        sent_s=[],
        end_s=[],
        outcome=[],
        status=[],
        code=[],
        retry_after_s=[],
        queued_s=[],
    )
