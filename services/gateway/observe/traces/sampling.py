"""Which traces are kept. Pure: time is an argument.

At its start a request is sampled by ratio, as many a second as may be; at its end it is kept all the same when it
failed, was slow or had to be tried again, and then its spans are asked for, again as many a second as may be.
"""

from dataclasses import dataclass
from random import Random

BURST_S = 10.0  # of a bucket: what was not used for so long may be used at once


class TraceAllowance:
    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._level = max(1.0, per_s * BURST_S)
        self._at = 0.0

    def take(self, now: float) -> bool:
        self._level = min(max(1.0, self._per_s * BURST_S), self._level + (now - self._at) * self._per_s)
        self._at = now
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True


@dataclass(slots=True, kw_only=True)  # frozen would take three times as long to make, once a request
class Ending:
    """What the decision at the end goes by."""

    outcome: str  # ok | client_error | shed | error | cancelled
    duration_s: float
    ttft_s: float | None  # None: there was no token
    gap_s: float | None  # between tokens, on average
    target_ttft_s: float
    target_itl_s: float
    retries: int = 0

    @property
    def reason(self) -> str | None:
        """Why it is worth keeping whatever was sampled."""
        if self.outcome != "ok":
            return "error"
        if (self.ttft_s or 0.0) > self.target_ttft_s or (self.gap_s or 0.0) > self.target_itl_s:
            return "slow"
        return "retried" if self.retries else None


class Sampler:
    def __init__(self, ratio: float, per_s: float, random: Random) -> None:
        self._ratio = ratio
        self._random = random
        self._begun, self._ended = TraceAllowance(per_s), TraceAllowance(per_s)

    def begins(self, *, asked: bool, now: float) -> bool:
        """`asked`: the client's own trace is sampled."""
        if not (asked or self._ratio >= 1.0 or self._random.random() < self._ratio):
            return False
        return self._begun.take(now)

    def ends(self, ending: Ending, *, sampled: bool, now: float) -> str | None:
        """Why the trace is kept; None: it is not."""
        reason = ending.reason
        if sampled:
            return reason or "sampled"
        return reason if reason is not None and self._ended.take(now) else None
