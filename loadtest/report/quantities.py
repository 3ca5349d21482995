"""How the report writes numbers: three significant digits, a unit, and a dash for what is not known."""

import math

UNKNOWN = "\u2013"


def significant(value: float) -> str:
    """Three significant digits without an exponent; thousands are set apart: 0.00123, 12.3, 1 230."""
    if not math.isfinite(value):
        return UNKNOWN
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    # Rounding up may add a digit in front: 9.999 becomes 10.0, not 10.00.
    digits = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(digits, 0)}f}".replace(",", "\u202f")


def count(value: float | None) -> str:
    """A whole number in full, thousands set apart."""
    return UNKNOWN if value is None else f"{value:,.0f}".replace(",", "\u202f")


def several(value: int, noun: str) -> str:
    """1 request, 2 requests."""
    return f"{count(value)} {noun if value == 1 else noun + 's'}"


def seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    magnitude = abs(value)
    if magnitude == 0:
        return "0\u00a0s"
    if magnitude < 0.9995e-3:
        return f"{significant(value * 1e6)}\u00a0µs"
    if magnitude < 0.9995:
        return f"{significant(value * 1e3)}\u00a0ms"
    return f"{significant(value)}\u00a0s"


def bound(value_s: float) -> str:
    """A number that somebody chose, as they wrote it: 2 s, 100 ms."""
    return f"{value_s:g}\u00a0s" if value_s >= 1 else f"{value_s * 1e3:g}\u00a0ms"


def duration(value: float) -> str:
    """How long a run was: seconds below two minutes, then minutes and seconds, then hours and minutes."""
    if value < 119.5:
        return f"{significant(value)}\u00a0s"
    whole = round(value)
    if whole < 7200:
        return f"{whole // 60}\u00a0min {whole % 60:02}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60:02}\u00a0min"


def rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{significant(value)}\u00a0/s"


def share(value: float | None) -> str:
    """A part of one as a percentage. Only all is 100 %, and only nothing is 0 %."""
    if value is None:
        return UNKNOWN
    if 0.9995 <= value < 1:
        return ">\u200a99.9\u00a0%"
    if 0 < value < 0.0005:
        return "<\u200a0.05\u00a0%"
    return f"{significant(100 * value)}\u00a0%" if 0 < value < 1 else f"{100 * value:g}\u00a0%"


def ratio(value: float | None, base: float | None) -> float | None:
    """`value` over `base`; not known where either is missing or the base is nothing."""
    if value is None or base is None or base == 0:
        return None
    return value / base


def times(value: float | None) -> str:
    return UNKNOWN if value is None else f"{significant(value)}\u00d7"
