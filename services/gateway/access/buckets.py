"""Token buckets, pure: time is an argument.

A bucket holds one minute's worth of requests and one of tokens, and fills all the time. Invariants: a take takes both
or neither; over any span, no more is let through than the bucket held at its beginning and what flowed in since. Who
wants more than a bucket can hold gets it when the bucket is full, and leaves a debt that must flow in first: only a
share of a limit (quotas.py) is ever so small.
"""

from dataclasses import dataclass
from typing import NamedTuple

PERIOD_S = 60.0


class Amount(NamedTuple):
    """Of a limit, what may be had in PERIOD_S, which is the bucket's size, too; 0 there: no limit."""

    requests: float
    tokens: float

    def __truediv__(self, parts: float) -> "Amount":
        return Amount(self.requests / parts, self.tokens / parts)


@dataclass(slots=True)
class Bucket:
    left: Amount
    at: float

    def take(self, limits: Amount, cost: Amount, now: float) -> bool:
        self.refill(limits, now)
        if wait_s(self.left, limits, cost):
            return False
        self.left = Amount(self.left.requests - cost.requests, self.left.tokens - cost.tokens)
        return True

    def give(self, limits: Amount, back: Amount, now: float) -> None:
        self.refill(limits, now)
        self.left = Amount(
            min(limits.requests, self.left.requests + back.requests),
            min(limits.tokens, self.left.tokens + back.tokens),
        )

    def refill(self, limits: Amount, now: float) -> None:
        span_s = max(0.0, now - self.at)
        self.at = now
        self.left = Amount(
            *(min(limit, left + limit * span_s / PERIOD_S) for limit, left in zip(limits, self.left, strict=True))
        )


def wait_s(left: Amount, limits: Amount, cost: Amount) -> float:
    """Until `cost` can be taken: 0 now."""
    waits = [
        PERIOD_S * (min(wanted, limit) - there) / limit
        for limit, there, wanted in zip(limits, left, cost, strict=True)
        if limit
    ]
    return max(0.0, *waits) if waits else 0.0


def reset_s(left: float, limit: float) -> float:
    """Until the bucket is full."""
    return PERIOD_S * max(0.0, limit - left) / limit


def duration(seconds: float) -> str:
    """As OpenAI writes it: 120ms, 8.64s, 6m0s."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes:.0f}m{rest:.0f}s" if minutes else f"{rest:.4g}s"
