"""fairness.json: what one tenant's flood cost another one's first token."""

from collections.abc import Sequence
from typing import Any

import msgspec

from loadtest.cluster.capacity import Capacity
from loadtest.load.answer import Outcome
from loadtest.result import Git, Machine, Result, Target
from loadtest.slo import Spread, spread

SCHEMA = 1
MOST_RATIO = 1.5  # of the TTFT p95 beside the flood to that alone


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one tenant's requests, all rounds together. `ttft`: one a request that was answered, seconds."""

    offered: int
    answered: int
    refused: int
    failed: int
    attempts: int
    ttft_s: Spread
    ttft: list[float]


class Fairness(msgspec.Struct, frozen=True, kw_only=True):
    """`ratio`: of the single tenant's TTFT p95 beside the flood to that alone."""

    schema: int = SCHEMA
    name: str = "fairness"
    started_at: str
    git: Git
    machine: Machine
    settings: dict[str, Any]
    target: Target
    capacity: Capacity
    flood_per_s: float
    alone: Share
    beside: Share
    flood: Share
    ratio_p50: float | None
    ratio_p95: float | None
    met: bool


def shared(results: Sequence[Result]) -> Share:
    """Of the requests that nobody gave up. Pure."""
    outcomes = [outcome for result in results for outcome in result.requests.outcome if outcome != Outcome.LEFT]
    ttft = [
        ttft_s
        for result in results
        for ttft_s, outcome in zip(result.requests.ttft_s, result.requests.outcome, strict=True)
        if outcome == Outcome.OK and ttft_s is not None
    ]
    answered, refused = outcomes.count(Outcome.OK), outcomes.count(Outcome.SHED)
    return Share(
        offered=len(outcomes),
        answered=answered,
        refused=refused,
        failed=len(outcomes) - answered - refused,
        attempts=sum(sum(result.requests.attempts) for result in results),
        ttft_s=spread(ttft),
        ttft=[round(value, 6) for value in ttft],
    )
