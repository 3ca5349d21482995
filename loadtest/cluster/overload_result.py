"""overload.json: the loads that were offered, what came of them on each cluster, and which aims were met."""

from collections.abc import Sequence
from typing import Any

import msgspec

from loadtest.cluster.capacity import Capacity
from loadtest.cluster.judge import Point
from loadtest.result import Git, Machine, Target
from loadtest.slo import Slo

SCHEMA = 1
GOODPUT_SHARE = 0.9  # of its peak, at the highest load
WITHIN_SHARE = 0.9  # of admitted requests
ARRIVAL_S = 0.05  # a refusal at arrival, p99
LATE_S = 0.05  # a refusal of the queue is as late as its way to the client


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """`points`: one a load, in their order."""

    name: str
    settings: dict[str, str]
    target: Target
    points: list[Point]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """`values`: by side; None where there is nothing to judge, which meets the aim."""

    what: str
    aim: str
    values: dict[str, float | None]
    met: dict[str, bool]


class Overload(msgspec.Struct, frozen=True, kw_only=True):
    """`loads`: multiples of the capacity."""

    schema: int = SCHEMA
    name: str = "overload"
    started_at: str
    git: Git
    machine: Machine
    settings: dict[str, Any]
    slo: Slo
    capacity: Capacity
    loads: list[float]
    sides: list[Side]
    checks: list[Check]


def checks(sides: Sequence[Side]) -> list[Check]:
    """The aims, judged at the worst load of each side. Pure."""
    return [
        _check(
            "goodput at the highest load, of its peak", f"at least {GOODPUT_SHARE:.0%}", sides, _kept, GOODPUT_SHARE
        ),
        _check("admitted within the TTFT target", f"at least {WITHIN_SHARE:.0%}", sides, _within, WITHIN_SHARE),
        _check("refusal at arrival, p99", f"at most {1e3 * ARRIVAL_S:g} ms", sides, _arrival_s, -ARRIVAL_S),
        _check("refusal from the queue after its deadline", f"at most {1e3 * LATE_S:g} ms", sides, _late_s, -LATE_S),
        _check("refusals with a wrong status or no Retry-After", "none", sides, _wrong, 0.0),
    ]


def _check(what: str, aim: str, sides: Sequence[Side], read: Any, bound: float) -> Check:
    """`bound`: the least; of figures that should be small both have a minus."""
    values = {side.name: read(side.points) for side in sides}
    sign = 1 if bound > 0 else -1
    return Check(
        what=what,
        aim=aim,
        values=values,
        met={name: value is None or sign * value >= bound for name, value in values.items()},
    )


def _kept(points: Sequence[Point]) -> float | None:
    peak = max((point.good_per_s for point in points), default=0.0)
    return points[-1].good_per_s / peak if peak else None


def _within(points: Sequence[Point]) -> float | None:
    return min((point.within for point in points if point.within is not None), default=None)


def _arrival_s(points: Sequence[Point]) -> float | None:
    return max((one.refusals.arrival_s.p99 for one in points if one.refusals.arrival_s.p99 is not None), default=None)


def _late_s(points: Sequence[Point]) -> float | None:
    return max((one.refusals.lateness_s.max for one in points if one.refusals.lateness_s.max is not None), default=None)


def _wrong(points: Sequence[Point]) -> float | None:
    return float(sum(sum(point.refusals.wrong.values()) for point in points))
