"""Tables and bars that read alike for one run and for several: a row or a bar for each run."""

from collections import Counter
from collections.abc import Callable, Sequence

from loadtest.report import accounts, facts
from loadtest.report import quantities as q
from loadtest.report.blocks import Bar, Bars, Cell, Code, Part, Section, Table, texts
from loadtest.report.runs import Run
from loadtest.result import Result
from loadtest.slo import Spread

LEVELS = ("p50", "p90", "p95", "p99", "max", "mean")
LATENCIES: dict[str, tuple[str, Callable[[Result], Spread]]] = {
    "first": ("first token (TTFT)", lambda result: result.summary.ttft_s),
    "gaps": ("between tokens (ITL)", lambda result: result.summary.itl_s),
    "whole": ("whole request", lambda result: result.summary.e2e_s),
}

Rows = Sequence[Sequence[float]]
STAGE_VIEWS: dict[str, Callable[[Rows], Rows]] = {
    "all requests": lambda rows: rows,
    "slowest 1 %": accounts.slowest,
    "first token": lambda rows: [row[:-1] for row in rows],
    "first token, slowest 1 %": lambda rows: accounts.slowest([row[:-1] for row in rows]),
}


def outcome_bars(runs: Sequence[Run]) -> Bars:
    """What became of every offered request."""
    told = [accounts.verdicts(run.result) for run in runs]
    present = [name for name in accounts.VERDICTS if any(found[name] for found in told)]
    legend = []
    for name in present:
        colour, text = accounts.VERDICTS[name]
        # Of one run the legend holds the numbers: a narrow part of the bar has no room for its own.
        legend.append((colour, f"{text}: {_of_all(told[0], name)}" if len(runs) == 1 else text))
    bars = []
    for run, found in zip(runs, told, strict=True):
        total = sum(found.values())
        parts = [
            Part(name, accounts.VERDICTS[name][0], _of_all(found, name), found[name] / total)
            for name in present
            if found[name]
        ]
        bars.append(Bar(run.label if len(runs) > 1 else "", f"{q.count(total)} offered", parts))
    return Bars(
        title="What became of the offered requests",
        legend=legend,
        bars=bars,
        caption=f"The SLO: {facts.slo(runs[0].result)}.",
    )


def _of_all(found: dict[str, int], name: str) -> str:
    return f"{q.count(found[name])} ({q.share(found[name] / sum(found.values()))})"


def latency_table(result: Result) -> Table:
    rows = [
        [Cell(name), *texts(*(q.seconds(getattr(told(result), level)) for level in LEVELS))]
        for name, told in LATENCIES.values()
    ]
    return Table(
        title="Latency percentiles",
        head=["", *LEVELS],
        rows=rows,
        caption="Nearest rank, over completed requests. First token and whole request count from the intended send "
        "time; between tokens counts every gap of every request.",
    )


def stage_bars(runs: Sequence[Run]) -> Bars:
    """Mean parts of a request's time: of all, of the slowest hundredth, and up to the first token alone."""
    names = list(dict.fromkeys(name for run in runs for name in accounts.stage_names(run.result.requests)))
    # Runs with and without stages may stand side by side: decode stays last.
    names = [*(name for name in names if name != accounts.DECODE), accounts.DECODE]
    colours = dict(zip(names, accounts.stage_colours(names), strict=True))
    bars = []
    for text, choose in STAGE_VIEWS.items():
        means_s = [_chosen_mean(run.result, choose) for run in runs]
        longest_s = max(map(sum, means_s))
        for run, parts_s in zip(runs, means_s, strict=True):
            if total_s := sum(parts_s):
                label = f"{text}: {run.label}" if len(runs) > 1 else text
                own = accounts.stage_names(run.result.requests)
                bars.append(_stage_bar(label, own, parts_s, colours, total_s / longest_s))
    return Bars(
        title="Mean time of a request, and its parts",
        legend=[(colours[name], accounts.STAGE_TEXTS.get(name, name)) for name in names],
        bars=bars,
        caption="Finished requests, from the intended send time to the last token." if bars else "No request finished.",
    )


def _chosen_mean(result: Result, choose: Callable[[Rows], Rows]) -> list[float]:
    rows = choose(accounts.parts_s(result.requests, accounts.stage_names(result.requests)))
    return accounts.mean_parts_s(rows)


def _stage_bar(
    label: str, names: Sequence[str], means_s: Sequence[float], colours: dict[str, str], length: float
) -> Bar:
    total_s = sum(means_s)
    # A bar that ends at the first token has no decode: names may be one more than means.
    parts = [
        Part(name, colours[name], f"{q.seconds(part_s)} ({q.share(part_s / total_s)})", part_s / total_s)
        for name, part_s in zip(names, means_s, strict=False)
        if part_s
    ]
    return Bar(label, q.seconds(total_s), parts, length)


REASONS: list[tuple[str, Callable[[Result], dict[str, int]]]] = [
    ("Outcomes", lambda result: result.summary.outcomes),
    ("Shed, by the server's reason", lambda result: result.summary.shed),
    ("Errors, by code", lambda result: result.summary.errors),
]


def reasons(runs: Sequence[Run]) -> list[Table]:
    """Outcomes, shed reasons and errors, the most frequent first, with their share of what was offered."""
    return [_reason_table(title, runs, [tell(run.result) for run in runs]) for title, tell in REASONS]


def _reason_table(title: str, runs: Sequence[Run], told: Sequence[dict[str, int]]) -> Table:
    totals: Counter[str] = sum((Counter(counts) for counts in told), Counter())
    if not totals:
        return Table(title=title, head=["", ""], rows=[], caption="None.")
    alone = len(runs) == 1
    rows = []
    for name, _ in totals.most_common():
        cells = [_counted(counts.get(name, 0), run) for run, counts in zip(runs, told, strict=True)]
        rows.append([Cell(name or "no code given"), *(texts(cells[0].text, cells[0].note) if alone else cells)])
    head = ["requests", "of offered"] if alone else [run.label for run in runs]
    return Table(title=title, head=["", *head], rows=rows)


def _counted(number: int, run: Run) -> Cell:
    return Cell(q.count(number), _of_offered(number, run.result))


def _of_offered(number: int, result: Result) -> str:
    return q.share(number / result.summary.offered) if result.summary.offered else ""


def client_table(runs: Sequence[Run]) -> Table:
    lines: list[tuple[str, Callable[[Result], str]]] = [
        ("processes", lambda result: q.count(result.client.processes)),
        ("CPU, in shares of one core", lambda result: q.share(result.client.cpu_share)),
        ("sent after the intended time, p50", lambda result: q.seconds(result.client.lateness_s.p50)),
        ("sent after the intended time, p99", lambda result: q.seconds(result.client.lateness_s.p99)),
        ("sent after the intended time, max", lambda result: q.seconds(result.client.lateness_s.max)),
        ("turned away by the generator's own limit", lambda result: q.count(result.client.rejected_by_client)),
    ]
    return Table(
        title="The generator's own health",
        head=["", *(run.label if len(runs) > 1 else "this run" for run in runs)],
        rows=[[Cell(name), *texts(*(tell(run.result) for run in runs))] for name, tell in lines],
    )


def provenance(run: Run, *, folded: bool) -> Section:
    """How the run was made, so that it can be made again."""
    result = run.result
    told = {
        "workload or trace": result.name,
        "address": result.target.url,
        "model": result.target.model,
        "arrangement": facts.arrangement(result),
        "SLO": facts.slo(result),
        "started at": result.started_at,
        "run time": q.duration(result.duration_s),
        "machine": facts.machine(result),
        "git revision": facts.revision(result),
        "result": f"{run.path.resolve().parent.name}/{run.path.name}",  # a page that is shown around names no folders
    }
    command = facts.command(result)
    return Section(
        "How it was measured" if not folded else f"How it was measured: {run.label}",
        [
            *([Code(title="Command", text=command)] if command else []),
            Table(title="The run", head=[], rows=[texts(*pair) for pair in told.items()], numeric=False),
            Table(title="Settings", head=[], rows=[texts(*pair) for pair in facts.settings(result)], numeric=False),
            *([Code(title="Workload", text=workload)] if (workload := facts.workload(result)) else []),
        ],
        folded=folded,
    )
