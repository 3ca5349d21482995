"""The page about one run, in the order in which a reader asks: was it good, how fast, when, why, how measured."""

from collections.abc import Sequence

from loadtest.report import accounts, charts, facts, gauges, prediction, sections, series
from loadtest.report import quantities as q
from loadtest.report.blocks import Axis, Block, Chart, Page, Section, Series, Tile, rounded, scaled, time_unit
from loadtest.report.runs import Run
from loadtest.result import Requests, Result, Timeline

RANKS = 300  # groups of requests in the stacked chart
LATENESS_CELLS = 300


def page(run: Run) -> Page:
    result = run.result
    offered = f"{q.several(result.summary.offered, 'request')} offered"
    return Page(
        title=result.name,
        subtitle=f"{result.started_at} \u00b7 {q.duration(result.duration_s)} \u00b7 {offered}",
        engines=[facts.engine(run, several=False)],
        warnings=facts.warnings(run),
        tiles=_tiles(result),
        sections=[
            _goodput(run),
            _latency(result),
            _over_time(result),
            _stages(run),
            *prediction.section(result.requests),
            Section("Requests that were refused or failed", list(sections.reasons([run]))),
            Section(
                "Queue, KV and engine levels", gauges.charts_of_one(result.levels), intro=gauges.intro(result.levels)
            ),
            Section("The load generator", [sections.client_table([run]), *_lateness(result.requests)]),
            sections.provenance(run, folded=False),
        ],
    )


def _tiles(result: Result) -> list[Tile]:
    told = result.summary
    return [
        Tile("Goodput", q.rate(told.goodput_per_s), q.several(told.good, "good request")),
        Tile("Within the SLO", q.share(told.good_share), f"of {q.count(told.offered)} offered"),
        Tile("TTFT p50", q.seconds(told.ttft_s.p50), f"p99 {q.seconds(told.ttft_s.p99)}"),
        Tile("ITL p50", q.seconds(told.itl_s.p50), f"p99 {q.seconds(told.itl_s.p99)}"),
        Tile("Requests", q.rate(told.requests_per_s), f"{q.count(told.completed)} completed"),
        Tile("Output tokens", q.rate(told.output_tokens_per_s), f"{q.count(told.output_tokens)} in all"),
        Tile(
            "Prompt tokens", q.rate(q.ratio(told.prompt_tokens, result.duration_s)), f"{_cached(result)} from a cache"
        ),
    ]


def _cached(result: Result) -> str:
    told = result.summary
    return q.share(q.ratio(told.cached_tokens, told.prompt_tokens))


def _goodput(run: Run) -> Section:
    result = run.result
    requests, offered = result.requests, len(result.requests.intended_s)
    return Section(
        "Goodput against the SLO",
        [
            sections.outcome_bars([run]),
            charts.within(
                "Requests by time to first token",
                "time to first token",
                lines=[Series("finished with a first token within", "blue", fill=True)],
                columns=[(accounts.finished(requests, requests.ttft_s), offered)],
                slo_s=result.slo.ttft_s,
                caption="Shed and failed requests are misses: the curve may end below 100 %.",
            ),
            charts.within(
                "Requests by their p99 gap between tokens",
                "p99 of a request's gaps",
                lines=[Series("finished with a p99 gap within", "blue", fill=True)],
                columns=[(accounts.longest_gaps_s(requests), offered)],
                slo_s=result.slo.itl_s,
                caption=f"The SLO counts {100 * result.slo.itl_share:g}\u00a0% of a request's gaps, this curve 99 %.",
            ),
        ],
    )


def _latency(result: Result) -> Section:
    requests = result.requests
    return Section(
        "Latency",
        [
            sections.latency_table(result),
            charts.percentiles(
                "TTFT by percentile", [Series("TTFT", "blue")], [accounts.finished(requests, requests.ttft_s)]
            ),
            charts.percentiles(
                "ITL by percentile of requests",
                [Series("a request's median gap", "blue"), Series("a request's p99 gap", "orange")],
                [accounts.finished(requests, column) for column in (requests.itl_p50_s, requests.itl_p99_s)],
            ),
            charts.percentiles(
                "Whole request by percentile",
                [Series("intended send to last token", "blue")],
                [accounts.whole_s(requests)],
            ),
        ],
    )


def _over_time(result: Result) -> Section:
    told = result.timeline
    group = series.group_size(len(told.t_s))
    rate_group = series.group_size(len(told.t_s), series.RATE_POINTS)
    latency_s, rate_s = told.bucket_s * group, told.bucket_s * rate_group
    return Section(
        "Over time",
        [*_latencies_over_time(result, group), *_rates_over_time(told, rate_group)],
        intro=f"A point is {q.bound(latency_s)} of the run for latencies, {q.bound(rate_s)} for rates. "
        "Drag across a chart to zoom all of them, double-click to go back.",
    )


def _latencies_over_time(result: Result, group: int) -> list[Chart]:
    told, times_s = result.timeline, result.timeline.t_s[::group]
    lines = {"p50": Series("p50", "blue"), "p90": Series("p90", "sky"), "p99": Series("p99", "orange")}

    def worst(*columns: Sequence[float | None]) -> list[list[float | None]]:
        return [series.reduced(column, group, series.worst) for column in columns]

    first = worst(told.ttft_p50_s, told.ttft_p90_s, told.ttft_p99_s)
    gaps = worst(told.itl_p50_s, told.itl_p99_s)
    return [
        charts.latency_over_time("TTFT over time", times_s, list(lines.values()), first, result.slo.ttft_s),
        charts.latency_over_time("ITL over time", times_s, [lines["p50"], lines["p99"]], gaps, result.slo.itl_s),
    ]


def _rates_over_time(told: Timeline, group: int) -> list[Chart]:
    times_s = told.t_s[::group]

    def rates(*columns: Sequence[float | None]) -> list[list[float | None]]:
        return [scaled(series.reduced(column, group, series.mean), 1 / told.bucket_s) for column in columns]

    return [
        charts.over_time(
            "Throughput over time",
            times_s,
            [
                Series("offered", "grey", dash=(6, 4)),
                Series("completed", "blue"),
                Series("good", "green"),
                Series("shed", "orange"),
                Series("failed", "red"),
            ],
            rates(told.offered, told.completed, told.good, told.shed, told.failed),
            Axis("requests per second (1/s)", "/s"),
        ),
        charts.over_time(
            "Output tokens over time",
            times_s,
            [Series("output tokens", "blue", fill=True)],
            rates(told.tokens),
            Axis("tokens per second (1/s)", "/s"),
        ),
    ]


def _stages(run: Run) -> Section:
    requests = run.result.requests
    names = accounts.stage_names(requests)
    rows = accounts.parts_s(requests, names)
    blocks: list[Block] = [sections.stage_bars([run])]
    blocks += _ranked(rows, names)
    return Section("Where the time went", blocks)


def _ranked(rows: Sequence[Sequence[float]], names: Sequence[str]) -> list[Chart]:
    """Requests sorted by time to first token, and by their whole time, with the parts of it as a stack."""
    charts_of = (("time to first token", [row[:-1] for row in rows], names[:-1]), ("whole time", rows, names))
    found = []
    for what, parts, labels in charts_of if rows else ():
        ranks, columns = series.by_rank(parts, RANKS)
        unit, factor = time_unit([[sum(part) for part in zip(*columns, strict=True)]])
        colours = accounts.stage_colours(labels)
        found.append(
            Chart(
                title=f"Each request's {what}, and its parts",
                caption="Finished requests, the fastest on the left.",
                x=Axis("finished requests, fastest first (%)", "%"),
                y=Axis(f"time ({unit})", unit),
                series=[Series(label, colour, fill=True) for label, colour in zip(labels, colours, strict=True)],
                columns=[rounded([100 * rank for rank in ranks]), *(rounded(scaled(c, factor)) for c in columns)],
                stacked=True,
            )
        )
    return found


def _lateness(requests: Requests) -> list[Chart]:
    """How late requests were sent, the worst of each stretch of the run."""
    pairs = [(i, max(s - i, 0.0)) for i, s in zip(requests.intended_s, requests.sent_s, strict=True) if s is not None]
    if not pairs:
        return []
    times_s, late_s = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    step_s = max(times_s[-1] / LATENESS_CELLS, 1.0)
    cells = int(times_s[-1] / step_s) + 1
    worst = series.on_grid(times_s, late_s, step_s, cells, series.worst)
    grid_s = [cell * step_s for cell in range(cells)]
    line = Series("latest send", "purple")
    return [
        charts.latency_over_time("Lateness over time, the latest send of each point", grid_s, [line], [worst], None)
    ]
