"""Numbers drawn from a distribution that a workload file names."""

import math
import random

import msgspec


class LogNormal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`sigma`: of the logarithm; what is above `max` becomes `max`."""

    median: float
    sigma: float
    max: float

    def __post_init__(self) -> None:
        if self.median <= 0 or self.sigma < 0 or self.max < self.median:
            raise ValueError("lognormal: median > 0, sigma >= 0 and max >= median")


class Distribution(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of these. `choice`: [value, weight] pairs."""

    constant: float | None = None
    uniform: tuple[float, float] | None = None
    lognormal: LogNormal | None = None
    choice: list[tuple[float, float]] | None = None

    def __post_init__(self) -> None:
        given = [getattr(self, name) for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("give one of constant, uniform, lognormal, choice")
        if self.constant is not None and self.constant < 0:
            raise ValueError("constant: must not be negative")
        if self.uniform is not None and not 0 <= self.uniform[0] <= self.uniform[1]:
            raise ValueError("uniform: [low, high] with 0 <= low <= high")
        if self.choice is not None and not _choosable(self.choice):
            raise ValueError("choice: [value, weight] pairs with values >= 0 and weights > 0")

    def draw(self, rng: random.Random) -> float:
        if self.uniform is not None:
            return rng.uniform(*self.uniform)
        if self.lognormal is not None:
            shape = self.lognormal
            return min(shape.max, shape.median * math.exp(rng.gauss(0.0, shape.sigma)))
        if self.choice is not None:
            return rng.choices([value for value, _ in self.choice], [weight for _, weight in self.choice])[0]
        return self.constant or 0.0


Length = float | Distribution  # in a file: a number, or a distribution


def draw(length: Length, rng: random.Random) -> float:
    return length.draw(rng) if isinstance(length, Distribution) else length


def count(length: Length, rng: random.Random, scale: float = 1.0) -> int:
    """Whole, at least 1."""
    return max(1, round(scale * draw(length, rng)))


def _choosable(choice: list[tuple[float, float]]) -> bool:
    return bool(choice) and all(value >= 0 and weight > 0 for value, weight in choice)
