"""Percentiles and goodput. Pure.

A request is good when it was answered in full, its first token came within the TTFT target, and at least a share of its
gaps between tokens within the ITL target. Everything that was offered is the denominator: a rejection is a miss.
"""

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """`itl_share`: of a request's gaps, how many must be within `itl_s`."""

    ttft_s: float = 2.0
    itl_s: float = 0.1
    itl_share: float = 0.95


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """None for nothing."""

    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None
    mean: float | None = None


def rank(share: float, count: int) -> int:
    """Nearest rank, from 0: the smallest value that at least `share` of all do not exceed."""
    # 0.95 * 20 is a hair above 19: an exact share must not slip to the next value.
    return min(count - 1, max(0, math.ceil(share * count - 1e-9) - 1))


def percentile(values: Sequence[float] | Floats, share: float) -> float | None:
    """Nearest rank; None for nothing."""
    ranked = np.sort(np.asarray(values, dtype=np.float64))
    return float(ranked[rank(share, len(ranked))]) if len(ranked) else None


def percentiles(ranked: Floats, shares: Sequence[float]) -> list[float | None]:
    """Of values that ascend already."""
    return [float(ranked[rank(share, len(ranked))]) if len(ranked) else None for share in shares]


def spread(values: Sequence[float] | Floats) -> Spread:
    ranked = np.sort(np.asarray(values, dtype=np.float64))
    if not len(ranked):
        return Spread()
    p50, p90, p95, p99 = percentiles(ranked, (0.5, 0.9, 0.95, 0.99))
    return Spread(p50=p50, p90=p90, p95=p95, p99=p99, max=float(ranked[-1]), mean=float(ranked.mean()))


def ranks(share: float, counts: Ints) -> Ints:
    """`rank` of many counts; 0 for none."""
    wanted: Ints = np.ceil(share * counts - 1e-9).astype(np.int64) - 1
    return np.clip(wanted, 0, np.maximum(counts - 1, 0))


def good(ok: Bools, ttft_s: Floats, gaps: Ints, gaps_in_time: Ints, slo: Slo) -> Bools:
    """One entry a request. `ttft_s`: nan where no token came; `gaps_in_time`: of its gaps, those within the target."""
    return ok & (np.nan_to_num(ttft_s, nan=np.inf) <= slo.ttft_s) & steady(gaps, gaps_in_time, slo)


def steady(gaps: Ints, gaps_in_time: Ints, slo: Slo) -> Bools:
    """Whether enough of a request's gaps are within the target."""
    even: Bools = gaps_in_time >= slo.itl_share * gaps - 1e-9
    return even
