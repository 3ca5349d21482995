"""Traffic of the last quarter of an hour, over all gateways: rates, percentiles, shares, and their course.

Pure: time is an argument. Invariants: memory is bounded whatever comes; a service that starts anew is counted from
zero; who is heard for the first time is counted from then on.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from services.gateway.observe.dashboard import counts
from services.gateway.observe.dashboard.counts import Counts, Given

FINE_S = 1.0
MINUTE_S = 60.0
SLOT_S = 5.0
QUARTER_S = 900.0
RATE_S = 5.0  # what "now" means for a rate
MAX_SOURCES = 1280  # gateways and stores
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
BUSIEST = 3  # tenants
FAILED = ("shed", "error")  # these and `ok` are what goodput is a share of: the others are the client's doing


class Ring:
    """Slots of equal length; those older than `keep_s` are forgotten."""

    def __init__(self, slot_s: float, keep_s: float) -> None:
        self.slot_s = slot_s
        self.size = round(keep_s / slot_s)
        self._slots: dict[int, Counts] = {}

    def add(self, now: float, more: Given) -> None:
        number = self.number(now)
        slot = self._slots.get(number)
        if slot is None:
            slot = self._slots[number] = {}
            for old in [one for one in self._slots if one <= number - self.size]:
                del self._slots[old]
        counts.add(slot, more)

    def number(self, now: float) -> int:
        return int(now // self.slot_s)

    def slot(self, number: int) -> Counts:
        return self._slots.get(number, {})

    def total(self, now: float, last_s: float) -> Counts:
        """Of as many slots as that takes, the one that is being filled being the last."""
        found: Counts = {}
        last = self.number(now)
        for number in range(last + 1 - round(last_s / self.slot_s), last + 1):
            counts.add(found, self.slot(number))
        return found


@dataclass(slots=True)
class _Source:
    incarnation: str
    seen: Counts = field(default_factory=dict)


class Figures:
    def __init__(self, now: float) -> None:
        self._began = now
        self._fine = Ring(FINE_S, MINUTE_S + FINE_S)
        self._coarse = Ring(SLOT_S, QUARTER_S + SLOT_S)
        self._sources: dict[str, _Source] = {}
        self._bounds: dict[str, list[str]] = {family: [] for family in counts.BUCKETS}
        self.ended = 0.0  # requests, since this gateway hears

    def hear(self, source: str, incarnation: str, given: Given, now: float, *, new: bool = False) -> None:
        """`new`: it has counted nothing before this gateway heard it."""
        known = self._sources.get(source)
        if known is None and len(self._sources) >= MAX_SOURCES:
            return
        self._learn_bounds(given)
        if known is None or known.incarnation != incarnation:
            fresh = new or known is not None
            known = self._sources[source] = _Source(incarnation, {} if fresh else _copy(given))
        grown = counts.growth(given, known.seen)
        known.seen = _copy(given)
        if grown:
            self._add(now, grown)
            self.ended += sum(grown.get(counts.REQUESTS, {}).values())

    def level(self, now: float, *, spent: float = 0.0, **levels: float) -> None:
        """What goes up and down, as it is at a tick; `spent`: money, since the last one."""
        self._add(now, {counts.LEVELS: {**levels, "ticks": 1.0}, counts.SPENT: {"all": spent}})

    def now(self, now: float) -> dict[str, Any]:
        """Rates of the last seconds; sums and shares of the last minute and of the quarter of an hour."""
        since = max(FINE_S, now - self._began)
        recent = self._fine.total(now, RATE_S)
        return {
            "rates": _rates(recent, min(RATE_S, since)),
            "minute": self._summary(self._fine.total(now, MINUTE_S)),
            "quarter": self._summary(self._coarse.total(now, QUARTER_S)),
            "ended": self.ended,
        }

    def history(self, now: float) -> dict[str, Any]:
        """The course, oldest first; the last entry is of the newest complete slot. Null: nothing to tell."""
        last = self._coarse.number(now)
        slots = [self._coarse.slot(number) for number in range(last - round(QUARTER_S / SLOT_S), last)]

        def series(value: Callable[[Counts], float | None]) -> list[float | None]:
            # Nothing was heard in a slot without a level: that is not the same as no traffic.
            found = [value(slot) if counts.LEVELS in slot else None for slot in slots]
            return [None if one is None else _short(one) for one in found]

        return {
            "slot_s": SLOT_S,
            "requests": {
                "ok": series(lambda slot: _outcomes(slot).get("ok", 0.0) / SLOT_S),
                "shed": series(lambda slot: _outcomes(slot).get("shed", 0.0) / SLOT_S),
                "error": series(lambda slot: _outcomes(slot).get("error", 0.0) / SLOT_S),
            },
            "tokens": {
                kind: series(lambda slot, kind=kind: slot.get(counts.TOKENS, {}).get(kind, 0.0) / SLOT_S)  # type: ignore[misc]
                for kind in ("prompt", "completion")
            },
            "ttft_ms": self._courses(slots, counts.TTFT),
            "itl_ms": self._courses(slots, counts.GAPS),
            "goodput": series(_goodput),
            "hits": series(_hits),
            "moved": {
                path: series(lambda slot, path=path: slot.get(counts.MOVED, {}).get(path, 0.0) / SLOT_S)  # type: ignore[misc]
                for path in ("local", "peer")
            },
            "queued": series(lambda slot: _level(slot, "queued")),
            "active": series(lambda slot: _level(slot, "active")),
        }

    def number(self, now: float) -> int:
        """Changes when the history does."""
        return self._coarse.number(now)

    # ---- inside --------------------------------------------------------------------------------------------

    def _add(self, now: float, more: Given) -> None:
        self._fine.add(now, more)
        self._coarse.add(now, more)

    def _learn_bounds(self, given: Given) -> None:
        for family, bounds in self._bounds.items():
            fresh = set(given.get(family, {})) - set(bounds)
            if fresh and len(bounds) + len(fresh) <= counts.MAX_LABELS:
                self._bounds[family] = sorted({*bounds, *fresh}, key=float)

    def _quantiles_ms(self, slot: Counts, family: str) -> dict[str, float | None]:
        found = counts.quantiles(slot.get(family, {}), self._bounds[family], list(QUANTILES.values()))
        return {name: None if found is None else _short(found[at] * 1000) for at, name in enumerate(QUANTILES)}

    def _courses(self, slots: list[Counts], family: str) -> dict[str, list[float | None]]:
        found = [self._quantiles_ms(slot, family) for slot in slots]
        return {name: [each[name] for each in found] for name in QUANTILES}

    def _summary(self, total: Counts) -> dict[str, Any]:
        return {
            "requests": _outcomes(total),
            "shed": total.get(counts.SHED, {}),
            "retries": total.get(counts.RETRIES, {}),
            "tokens": total.get(counts.TOKENS, {}),
            "moved": total.get(counts.MOVED, {}),
            "ttft_ms": self._quantiles_ms(total, counts.TTFT),
            "itl_ms": self._quantiles_ms(total, counts.GAPS),
            "goodput": _goodput(total),
            "goodput_by_tier": {tier: _goodput(total, tier) for tier in sorted(_tiers(total))},
            "hits": _hits(total),
            "cost": _cost(total),
            "tenants": _busiest(total),
        }


def _copy(given: Given) -> Counts:
    return {
        family: dict(islice(values.items(), counts.MAX_LABELS))
        for family, values in given.items()
        if family in counts.FAMILIES
    }


def _rates(total: Counts, over_s: float) -> dict[str, float]:
    tokens, moved = total.get(counts.TOKENS, {}), total.get(counts.MOVED, {})
    return {
        "requests": _short(sum(total.get(counts.REQUESTS, {}).values()) / over_s),
        "prompt_tokens": _short(tokens.get("prompt", 0.0) / over_s),
        "completion_tokens": _short(tokens.get("completion", 0.0) / over_s),
        "moved_bytes": _short(sum(moved.values()) / over_s),
    }


def _outcomes(total: Counts, tier: str | None = None) -> dict[str, float]:
    found: dict[str, float] = {}
    for label, value in total.get(counts.REQUESTS, {}).items():
        of, _, outcome = label.partition("/")
        if tier in (None, of):
            found[outcome] = found.get(outcome, 0.0) + value
    return found


def _tiers(total: Counts) -> set[str]:
    return {label.partition("/")[0] for label in total.get(counts.REQUESTS, {})}


def _goodput(total: Counts, tier: str | None = None) -> float | None:
    outcomes, within = _outcomes(total, tier), total.get(counts.WITHIN, {})
    offered = sum(outcomes.get(outcome, 0.0) for outcome in ("ok", *FAILED))
    kept = sum(within.values()) if tier is None else within.get(tier, 0.0)
    return min(1.0, round(kept / offered, 4)) if offered else None


def _hits(total: Counts) -> float | None:
    """Share of prompt tokens that nobody had to compute."""
    tokens = total.get(counts.TOKENS, {})
    return round(tokens.get("cached", 0.0) / tokens["prompt"], 4) if tokens.get("prompt") else None


def _cost(total: Counts) -> dict[str, float | None] | None:
    """Of what was served; None: nothing has a price."""
    spent = total.get(counts.SPENT, {}).get("all", 0.0)
    if not spent:
        return None
    tokens, served = total.get(counts.TOKENS, {}), _outcomes(total).get("ok", 0.0)
    both = tokens.get("prompt", 0.0) + tokens.get("completion", 0.0)
    return {
        "per_million_tokens": _short(spent / both * 1e6) if both else None,
        "per_request": _short(spent / served) if served else None,
    }


def _busiest(total: Counts) -> dict[str, float]:
    """Shares of all tokens."""
    tenants = total.get(counts.TENANTS, {})
    whole = sum(tenants.values())
    busiest = sorted(tenants, key=lambda name: -tenants[name])[:BUSIEST]
    return {name: round(tenants[name] / whole, 4) for name in busiest} if whole else {}


def _level(slot: Counts, name: str) -> float | None:
    levels = slot.get(counts.LEVELS, {})
    return levels.get(name, 0.0) / levels["ticks"] if levels.get("ticks") else None


def _short(value: float) -> float:
    """Four digits are more than a chart can show, and a tenth of the bytes."""
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short
