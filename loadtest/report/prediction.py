"""The TTFT that the server predicted against the one that it saw: the dots, and how far off they are.

Invariant: errors are of the size |predicted - actual| / actual, over the requests that have both.
"""

from collections.abc import Sequence

import msgspec

from loadtest import slo
from loadtest.report import quantities as q
from loadtest.report import series
from loadtest.report.blocks import Axis, Block, Cell, Chart, Section, Series, Table, rounded, texts, time_unit
from loadtest.result import Requests

LEAST_S = 1e-4  # a logarithmic axis has no zero
WITHIN = (0.1, 0.25, 0.6, 1.0)  # of the actual TTFT
SPARE = 1.25  # of the diagonal beyond the outermost dots


class Errors(msgspec.Struct, frozen=True, kw_only=True):
    """Shares of the actual TTFT; None for nothing. `signed`: median of predicted over actual, less one."""

    pairs: int
    median: float | None
    p90: float | None
    signed: float | None
    within: dict[float, float]  # bound -> share of the pairs


def pairs(requests: Requests) -> list[tuple[float, float]]:
    """(predicted, actual) in seconds, by intended time, of the requests that have both."""
    if requests.predicted_ttft_s is None or requests.actual_ttft_s is None:
        return []
    both = zip(requests.predicted_ttft_s, requests.actual_ttft_s, strict=True)
    return [(told, seen) for told, seen in both if told is not None and seen is not None and seen > 0]


def errors(found: Sequence[tuple[float, float]]) -> Errors:
    signed = [told / seen - 1 for told, seen in found]
    sizes = [abs(error) for error in signed]
    return Errors(
        pairs=len(sizes),
        median=slo.percentile(sizes, 0.5),
        p90=slo.percentile(sizes, 0.9),
        signed=slo.percentile(signed, 0.5),
        within={bound: sum(size <= bound for size in sizes) / len(sizes) for bound in WITHIN if sizes},
    )


def section(requests: Requests) -> list[Section]:
    """Empty where the server predicted nothing."""
    found = pairs(requests)
    if not found:
        return []
    told = errors(found)
    first_tokens = sum(value is not None for value in requests.ttft_s)
    return [
        Section(
            "Predicted against actual TTFT",
            [_scatter(found), *_tables(told, first_tokens)],
            intro="The prediction is the gateway's, made when it chose the workers; the actual TTFT is what the same "
            "gateway measured, from the arrival of the request to its first token.",
        )
    ]


def _scatter(found: Sequence[tuple[float, float]]) -> Block:
    # Every so many of them, spread over the run, not the first.
    step = series.group_size(len(found))
    dots = sorted((max(told, LEAST_S), max(seen, LEAST_S)) for told, seen in found[::step])
    unit, factor = time_unit([[value for pair in dots for value in pair]])
    least, most = min(map(min, dots)) / SPARE, max(map(max, dots)) * SPARE
    x = [least, *(told for told, _ in dots), most]
    y = [None, *(seen for _, seen in dots), None]
    return Chart(
        title="Actual TTFT by predicted TTFT",
        caption=f"A dot is a request{'' if step == 1 else f', one in {step}'}; on the line the prediction was exact, "
        "above it too short.",
        x=Axis(f"predicted TTFT ({unit})", unit, "log"),
        y=Axis(f"actual TTFT ({unit})", unit, "log"),
        series=[Series("a request", "blue", dots=True), Series("exact", "grey", dash=(6, 4))],
        columns=[
            rounded([value * factor for value in x]),
            rounded([None if value is None else value * factor for value in y]),
            rounded([value * factor for value in x]),
        ],
    )


def _tables(told: Errors, first_tokens: int) -> list[Table]:
    facts = [
        ("requests with a first token", q.count(first_tokens)),
        ("of these with a prediction", f"{q.count(told.pairs)} ({q.share(q.ratio(told.pairs, first_tokens))})"),
        ("absolute error, median", _size(told.median)),
        ("absolute error, p90", _size(told.p90)),
        ("error with its sign, median", _signed(told.signed)),
        *((f"within {q.share(bound)} of the actual", q.share(part)) for bound, part in told.within.items()),
    ]
    return [
        Table(
            title="How far off",
            head=["", ""],
            rows=[[Cell(name), *texts(value)] for name, value in facts],
        )
    ]


def _size(value: float | None) -> str:
    """An error may be more than all."""
    return q.UNKNOWN if value is None else f"{q.significant(100 * value)}\u00a0%"


def _signed(value: float | None) -> str:
    return _size(value) if value is None or value <= 0 else f"+{_size(value)}"
