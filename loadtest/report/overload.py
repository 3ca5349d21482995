"""The page about loads beyond capacity, and its lines for a terminal: both sides of each load beside each other."""

import shlex
from collections import Counter
from collections.abc import Callable, Sequence

from loadtest.cluster.judge import Point
from loadtest.cluster.overload_result import Check, Overload, Side
from loadtest.report import facts
from loadtest.report import quantities as q
from loadtest.report.blocks import (
    Axis,
    Bar,
    Bars,
    Block,
    Cell,
    Chart,
    Code,
    Mark,
    Page,
    Part,
    Section,
    Series,
    Table,
    Tile,
    rounded,
    scaled,
    texts,
    time_unit,
)
from loadtest.report.charts import RUN_COLOURS
from loadtest.report.series import Column
from loadtest.slo import Spread

REASON_COLOURS = ("orange", "purple", "sky", "yellow", "red", "black")
DASHED, DOTTED = (8, 4), (2, 3)
Tell = Callable[[Point], str]


def page(told: Overload) -> Page:
    name = f"Overload: {told.sides[0].target.model}"
    return Page(
        title=name,
        subtitle=f"{told.started_at} \u00b7 {_seconds(told)} at each load \u00b7 clients try again "
        f"{q.several(int(told.settings.get('retries', 0)), 'time')} at most, as the official client does",
        engines=[facts.engine_of(side.target, side.name) for side in told.sides],
        warnings=[],
        tiles=_tiles(told),
        sections=[
            Section("Aims", [_checks(told)]),
            _goodput(told),
            _latency(told),
            _refusals(told),
            _capacity(told),
            Section("The load generator", [_client(told)]),
            _provenance(told),
        ],
    )


def text(told: Overload) -> str:
    """For a terminal."""
    lines = [f"\ncapacity {told.capacity.per_s:.2f} good requests/s: {told.capacity.how}"]
    head = "offered/s  answered/s  good/s  in time  TTFT p50  TTFT p99  refused  p99 of it"
    for side in told.sides:
        lines.append(f"{side.name:14}  {head}")
        for load, point in zip(told.loads, side.points, strict=True):
            refusals = point.refusals
            lines.append(
                f"  {load:g} x".ljust(16)
                + f"{point.offered_per_s:9.2f}  {point.answered_per_s:10.2f}  {point.good_per_s:6.2f}  "
                + f"{q.share(point.within):>7}  {q.seconds(point.ttft_s.p50):>8}  {q.seconds(point.ttft_s.p99):>8}  "
                + f"{refusals.count:7}  {q.seconds(refusals.arrival_s.p99):>9}"
            )
    for check in told.checks:
        found = ", ".join(f"{side} {_value(check, side)}" for side in check.values)
        lines.append(f"{check.what} ({check.aim}): {found}")
    return "\n".join(lines).replace("\u00a0", " ").replace("\u202f", " ")


def _tiles(told: Overload) -> list[Tile]:
    tiles = [Tile("Capacity", q.rate(told.capacity.per_s), "good requests, without overload")]
    most = f"{told.loads[-1]:g}\u00d7"
    for side in told.sides:
        last = side.points[-1]
        kept = next(iter(told.checks)).values[side.name]
        tiles.append(Tile(f"Goodput at {most}", q.rate(last.good_per_s), f"{side.name}: {q.share(kept)} of its peak"))
        tiles.append(Tile(f"In time at {most}", q.share(last.within), f"{side.name}: of admitted requests"))
    return tiles


def _checks(told: Overload) -> Table:
    rows = []
    for check in told.checks:
        cells = [
            Cell(_value(check, side))
            if check.values[side] is None
            else Cell(_value(check, side), *(("met", "better") if check.met[side] else ("missed", "worse")))
            for side in check.values
        ]
        rows.append([Cell(check.what), Cell(check.aim), *cells])
    return Table(
        title="What was aimed at, at the worst load",
        head=["", "aim", *(side.name for side in told.sides)],
        rows=rows,
        caption="Without admission nothing is aimed at: its column is for comparison.",
    )


def _value(check: Check, side: str) -> str:
    value = check.values[side]
    if value is None:
        return q.UNKNOWN
    if check.aim.endswith("%"):
        return q.share(value)
    return q.seconds(value) if check.aim.endswith("ms") else q.count(value)


# ---- goodput ------------------------------------------------------------------------------------------------


def _goodput(told: Overload) -> Section:
    return Section(
        "Goodput",
        [
            _by_load(
                told,
                "Goodput by offered load",
                Axis("good requests per second (1/s)", "/s"),
                [
                    ("", (), lambda one: one.good_per_s),
                    (", from the first send", DASHED, lambda one: one.good_request_per_s),
                ],
            ),
            _by_load(
                told,
                "Admitted requests within the TTFT target",
                Axis("share of admitted requests (%)", "%"),
                [
                    ("", (), lambda one: _percent(one.within)),
                    (", from the first send", DASHED, lambda one: _percent(one.within_request)),
                ],
            ),
            _table(
                "Rates",
                {
                    "offered": lambda one: q.rate(one.offered_per_s),
                    "attempts": lambda one: q.rate(one.attempts_per_s),
                    "answered": lambda one: q.rate(one.answered_per_s),
                    "good": lambda one: q.rate(one.good_per_s),
                    "good, from the first send": lambda one: q.rate(one.good_request_per_s),
                },
                _rows(told),
                caption=f"Good: {facts.slo_of(told.slo)}, counted from the attempt that was admitted; from the first "
                "send the waits of a client that tries again count too. A request counts once however often its "
                "client tries. What ended inside the window counts.",
            ),
        ],
    )


# ---- latency ------------------------------------------------------------------------------------------------


def _latency(told: Overload) -> Section:
    def chart(title: str, read: Callable[[Point], Spread]) -> Chart:
        return _by_load(
            told,
            title,
            Axis("TTFT", "s", "log"),
            [
                (" p50", (), lambda one: read(one).p50),
                (" p90", DASHED, lambda one: read(one).p90),
                (" p99", DOTTED, lambda one: read(one).p99),
            ],
            marks=[Mark("y", told.slo.ttft_s, f"target {q.bound(told.slo.ttft_s)}")],
        )

    return Section(
        "Time to first token of admitted requests",
        [
            chart("TTFT from the attempt that was admitted", lambda one: one.ttft_s),
            chart("TTFT from the first send", lambda one: one.ttft_request_s),
            _table(
                "Admitted requests",
                {
                    "admitted": lambda one: q.count(one.admitted),
                    "in time": lambda one: q.share(one.within),
                    "in time, from the first send": lambda one: q.share(one.within_request),
                    "even tokens": lambda one: q.share(one.steady),
                    "TTFT p50": lambda one: q.seconds(one.ttft_s.p50),
                    "p90": lambda one: q.seconds(one.ttft_s.p90),
                    "p99": lambda one: q.seconds(one.ttft_s.p99),
                    "no token": lambda one: q.count(one.unanswered),
                    "failed": lambda one: q.count(sum(one.failed.values())),
                },
                _rows(told),
                caption="Admitted: sent inside the window and not refused. No token: none had come when the run was "
                "given up; that is a miss. Percentiles are of the tokens that came.",
            ),
        ],
    )


# ---- refusals -----------------------------------------------------------------------------------------------


def _refusals(told: Overload) -> Section:
    return Section(
        "Refusals",
        [
            _reasons(told),
            _table(
                "How long a refusal takes",
                {
                    "refusals": lambda one: q.count(one.refusals.count),
                    "at arrival": lambda one: q.count(one.refusals.at_arrival),
                    "send to answer p50": lambda one: q.seconds(one.refusals.arrival_s.p50),
                    "p99": lambda one: q.seconds(one.refusals.arrival_s.p99),
                    "max": lambda one: q.seconds(one.refusals.arrival_s.max),
                    "from the queue": lambda one: q.count(one.refusals.queued),
                    "after the target p50": lambda one: q.seconds(one.refusals.lateness_s.p50),
                    "latest": lambda one: q.seconds(one.refusals.lateness_s.max),
                    "wrong": lambda one: ", ".join(f"{name} {n}" for name, n in one.refusals.wrong.items()) or "0",
                },
                _refusing(told),
                caption="At arrival: the server says that the request had not waited in line, or, where it says "
                "nothing, the answer came within half the TTFT target. Wrong: a status that does not belong to the "
                "reason, no Retry-After, or a refusal inside a stream.",
            ),
            _table(
                "What Retry-After is worth",
                {
                    "asked p50": lambda one: q.seconds(one.refusals.asked_s.p50),
                    "p90": lambda one: q.seconds(one.refusals.asked_s.p90),
                    "max": lambda one: q.seconds(one.refusals.asked_s.max),
                    "next admission p50": lambda one: q.seconds(one.refusals.needed_s.p50),
                    "next p90": lambda one: q.seconds(one.refusals.needed_s.p90),
                    "next max": lambda one: q.seconds(one.refusals.needed_s.max),
                    "tried again": lambda one: q.count(one.retried),
                    "answered then": lambda one: q.share(one.helped),
                },
                _refusing(told),
                caption="Next admission: from a refusal until the first request that was sent later and admitted, the "
                "least that would have been needed. Answered then: of the requests that tried again.",
            ),
        ],
    )


def _reasons(told: Overload) -> Bars:
    totals: Counter[str] = Counter()
    for side in told.sides:
        for point in side.points:
            totals.update(point.refusals.reasons)
    names = [name for name, _ in totals.most_common()]
    colours = {name: REASON_COLOURS[place % len(REASON_COLOURS)] for place, name in enumerate(names)}
    most = max((point.refusals.count for side in told.sides for point in side.points), default=0)
    bars = []
    for load, side, point in _refusing(told):
        counted = point.refusals.reasons
        parts = [
            Part(name, colours[name], f"{name} {q.count(counted[name])}", counted[name] / point.refusals.count)
            for name in names
            if counted.get(name)
        ]
        length = point.refusals.count / most if most else 0.0
        bars.append(Bar(f"{load:g}\u00d7, {side.name}", q.count(point.refusals.count), parts, length))
    return Bars(
        title="Attempts that were refused, by reason",
        legend=[(colours[name], name or "no reason given") for name in names],
        bars=bars,
        caption="" if names else "None.",
    )


# ---- the rest -----------------------------------------------------------------------------------------------


def _capacity(told: Overload) -> Section:
    rows = [
        [
            Cell(q.several(step.clients, "client")),
            *texts(
                q.rate(step.answered_per_s),
                q.rate(step.good_per_s),
                q.seconds(step.ttft_p50_s),
                q.seconds(step.ttft_p99_s),
            ),
        ]
        for step in told.capacity.steps
    ]
    table = Table(
        title=f"{q.rate(told.capacity.per_s)}: {told.capacity.how}",
        head=["closed loop", "answered", "good", "TTFT p50", "TTFT p99"],
        rows=rows,
    )
    return Section("How capacity was found", [table])


def _client(told: Overload) -> Table:
    return _table(
        "Its own health",
        {
            "sent after the intended time, p99": lambda one: q.seconds(one.client_late_p99_s),
            "CPU, in shares of one core": lambda one: q.share(one.client_cpu_share),
        },
        _rows(told),
        caption="It shares the machine with what it measures: what it is late by is in the latency of refusals, too.",
    )


def _provenance(told: Overload) -> Section:
    command = told.settings.get("command", [])
    known = {
        "machine": facts.machine_of(told.machine),
        "git revision": facts.revision_of(told.git),
        "SLO": facts.slo_of(told.slo),
        **{f"settings with {side.name}": _listed(side.settings) for side in told.sides},
    }
    given = [(key, value) for key, value in facts.flat(told.settings) if key != "command" and value != q.UNKNOWN]
    blocks: list[Block] = [
        Code(title="Command", text=shlex.join(str(part) for part in command)),
        Table(title="The measurement", head=[], rows=[texts(*pair) for pair in known.items()], numeric=False),
        Table(title="Options", head=[], rows=[texts(*pair) for pair in given], numeric=False),
    ]
    return Section("How it was measured", blocks)


def _listed(settings: dict[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _rows(told: Overload) -> list[tuple[float, Side, Point]]:
    return [(load, side, side.points[place]) for place, load in enumerate(told.loads) for side in told.sides]


def _refusing(told: Overload) -> list[tuple[float, Side, Point]]:
    return [row for row in _rows(told) if row[2].refusals.count]


def _table(
    title: str, columns: dict[str, Tell], points: Sequence[tuple[float, Side, Point]], caption: str = ""
) -> Table:
    """A row for each load on each side."""
    rows = [
        [Cell(f"{load:g}\u00d7, {side.name}"), *texts(*(tell(point) for tell in columns.values()))]
        for load, side, point in points
    ]
    return Table(title=title, head=["", *columns], rows=rows, caption=caption if rows else "None.")


def _by_load(
    told: Overload,
    title: str,
    y: Axis,
    lines: Sequence[tuple[str, tuple[int, ...], Callable[[Point], float | None]]],
    marks: Sequence[Mark] = (),
) -> Chart:
    """Lines of a side have one colour, lines of a kind one dash."""
    x = [load * told.capacity.per_s for load in told.loads]
    series = [
        Series(side.name + label, RUN_COLOURS[place % len(RUN_COLOURS)], dash)
        for place, side in enumerate(told.sides)
        for label, dash, _ in lines
    ]
    columns: list[Column] = [[read(one) for one in side.points] for side in told.sides for _, _, read in lines]
    if y.unit == "s":
        unit, factor = time_unit([*columns, [mark.at for mark in marks]])
        y, marks = (
            Axis(f"{y.label} ({unit})", unit, y.scale),
            [Mark(one.axis, one.at * factor, one.label) for one in marks],
        )
        columns = [scaled(column, factor) for column in columns]
    return Chart(
        title=title,
        x=Axis("offered load, requests per second (1/s)", "/s"),
        y=y,
        series=series,
        columns=[rounded(x), *map(rounded, columns)],
        marks=[*marks, Mark("x", told.capacity.per_s, "capacity")],
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _seconds(told: Overload) -> str:
    return q.duration(float(told.settings.get("seconds", 0)))
