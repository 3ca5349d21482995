"""The smallest fleets that serve a load well. Pure: `try_` is asked what a fleet does.

Grows the tier that what went wrong points to, then takes away what is not needed. Invariant: what is returned was tried
and is good enough, and so with one worker less of either tier it is not, as far as that was tried.
"""

from collections.abc import Callable

import msgspec
import numpy as np

from loadtest.planning.fleet import Fleet, Served
from loadtest.slo import Slo

GROWTH = 1.25


class Goal(msgspec.Struct, frozen=True, kw_only=True):
    slo: Slo
    good_share: float  # of the requests
    max_workers: int

    def is_met(self, served: Served) -> bool:
        return float(np.mean(served.good)) >= self.good_share


Try = Callable[[Fleet], Served]


def smallest(try_: Try, goal: Goal, *, split: bool) -> tuple[Fleet, Served] | None:
    """None: not within `max_workers`."""
    fleet = Fleet(prefill=1 if split else 0, decode=1)
    served = try_(fleet)
    while not goal.is_met(served):
        fleet = _grown(fleet, served, goal.slo)
        if fleet.workers > goal.max_workers:
            return None
        served = try_(fleet)
    return _trimmed(fleet, served, try_, goal)


def _grown(fleet: Fleet, served: Served, slo: Slo) -> Fleet:
    late = ~(served.ttft_s <= slo.ttft_s)
    # A first token is late because of whichever took more of the time that it had.
    at_prefill = int(np.sum(late & (served.computed_s > served.ttft_s / 2)))
    at_decode = int(np.sum(late)) - at_prefill + int(np.sum(~served.steady))
    if fleet.prefill and at_prefill >= at_decode:
        return Fleet(prefill=_more(fleet.prefill), decode=fleet.decode)
    return Fleet(prefill=fleet.prefill, decode=_more(fleet.decode))


def _more(workers: int) -> int:
    return max(workers + 1, int(workers * GROWTH))


def _trimmed(fleet: Fleet, served: Served, try_: Try, goal: Goal) -> tuple[Fleet, Served]:
    while True:
        for less in _one_less(fleet):
            found = try_(less)
            if goal.is_met(found):
                fleet, served = less, found
                break
        else:
            return fleet, served


def _one_less(fleet: Fleet) -> list[Fleet]:
    """The larger tier first."""
    candidates = [
        Fleet(prefill=fleet.prefill, decode=fleet.decode - 1),
        Fleet(prefill=fleet.prefill - 1, decode=fleet.decode),
    ]
    if fleet.prefill > fleet.decode:
        candidates.reverse()
    return [one for one in candidates if one.decode >= 1 and one.prefill >= min(1, fleet.prefill)]
