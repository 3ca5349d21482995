"""The page about two or more runs: ratios to the first, and one quantity a chart with a line for each run.

Invariant: a run has one colour and dash on the whole page.
"""

from collections.abc import Callable, Sequence

import msgspec

from loadtest.report import accounts, blocks, charts, comparability, facts, gauges, sections, series
from loadtest.report import quantities as q
from loadtest.report.blocks import Axis, Cell, Chart, Page, Section, Series, Table
from loadtest.report.runs import Run
from loadtest.report.series import Column, Reducer
from loadtest.result import Result, Timeline

Tell = Callable[[Timeline], Column]
LINE_POINTS = 600  # several noisy lines in one chart cannot be told apart at more
ALIKE = 0.02  # a ratio this near to one is neither better nor worse


class Measure(msgspec.Struct, frozen=True):
    name: str
    tell: Callable[[Result], float | None]
    write: Callable[[float | None], str]
    more_is: str = "better"  # "better", "worse" or "" where neither is


def _level(latency: str, level: str) -> Callable[[Result], float | None]:
    told = sections.LATENCIES[latency][1]
    return lambda result: getattr(told(result), level)


MEASURES = [
    Measure("goodput", lambda r: r.summary.goodput_per_s, q.rate),
    Measure("within the SLO", lambda r: r.summary.good_share, q.share),
    *(Measure(f"TTFT {at}", _level("first", at), q.seconds, "worse") for at in ("p50", "p90", "p99")),
    *(Measure(f"ITL {at}", _level("gaps", at), q.seconds, "worse") for at in ("p50", "p90", "p99")),
    *(Measure(f"whole request {at}", _level("whole", at), q.seconds, "worse") for at in ("p50", "p99")),
    Measure("completed requests", lambda r: r.summary.requests_per_s, q.rate),
    Measure("output tokens", lambda r: r.summary.output_tokens_per_s, q.rate),
    Measure("offered", lambda r: r.summary.offered, q.count, ""),
    Measure("completed", lambda r: r.summary.completed, q.count, ""),
    Measure("shed", lambda r: sum(r.summary.shed.values()), q.count, "worse"),
    Measure("errors", lambda r: sum(r.summary.errors.values()), q.count, "worse"),
    Measure(
        "prompt tokens from a cache", lambda r: q.ratio(r.summary.cached_tokens, r.summary.prompt_tokens), q.share, ""
    ),
]


def page(runs: Sequence[Run]) -> Page:
    names = list(dict.fromkeys(run.result.name for run in runs))
    return Page(
        title=" and ".join(names) + f": {len(runs)} runs compared",
        subtitle=f"{runs[0].label} is the base of all ratios",
        engines=[facts.engine(run, several=True) for run in runs],
        warnings=[
            *comparability.warnings(runs),
            *(f"{run.label}: {warning}" for run in runs for warning in facts.warnings(run)),
        ],
        tiles=[],
        sections=[
            Section("At a glance", [_table(runs), sections.outcome_bars(runs)]),
            _latency(runs),
            Section("Over time", _over_time(runs), intro="Aligned on each run's own start."),
            Section("Where the time went", [sections.stage_bars(runs)]),
            Section("Requests that were refused or failed", list(sections.reasons(runs))),
            _levels(runs),
            Section("The load generator", [sections.client_table(runs)]),
            Section("What differs", [_differences(runs)]),
            *(sections.provenance(run, folded=True) for run in runs),
        ],
    )


def _lines(runs: Sequence[Run]) -> list[Series]:
    return charts.spread([run.label for run in runs])


def _table(runs: Sequence[Run]) -> Table:
    rows = []
    for measure in MEASURES:
        values = [measure.tell(run.result) for run in runs]
        cells = [Cell(measure.write(values[0]))]
        cells += [_compared(measure, value, values[0]) for value in values[1:]]
        rows.append([Cell(measure.name), *cells])
    return Table(
        title="Figures, and their ratio to the first run",
        head=["", *(run.label for run in runs)],
        rows=rows,
        caption="One run each: a difference of a few per cent may be chance.",
    )


def _compared(measure: Measure, value: float | None, base: float | None) -> Cell:
    ratio = q.ratio(value, base)
    if ratio is None:
        return Cell(measure.write(value))
    tone = ""
    if measure.more_is and abs(ratio - 1) > ALIKE:
        tone = "better" if (ratio > 1) == (measure.more_is == "better") else "worse"
    return Cell(measure.write(value), f"{q.times(ratio)} {tone}".strip(), tone)


def _latency(runs: Sequence[Run]) -> Section:
    lines = _lines(runs)
    requests = [run.result.requests for run in runs]
    return Section(
        "Latency",
        [
            charts.within(
                "Requests by time to first token",
                "time to first token",
                lines=lines,
                columns=[(accounts.finished(told, told.ttft_s), len(told.ttft_s)) for told in requests],
                slo_s=runs[0].result.slo.ttft_s,
                caption="Shed and failed requests are misses: a curve may end below 100 %.",
            ),
            charts.percentiles(
                "TTFT by percentile", lines, [accounts.finished(told, told.ttft_s) for told in requests]
            ),
            charts.percentiles(
                "ITL by percentile of requests",
                lines,
                [accounts.finished(told, told.itl_p99_s) for told in requests],
                "Each request's p99 gap.",
            ),
            charts.percentiles("Whole request by percentile", lines, [accounts.whole_s(told) for told in requests]),
        ],
    )


def _grid(runs: Sequence[Run], least_s: float, points: int = LINE_POINTS) -> tuple[float, list[float]]:
    """Bucket length and starts of an axis on which all runs fit; the length is a multiple of `least_s`."""
    ends_s = [end for run in runs for end in (run.result.timeline.t_s[-1:] + run.result.levels.t_s[-1:])]
    end_s = max(ends_s, default=0.0)
    step_s = least_s * series.group_size(int(end_s / least_s) + 1, points)
    return step_s, [cell * step_s for cell in range(int(end_s / step_s + 1e-9) + 1)]


def _over_time(runs: Sequence[Run]) -> list[blocks.Block]:
    least_s = max(run.result.timeline.bucket_s for run in runs)
    lines = _lines(runs)

    def aligned(tell: Tell, grid: tuple[float, list[float]], reduce: Reducer) -> list[list[float | None]]:
        told = [run.result.timeline for run in runs]
        return [series.on_grid(each.t_s, tell(each), grid[0], len(grid[1]), reduce) for each in told]

    def rates(title: str, tell: Tell, label: str) -> Chart:
        grid = _grid(runs, least_s, series.RATE_POINTS)
        columns = aligned(lambda each: blocks.scaled(tell(each), 1 / each.bucket_s), grid, series.mean)
        return charts.over_time(title, grid[1], lines, columns, Axis(label, "/s"))

    def latencies(title: str, tell: Tell, slo_s: float) -> Chart:
        grid = _grid(runs, least_s)
        return charts.latency_over_time(title, grid[1], lines, aligned(tell, grid, series.worst), slo_s)

    slo = runs[0].result.slo
    found: list[blocks.Block] = [
        rates("Good requests over time", lambda each: each.good, "good requests per second (1/s)"),
        rates("Offered requests over time", lambda each: each.offered, "offered requests per second (1/s)"),
        latencies("TTFT p50 over time", lambda each: each.ttft_p50_s, slo.ttft_s),
        latencies("TTFT p99 over time", lambda each: each.ttft_p99_s, slo.ttft_s),
        latencies("ITL p99 over time", lambda each: each.itl_p99_s, slo.itl_s),
        rates("Output tokens over time", lambda each: each.tokens, "tokens per second (1/s)"),
    ]
    if any(any(run.result.timeline.shed) for run in runs):
        found.append(rates("Shed requests over time", lambda each: each.shed, "shed requests per second (1/s)"))
    if any(any(run.result.timeline.failed) for run in runs):
        found.append(rates("Failed requests over time", lambda each: each.failed, "failed requests per second (1/s)"))
    return found


def _levels(runs: Sequence[Run]) -> Section:
    """A chart for each level that moved in at least one run."""
    told = [gauges.totals(run.result.levels) for run in runs]
    step_s, times_s = _grid(runs, max(1.0, *(run.result.timeline.bucket_s for run in runs)))
    found, still = [], []
    for name in dict.fromkeys(name for levels in told for name in levels):
        first = next(levels[name] for levels in told if name in levels)
        if not any(any(series.known(levels[name].column)) for levels in told if name in levels):
            still.append(first.title)
            continue
        columns = []
        for run, levels in zip(runs, told, strict=True):
            at_s, values = (run.result.levels.t_s, levels[name].column) if name in levels else ([], [])
            centre = series.mean(series.known(values) or [0.0])
            cells = series.on_grid(at_s, values, step_s, len(times_s), series.furthest_from(centre))
            columns.append(series.bridged(cells))
        found.append(charts.over_time(first.title, times_s, _lines(runs), columns, first.axis))
    intro = f"Zero in all runs: {'; '.join(still)}." if still else "" if found else gauges.NOTHING
    return Section("Queue, KV and engine levels", found, intro=intro)


def _differences(runs: Sequence[Run]) -> Table:
    rows = comparability.differences(runs)
    head = ["", *(run.label for run in runs)] if rows else []
    return Table(
        title="Facts and settings that are not the same",
        head=head,
        rows=rows,
        numeric=False,
        caption="" if rows else "Nothing.",
    )
