"""The report's arithmetic: thinning keeps spikes, curves are measured values, numbers are written alike everywhere."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.report import quantities as q
from loadtest.report import series

VALUES = st.lists(st.none() | st.floats(0, 1e6), max_size=300)


@given(VALUES, st.integers(1, 50))
def test_thinning_to_the_worst_keeps_the_highest_value_and_stays_within_the_points(column, points):
    group = series.group_size(len(column), points)
    thinned = series.reduced(column, group, series.worst)
    assert len(thinned) <= points
    assert max(series.known(thinned), default=None) == max(series.known(column), default=None)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=300), st.integers(1, 20))
def test_thinned_levels_are_values_that_were_sampled_with_their_furthest_outlier(column, group):
    thinned = series.level(column, group)
    assert set(thinned) <= set(column)
    centre = series.mean(column)
    assert max(abs(value - centre) for value in thinned) == max(abs(value - centre) for value in column)


def test_a_bucket_of_which_nothing_is_known_stays_unknown():
    assert series.reduced([1.0, 3.0, None, None, None, 5.0], 2, series.mean) == [2.0, None, 5.0]


def test_a_dip_survives_thinning():
    column = [100.0] * 50 + [0.0] + [100.0] * 49
    assert 0.0 in series.level(column, 10)


@pytest.mark.parametrize(
    ("times_s", "step_s", "cells", "expected"),
    [
        ([0.0, 1.0, 2.0], 1.0, 3, [1.0, 2.0, 3.0]),
        ([0.0, 1.0, 2.0], 2.0, 2, [1.5, 3.0]),
        ([0.0, 0.1, 0.3], 0.1, 4, [1.0, 2.0, None, 3.0]),  # 0.3 / 0.1 is not quite 3
        ([0.0, 1.0, 9.0], 1.0, 3, [1.0, 2.0, None]),  # beyond the axis
    ],
)
def test_runs_with_other_buckets_share_a_grid(times_s, step_s, cells, expected):
    assert series.on_grid(times_s, [1.0, 2.0, 3.0], step_s, cells, series.mean) == expected


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([1.0, None, 3.0], [1.0, 1.0, 3.0]),
        ([1.0, None, None, 3.0], [1.0, None, None, 3.0]),
        ([None, 1.0, None], [None, 1.0, None]),
        ([], []),
    ],
)
def test_only_single_empty_cells_are_bridged(column, expected):
    assert series.bridged(column) == expected


def test_a_percentile_curve_passes_through_nearest_ranks_and_ends_at_the_largest_value():
    values = [float(value) for value in range(1, 101)]
    positions = [series.nines(at) for at in (0.0, 0.5, 0.9)] + [2.0, 3.0]
    assert series.percentile_curve(values, positions) == [1.0, 50.0, 90.0, 100.0, None]


@pytest.mark.parametrize("lengths", [[], [0], [1], [1, 7, 20_000], [100]])
def test_every_run_has_a_position_for_its_largest_value(lengths):
    positions = series.nines_positions(lengths)
    assert positions == sorted(set(positions))
    for length in filter(None, lengths):
        curve = series.percentile_curve([float(value) for value in range(length)], positions)
        assert len(curve) == len(positions)
        assert max(series.known(curve)) == length - 1
        assert series.known(curve) == sorted(series.known(curve))


def test_a_curve_of_nothing_is_unknown_throughout():
    assert series.percentile_curve([None, None], [0.0, 1.0]) == [None, None]


def test_the_share_within_a_bound_counts_what_is_unknown_as_a_miss():
    assert series.share_within([1.0, 2.0, None, 4.0], 4, [0.5, 1.0, 2.0, 9.0]) == [0.0, 0.25, 0.5, 0.75]
    assert series.share_within([], 0, [1.0]) == [0.0]


@given(VALUES)
def test_bounds_hold_both_ends_and_not_too_many_points(column):
    bounds = series.bounds([column])
    known = series.known(column)
    assert len(bounds) <= series.CURVE_POINTS
    assert bounds[:1] == ([min(known)] if known else [])
    assert bounds[-1:] == ([max(known)] if known else [])


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=60), st.integers(1, 10))
def test_groups_by_rank_add_up_to_the_rows(rows, cells):
    ranks, columns = series.by_rank(rows, cells)
    assert len(ranks) == min(cells, len(rows))
    assert all(0 < rank < 1 for rank in ranks)
    totals = [sum(parts) for parts in zip(*columns, strict=True)]
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(totals))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (0.00123456, "0.00123"),
        (1.0, "1.00"),
        (9.999, "10.0"),
        (12.34, "12.3"),
        (999.6, "1\u202f000"),
        (1234.5, "1\u202f230"),
        (1_820_496, "1\u202f820\u202f000"),
        (-0.5, "-0.500"),
        (float("inf"), q.UNKNOWN),
    ],
)
def test_three_significant_digits(value, written):
    assert q.significant(value) == written


@pytest.mark.parametrize(
    ("value_s", "written"),
    [(None, q.UNKNOWN), (0, "0 s"), (12e-6, "12.0 µs"), (0.0421, "42.1 ms"), (0.9996, "1.00 s"), (61.23, "61.2 s")],
)
def test_seconds_have_the_unit_that_fits(value_s, written):
    assert q.seconds(value_s).replace("\u00a0", " ") == written


@pytest.mark.parametrize(
    ("value_s", "written"), [(5, "5.00 s"), (119.6, "2 min 00 s"), (600, "10 min 00 s"), (7265, "2 h 01 min")]
)
def test_durations_read_as_a_clock(value_s, written):
    assert q.duration(value_s).replace("\u00a0", " ") == written


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, q.UNKNOWN), (0, "0 %"), (1, "100 %"), (0.9999, "> 99.9 %"), (0.00001, "< 0.05 %"), (0.968, "96.8 %")],
)
def test_only_all_is_a_hundred_per_cent(value, written):
    assert q.share(value).replace("\u00a0", " ").replace("\u200a", " ") == written


@pytest.mark.parametrize(
    ("value", "base", "expected"), [(2.0, 4.0, 0.5), (None, 1.0, None), (1.0, None, None), (1.0, 0.0, None)]
)
def test_a_ratio_needs_a_base(value, base, expected):
    assert q.ratio(value, base) == expected
