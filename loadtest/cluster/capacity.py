"""How many good requests a second a cluster can give: a closed loop at rising concurrency until goodput falls. Pure.

A closed loop offers no more than is answered, so it finds the knee without ever being overloaded: below it goodput
rises with the clients, beyond it the first token comes too late.
"""

from collections.abc import Sequence

import msgspec

MOST_CLIENTS = 512
PAST = 0.8  # of the best: the knee lies behind
FLAT = 1.05  # twice the clients and no more goodput than this


class Step(msgspec.Struct, frozen=True, kw_only=True):
    clients: int
    good_per_s: float
    answered_per_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """`steps` are empty where it was given."""

    per_s: float
    how: str
    steps: list[Step] = []


def next_clients(steps: Sequence[Step]) -> int | None:
    """Twice as many until goodput falls or stays flat; then once between the best and its neighbour. None: enough."""
    if not steps:
        return 1
    best = max(steps, key=lambda step: step.good_per_s)
    tried = {step.clients for step in steps}
    between = best.clients * 3 // 2
    last = max(tried)
    doubling = sorted((step for step in steps if step.clients & (step.clients - 1) == 0), key=lambda step: step.clients)
    if not _past(doubling, best.good_per_s) and last < MOST_CLIENTS and len(doubling) == len(steps):
        return 2 * last
    return between if between not in tried and len(doubling) == len(steps) and best.clients < last else None


def _past(doubling: Sequence[Step], best_per_s: float) -> bool:
    """`doubling`: ascending by clients."""
    if best_per_s > 0 and doubling[-1].good_per_s < PAST * best_per_s:
        return True
    return len(doubling) > 2 and doubling[-1].good_per_s <= FLAT * doubling[-3].good_per_s


def capacity(steps: Sequence[Step], seconds: float) -> Capacity:
    best = max(steps, key=lambda step: step.good_per_s)
    return Capacity(
        per_s=best.good_per_s,
        how=f"the best goodput of a closed loop at rising concurrency, {seconds:g} s a step: {best.clients} clients",
        steps=sorted(steps, key=lambda step: step.clients),
    )
