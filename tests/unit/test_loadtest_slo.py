"""Percentiles and goodput."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.slo import Slo, Spread, good, percentile, rank, ranks, spread

SLO = Slo(ttft_s=1.0, itl_s=0.1, itl_share=0.95)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, None),
        ([7], 0.5, 7),
        ([7], 0.99, 7),
        ([1, 2], 0.5, 1),
        ([1, 2], 0.51, 2),
        ([4, 1, 3, 2], 0.5, 2),
        (range(1, 101), 0.9, 90),
        (range(1, 101), 0.99, 99),
        (range(1, 101), 1.0, 100),
        (range(1, 21), 0.95, 19),  # 0.95 * 20 is a hair above 19 in floats
        (range(1, 1001), 0.999, 999),
        ([5, 1], 0.0, 1),
    ],
)
def test_nearest_rank(values, share, expected):
    assert percentile(list(values), share) == expected


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0.001, 1.0))
def test_as_many_values_are_not_above(values, share):
    """The definition itself: the smallest value that at least this share does not exceed."""
    found = percentile(values, share)
    below = sum(value <= found for value in values)
    strictly = sum(value < found for value in values)
    assert below >= share * len(values) - 1e-6
    assert strictly < share * len(values) + 1e-6


@given(st.lists(st.integers(0, 200), max_size=20), st.floats(0.0, 1.0))
def test_ranks_are_rank_for_many(counts, share):
    expected = [rank(share, count) if count else 0 for count in counts]
    assert ranks(share, np.array(counts, dtype=np.int64)).tolist() == expected


def test_spread():
    assert spread([]) == Spread()
    assert spread([3.0, 1.0, 2.0]) == Spread(p50=2.0, p90=3.0, p95=3.0, p99=3.0, max=3.0, mean=2.0)


@pytest.mark.parametrize(
    ("ok", "ttft_s", "gaps", "in_time", "expected"),
    [
        (True, 0.5, 20, 20, True),
        (True, 1.0, 20, 20, True),  # on the target
        (True, 1.001, 20, 20, False),
        (True, 0.5, 20, 19, True),  # 95 %
        (True, 0.5, 20, 18, False),
        (True, 0.5, 0, 0, True),  # one token has no gap
        (True, math.nan, 0, 0, False),  # no token at all
        (False, 0.1, 20, 20, False),  # refused, failed, wrong: a miss, however fast
    ],
)
def test_good(ok, ttft_s, gaps, in_time, expected):
    found = good(np.array([ok]), np.array([ttft_s]), np.array([gaps]), np.array([in_time]), SLO)
    assert found.tolist() == [expected]
