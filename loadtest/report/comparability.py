"""Whether two or more runs may be compared, and what differs between them."""

from collections.abc import Callable, Sequence

from loadtest.report import facts
from loadtest.report import quantities as q
from loadtest.report.blocks import Cell
from loadtest.report.runs import Run
from loadtest.result import Result


def _engine(result: Result) -> str:
    target = result.target
    return f"{target.engine} ({target.profile})" if target.profile else target.engine


# What must be alike for a ratio to say something about the change under test.
MUST_AGREE: dict[str, Callable[[Result], str]] = {
    "engine": _engine,
    "model": lambda result: result.target.model,
    "machine": facts.machine,
    "workload": lambda result: f"{result.name}\n{facts.workload(result)}",
    "SLO": facts.slo,
}
SAME_LOAD = 0.1  # random arrivals alone make runs differ by some per cent
SHORT = 90  # characters of a value in a warning


def warnings(runs: Sequence[Run]) -> list[str]:
    """One sentence for each thing that must agree and does not."""
    found = []
    for name, tell in MUST_AGREE.items():
        told = [tell(run.result) for run in runs]
        if len(set(told)) > 1:
            values = " \u00b7 ".join(f"{run.label}: {_short(value)}" for run, value in zip(runs, told, strict=True))
            found.append(f"The runs differ in {name}, so their figures are not comparable. {values}")
    loads = [q.ratio(run.result.summary.offered, run.result.duration_s) or 0.0 for run in runs]
    if max(loads) - min(loads) > SAME_LOAD * max(loads):
        values = " \u00b7 ".join(f"{run.label}: {q.rate(load)}" for run, load in zip(runs, loads, strict=True))
        found.append(f"The runs were offered different loads: latencies are comparable at one load only. {values}")
    return found


def differences(runs: Sequence[Run]) -> list[list[Cell]]:
    """A row for each fact or setting that is not the same in all runs."""
    told = [_facts(run.result) for run in runs]
    names = list(dict.fromkeys(name for facts_of_run in told for name in facts_of_run))
    rows = []
    for name in names:
        values = [facts_of_run.get(name, q.UNKNOWN) for facts_of_run in told]
        if len(set(values)) > 1:
            rows.append([Cell(name), *map(Cell, values)])
    return rows


def _facts(result: Result) -> dict[str, str]:
    told = {name: tell(result) for name, tell in MUST_AGREE.items()}
    told |= {
        "arrangement": facts.arrangement(result),
        "revision": facts.revision(result),
        "run time": q.duration(result.duration_s),
        "started at": result.started_at,
        "address": result.target.url,
    }
    return told | {f"settings: {key}": value for key, value in facts.settings(result)}


def _short(text: str) -> str:
    line = text.partition("\n")[0]
    return line if len(line) <= SHORT else f"{line[:SHORT]}\u2026"
