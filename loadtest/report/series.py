"""The arithmetic of curves: fewer points without losing a spike, percentile curves, shares within a bound.

Invariants: nothing here is sorted twice or invented: a point of a curve is a value that was measured, or the stated
reduction of neighbouring buckets. `None` stands for "not known" and never counts as zero.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence

from loadtest.slo import rank

POINTS = 2000  # what a chart shows at most in a series; a screen has fewer columns
RATE_POINTS = 150  # requests come at random: in shorter buckets their rate is a fuzz
CURVE_POINTS = 240

Value = float | None
Column = Sequence[Value]
Reducer = Callable[[Sequence[float]], float]


def mean(values: Sequence[float]) -> float:
    """For rates: the buckets are of one length, so the mean is the rate of the longer bucket."""
    return sum(values) / len(values)


def worst(values: Sequence[float]) -> float:
    """For latencies: a spike stays as high as it was."""
    return max(values)


def furthest_from(centre: float) -> Reducer:
    """For levels: peaks and dips alike survive."""
    return lambda values: max(values, key=lambda value: abs(value - centre))


def known(column: Column) -> list[float]:
    return [value for value in column if value is not None]


def reduced(column: Column, group: int, reduce: Reducer) -> list[Value]:
    """Every `group` neighbours as one value, made of those that are known."""
    if group <= 1:
        return list(column)
    cells = (known(column[start : start + group]) for start in range(0, len(column), group))
    return [reduce(cell) if cell else None for cell in cells]


def group_size(length: int, points: int = POINTS) -> int:
    return max(1, math.ceil(length / points))


def level(column: Column, group: int) -> list[Value]:
    """A sampled level, thinned so that both its peaks and its dips stay."""
    values = known(column)
    return reduced(column, group, furthest_from(mean(values) if values else 0.0))


def on_grid(times_s: Sequence[float], column: Column, step_s: float, cells: int, reduce: Reducer) -> list[Value]:
    """A column on buckets of `step_s` from 0, so that runs with other buckets share one axis. Empty cells are None."""
    found: list[list[float]] = [[] for _ in range(cells)]
    for time_s, value in zip(times_s, column, strict=True):
        cell = int(time_s / step_s + 1e-9)  # 0.3 / 0.1 is 2.9999…: a bucket belongs where it says it starts
        if value is not None and 0 <= cell < cells:
            found[cell].append(value)
    return [reduce(cell) if cell else None for cell in found]


def bridged(column: Column) -> list[Value]:
    """An empty cell between two samples holds the one before: a sampler that is a little late leaves such cells."""
    cells = list(column)
    for place in range(1, len(cells) - 1):
        if column[place] is None and column[place - 1] is not None and column[place + 1] is not None:
            cells[place] = column[place - 1]
    return cells


def percentile(ordered: Sequence[float], at: float) -> float:
    """Nearest rank of a sorted, non-empty sequence; `at` from 0 to 1."""
    return ordered[rank(at, len(ordered))]


def nines(at: float) -> float:
    """Where a percentile lies on an axis that gives every nine the same width: 0.9 at 1, 0.99 at 2, 0.999 at 3."""
    return -math.log10(1 - at)


def nines_positions(lengths: Sequence[int], points: int = CURVE_POINTS) -> list[float]:
    """Evenly spaced positions on the axis of nines, and where the largest of so many values stands, for each number."""
    ends = {math.log10(length) for length in lengths if length}
    last = max({1.0, *ends})  # an axis that has some length even for a single value
    return sorted({last * number / (points - 1) for number in range(points)} | ends)


def percentile_curve(values: Column, positions: Sequence[float]) -> list[Value]:
    """The percentile at every position, the largest value at its own; None beyond what so few values can tell."""
    ordered = sorted(known(values))
    if not ordered:
        return [None] * len(positions)
    end = math.log10(len(ordered))
    below = [percentile(ordered, 1 - 10**-position) for position in positions if position < end]
    return (
        [*below, ordered[-1], *[None] * (len(positions) - len(below) - 1)]
        if len(below) < len(positions)
        else list(below)
    )


def bounds(columns: Sequence[Column], points: int = CURVE_POINTS) -> list[float]:
    """The values at which cumulative curves of these columns are drawn: evenly by rank, both ends included."""
    chosen: set[float] = set()
    for column in columns:
        ordered = sorted(known(column))
        if ordered:
            steps = min(points, len(ordered))
            chosen.update(ordered[round(step * (len(ordered) - 1) / max(steps - 1, 1))] for step in range(steps))
    return sorted(chosen)


def share_within(column: Column, total: int, limits: Sequence[float]) -> list[float]:
    """Per limit, how many of `total` are known and not above it. What is not known is a miss."""
    ordered = sorted(known(column))
    return [bisect.bisect_right(ordered, limit) / total if total else 0.0 for limit in limits]


def by_rank(rows: Sequence[Sequence[float]], cells: int) -> tuple[list[float], list[list[float]]]:
    """Rows sorted by their sum, in at most `cells` groups of neighbours: the middle ranks (0 to 1) and mean columns."""
    ordered = sorted(rows, key=sum)
    cells = min(cells, len(ordered))
    edges = [round(cell * len(ordered) / cells) for cell in range(cells + 1)] if cells else [0]
    ranks, columns = [], []
    for start, end in itertools.pairwise(edges):
        ranks.append((start + end) / 2 / len(ordered))
        columns.append([mean(part) for part in zip(*ordered[start:end], strict=True)])
    return ranks, [list(column) for column in zip(*columns, strict=True)]
