"""The page about one tenant beside another that floods, and its lines for a terminal."""

import shlex

from loadtest.cluster.fairness_result import MOST_RATIO, Fairness, Share
from loadtest.report import charts, facts
from loadtest.report import quantities as q
from loadtest.report.blocks import Block, Cell, Code, Page, Section, Series, Table, Tile, texts

HEAD = ["offered", "answered", "refused", "failed", "attempts", "TTFT p50", "p95", "p99", "max"]


def page(told: Fairness) -> Page:
    return Page(
        title=f"Fairness: {told.target.model}",
        subtitle=f"{told.started_at} \u00b7 one tenant offers {q.rate(told.flood_per_s)}, "
        f"{q.significant(told.flood_per_s / told.capacity.per_s)} times the capacity; another asks one at a time",
        engines=[facts.engine_of(told.target)],
        warnings=[],
        tiles=[
            Tile("TTFT p95, beside to alone", q.times(told.ratio_p95), f"{'met' if told.met else 'missed'}: {_aim()}"),
            Tile("TTFT p50, beside to alone", q.times(told.ratio_p50), ""),
            Tile("TTFT p95 alone", q.seconds(told.alone.ttft_s.p95), q.several(told.alone.answered, "answer")),
            Tile("TTFT p95 beside", q.seconds(told.beside.ttft_s.p95), q.several(told.beside.answered, "answer")),
            Tile("Capacity", q.rate(told.capacity.per_s), "good requests"),
        ],
        sections=[
            Section("What became of their requests", [_table(told)]),
            Section("The single tenant's time to first token", [_curves(told)]),
            _provenance(told),
        ],
    )


def text(told: Fairness) -> str:
    """For a terminal."""
    lines = ["\n" + "".ljust(18) + "".join(f"{name:>10}" for name in HEAD)]
    lines += [name.ljust(18) + "".join(f"{value:>10}" for value in _figures(share)) for name, share in _rows(told)]
    lines.append(
        f"TTFT p95 beside to alone {q.times(told.ratio_p95)}, p50 {q.times(told.ratio_p50)}: "
        f"{'met' if told.met else 'missed'} ({_aim()})"
    )
    return "\n".join(lines).replace("\u00a0", " ").replace("\u202f", " ")


def _aim() -> str:
    return f"at most {MOST_RATIO:g}, and nothing refused or failed"


def _rows(told: Fairness) -> list[tuple[str, Share]]:
    return [("single, alone", told.alone), ("single, beside", told.beside), ("flood", told.flood)]


def _figures(share: Share) -> list[str]:
    counts = (share.offered, share.answered, share.refused, share.failed, share.attempts)
    spread = share.ttft_s
    return [*map(q.count, counts), *map(q.seconds, (spread.p50, spread.p95, spread.p99, spread.max))]


def _table(told: Fairness) -> Table:
    return Table(
        title="By tenant",
        head=["", *HEAD],
        rows=[[Cell(name), *texts(*_figures(share))] for name, share in _rows(told)],
        caption="TTFT counts from a request's first send, its refusals and its client's waits included. Attempts: "
        "requests and what their clients tried again.",
    )


def _curves(told: Fairness) -> Block:
    return charts.percentiles(
        "TTFT by percentile",
        [Series("alone", "blue"), Series("beside the flood", "orange")],
        [told.alone.ttft, told.beside.ttft],
    )


def _provenance(told: Fairness) -> Section:
    command = told.settings.get("command", [])
    known = {
        "machine": facts.machine_of(told.machine),
        "git revision": facts.revision_of(told.git),
        "capacity": f"{q.rate(told.capacity.per_s)}: {told.capacity.how}",
    }
    given = [(key, value) for key, value in facts.flat(told.settings) if key != "command" and value != q.UNKNOWN]
    return Section(
        "How it was measured",
        [
            Code(title="Command", text=shlex.join(str(part) for part in command)),
            Table(title="The measurement", head=[], rows=[texts(*pair) for pair in known.items()], numeric=False),
            Table(title="Options", head=[], rows=[texts(*pair) for pair in given], numeric=False),
        ],
    )
