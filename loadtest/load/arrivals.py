"""When requests are meant to be sent, in seconds from the start: drawn before the run, by seed. Pure.

An open loop sends at these times whatever the server does, and latency counts from them: a server that falls behind
cannot make its clients ask less (no coordinated omission).
"""

from typing import Literal

import msgspec
import numpy as np

from shared.errors import SettingsError

Kind = Literal["poisson", "gamma", "constant", "ramp"]
MAX_ARRIVALS = 10_000_000


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """`rate`: a second. `cv`: of gamma's gaps, 1 is Poisson and more is bursts. `rate_to`: where a ramp ends."""

    kind: Kind = "poisson"
    rate: float
    cv: float = 1.0
    rate_to: float | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.rate) and self.rate > 0):
            raise SettingsError("--rate: requests a second, more than 0")
        if not (np.isfinite(self.cv) and self.cv > 0):
            raise SettingsError("--cv: the gaps' coefficient of variation, more than 0")
        if (self.kind == "ramp") != (self.rate_to is not None):
            raise SettingsError("--arrivals ramp and --rate-to belong together")
        if self.rate_to is not None and not (np.isfinite(self.rate_to) and self.rate_to > 0):
            raise SettingsError("--rate-to: requests a second, more than 0")


def drawn(shape: Shape, seed: int, *, seconds: float | None, requests: int | None) -> np.ndarray:
    """Ascending; ends with whichever bound comes first. Raises SettingsError without a usable bound."""
    if seconds is None and (requests is None or shape.kind == "ramp"):
        raise SettingsError("--seconds: needed for a ramp, and where there is no --requests")
    count = min(
        bound for bound in (requests, None if seconds is None else _enough(shape, seconds)) if bound is not None
    )
    if count > MAX_ARRIVALS:
        raise SettingsError(f"--rate, --seconds, --requests: more than {MAX_ARRIVALS:,} requests in one run")
    rng = np.random.default_rng(seed)
    times = _times(shape, rng, count, seconds)
    if seconds is None:
        return times
    while shape.kind == "gamma" and len(times) < (requests or MAX_ARRIVALS) and times[-1] < seconds:
        times = np.concatenate([times, times[-1] + _times(shape, rng, count, seconds)])[:requests]
    return times[times < seconds]


def _enough(shape: Shape, seconds: float) -> int:
    """More arrivals than fall into the time, all but surely; gamma's bursts may need another round."""
    expected = seconds * max(shape.rate, shape.rate_to or 0.0)
    return int(expected + 12 * max(1.0, shape.cv) * np.sqrt(expected) + 64)


def _times(shape: Shape, rng: np.random.Generator, count: int, seconds: float | None) -> np.ndarray:
    if shape.kind == "constant":
        return np.arange(count) / shape.rate
    if shape.kind == "gamma":
        order = 1.0 / shape.cv**2
        return np.cumsum(rng.gamma(order, 1.0 / (order * shape.rate), count))
    units = np.cumsum(rng.exponential(1.0, count))
    if shape.rate_to is None or seconds is None:
        return units / shape.rate
    # A Poisson process of rate r(t) = r0 + (r1 - r0) t / T: unit arrivals through the inverse of its integral.
    slope = (shape.rate_to - shape.rate) / seconds
    if abs(slope) < 1e-12:
        return units / shape.rate
    inside = shape.rate**2 + 2 * slope * units
    reached = inside >= 0  # of a falling ramp: the integral never gets further
    return (np.sqrt(inside[reached]) - shape.rate) / slope
