"""Levels over time: the gateway's queue, the store's slots, what runs and waits in each engine, one chart a subject."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from loadtest.report import charts, series
from loadtest.report.blocks import Axis, Chart, Series, scaled
from loadtest.report.quantities import count
from loadtest.report.series import Column
from loadtest.result import Levels

GATEWAY = "gateway"
# Which chart a series without a dot belongs to; the others are named by what stands before their dot.
HOMES = {"queue_depth": GATEWAY, "active_requests": GATEWAY}
NAMES = {"queue_depth": "queued", "active_requests": "active", "kv_leases": "leases"}
NOTHING = "No levels were recorded: the server's metrics could not be read."
TITLES = {
    GATEWAY: ("Requests in the gateway", "requests"),
    "kv_slots": ("KV slots of the store by state", "slots"),
    "kv_leases": ("KV leases", "leases"),
    "running": ("Requests running in the engines", "requests"),
    "waiting": ("Requests waiting in the engines", "requests"),
    "engine_kv_usage": ("KV blocks in use in the engines", "share (%)"),
}
SLOT_COLOURS = {"pinned": "orange", "reserved": "purple", "cached": "sky", "revoked": "red"}
FREE = "kv_slots.free"


def intro(levels: Levels) -> str:
    return "" if levels.series else NOTHING


def charts_of_one(levels: Levels) -> list[Chart]:
    """A chart for each subject, a line for each series."""
    group = series.group_size(len(levels.t_s))
    found: list[Chart] = []
    for subject, names in _subjects(levels).items():
        title, y = TITLES.get(subject, (subject, subject))
        slots, usage = subject == "kv_slots", subject == "engine_kv_usage"
        shown = [name for name in names if name != FREE]
        columns = [series.level(levels.series[name], group) for name in shown]
        found.append(
            charts.over_time(
                title,
                levels.t_s[::group],
                _slot_lines(shown) if slots else charts.spread([_short(name) for name in shown]),
                [scaled(column, 100) for column in columns] if usage else columns,
                Axis(y, "%" if usage else ""),
                stacked=slots,
                caption=_slots_in_all([levels.series[name] for name in names]) if slots else "",
            )
        )
    return found


def _slots_in_all(columns: Sequence[Column]) -> str:
    """Free slots are told, not drawn: there may be so many that what is in use cannot be seen beside them."""
    most = max(series.known(_across(columns, sum)), default=0.0)
    return f"Of {count(most)} slots; the rest is free." if most else ""


class Total(NamedTuple):
    """A level that runs with other workers have too."""

    title: str
    axis: Axis
    column: Column


def totals(levels: Levels) -> dict[str, Total]:
    """By name. Workers are summed; of their KV usage the highest is taken."""
    found: dict[str, Total] = {}
    for subject, names in _subjects(levels).items():
        title, y = TITLES.get(subject, (subject, subject))
        columns = [levels.series[name] for name in names]
        if subject in ("running", "waiting"):
            found[subject] = Total(f"{title}, all workers", Axis(y), _across(columns, sum))
        elif subject == "engine_kv_usage":
            found[subject] = Total(f"{title}, the fullest", Axis(y, "%"), scaled(_across(columns, max), 100))
        else:
            for name, column in zip(names, columns, strict=True):
                short = _short(name)
                told = y if short == y else f"{short} {y}"
                found[name] = Total(title if told == y else f"{title}: {short}", Axis(told), column)
    return found


def _across(columns: Sequence[Column], reduce: Callable[[list[float]], float]) -> list[float | None]:
    return [reduce(values) if (values := series.known(row)) else None for row in zip(*columns, strict=True)]


def _subjects(levels: Levels) -> dict[str, list[str]]:
    """Series by chart, in the order of TITLES, then as they come."""
    found: dict[str, list[str]] = {subject: [] for subject in TITLES}
    for name in levels.series:
        found.setdefault(HOMES.get(name, name.partition(".")[0]), []).append(name)
    order = list(SLOT_COLOURS)
    found["kv_slots"].sort(key=lambda name: order.index(_short(name)) if _short(name) in order else len(order))
    return {subject: names for subject, names in found.items() if names}


def _slot_lines(names: Sequence[str]) -> list[Series]:
    return [Series(_short(name), SLOT_COLOURS.get(_short(name), "blue"), fill=True) for name in names]


def _short(name: str) -> str:
    return NAMES.get(name) or name.partition(".")[2] or name
