"""From measured steps to the terms of a profile.

Least absolute relative error under constraints: every term is zero or more and no knot lies below the one before it,
so that noise cannot make more work take less time. Solved as a series of weighted non-negative least squares
(C. L. Lawson, R. J. Hanson: Solving Least Squares Problems, 1974, chapter 23); the weights turn squares into
absolute values, so that a few disturbed steps do not bend the whole.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from loadtest.profiling.steps import Step

Floats = NDArray[np.float64]

ROUNDS = 12  # of reweighting; the terms stand still long before
LEAST_ERROR = 1e-3  # residuals below a thousandth weigh the same
LEAST_MS = 1e-3
END_GAP = 1.2  # a knot nearer to an end would leave the slope there to chance, and beyond the last it goes on
DIGITS = 6


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """The fitted fields of a Profile, by the same names."""

    prefill_ms: list[tuple[float, float]]
    decode_ms: list[tuple[float, float]]
    context_prefill_ms: float
    context_decode_ms: float
    overlap_ms: float


def fit(steps: Sequence[Step], prefill_knots: Sequence[int], decode_knots: Sequence[int]) -> Terms:
    """The knots are given as far as steps reach them. Needs steps that prefill and steps that decode."""
    prefill_knots = _reached(prefill_knots, [step.prefill_tokens for step in steps])
    decode_knots = _reached(decode_knots, [step.sequences for step in steps])
    rows = np.array([_features(step, prefill_knots, decode_knots) for step in steps])
    measured = np.array([1e3 * step.seconds for step in steps])
    found = _least_absolute(rows / measured[:, None], np.ones(len(steps)))
    prefill, rest = found[: len(prefill_knots)], found[len(prefill_knots) :]
    decode, (context_prefill, context_decode, overlap) = rest[:-3], rest[-3:]
    return Terms(
        prefill_ms=_knots(prefill_knots, prefill),
        decode_ms=_knots(decode_knots, decode),
        context_prefill_ms=_rounded(context_prefill),
        context_decode_ms=_rounded(context_decode),
        overlap_ms=_rounded(overlap),
    )


def _features(step: Step, prefill_knots: Sequence[int], decode_knots: Sequence[int]) -> list[float]:
    mixed = step.kind == "mixed"
    return [
        *_ramps(prefill_knots, step.prefill_tokens),
        *_ramps(decode_knots, step.sequences),
        step.pairs,
        step.context,
        -1.0 if mixed else 0.0,
    ]


def _ramps(knots: Sequence[int], x: float) -> list[float]:
    """1 for the first knot's time, then how far x has come through each interval; the last goes on past its end."""
    if not x:
        return [0.0] * len(knots)
    shares = [max(0.0, (x - low) / (high - low)) for low, high in pairwise(knots)]
    return [1.0, *(min(1.0, share) for share in shares[:-1]), *shares[-1:]]


def _reached(knots: Sequence[int], values: Sequence[int]) -> list[int]:
    """The least and the greatest of the values, and those knots between them that leave steps in every interval."""
    present = sorted({value for value in values if value})
    low, high = present[0], present[-1]
    kept = [low]
    for knot in knots:
        if low * END_GAP <= knot <= high / END_GAP and any(kept[-1] < value <= knot for value in present):
            kept.append(knot)
    return [*kept, high] if high > low else kept


def _least_absolute(rows: Floats, target: Floats) -> Floats:
    weights = np.ones(len(target))
    found = np.zeros(rows.shape[1])
    for _ in range(ROUNDS):
        found = non_negative(rows * weights[:, None], target * weights)
        weights = 1 / np.sqrt(np.maximum(np.abs(rows @ found - target), LEAST_ERROR))
    return found


def non_negative(rows: Floats, target: Floats) -> Floats:
    """The x >= 0 that minimises |rows x - target|, by Lawson and Hanson's active sets."""
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    rows = rows / scale
    x = np.zeros(rows.shape[1])
    free: Any = np.zeros(rows.shape[1], dtype=bool)
    for _ in range(3 * rows.shape[1]):
        gradient = rows.T @ (target - rows @ x)
        if free.all() or gradient[~free].max() <= 1e-9 * len(target):
            break
        free[np.argmax(np.where(free, -np.inf, gradient))] = True
        x, free = _descend(rows, target, x, free)
    return np.asarray(x / scale)


def _descend(rows: Floats, target: Floats, x: Floats, free: Any) -> tuple[Floats, Any]:
    """Least squares over the free columns; those that would become negative are tied to zero, one after another."""
    while True:
        wanted = np.zeros_like(x)
        wanted[free] = np.linalg.lstsq(rows[:, free], target, rcond=None)[0]
        falling = free & (wanted <= 0)
        if not falling.any():
            return wanted, free
        step = np.min(x[falling] / np.maximum(x[falling] - wanted[falling], 1e-300))
        x = x + step * (wanted - x)
        free = free & (x > 1e-12)
        x[~free] = 0.0


def _knots(places: Sequence[int], parts: Floats) -> list[tuple[float, float]]:
    times = np.cumsum(np.maximum(parts, 0.0))
    return [(float(x), max(_rounded(ms), LEAST_MS)) for x, ms in zip(places, times, strict=True)]


def _rounded(value: float) -> float:
    return float(f"{max(value, 0.0):.{DIGITS}g}")
